"""A search whose trials were really trained, small enough for every test session."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from metadist.run import train
from metadist.runtime.journal import read_metrics
from metadist.search.job import SearchJob, load_search, to_yaml
from metadist.search.ledger import Ledger
from metadist.search.state import End, Report, Trial

JOB: dict[str, Any] = {
    "seed": 1,
    "data": {"name": "glyphs"},
    "task": {"ways": 3, "shots": 1, "queries": 1, "meta_batch": 8, "shard": 4},
    "model": {"name": "mlp", "width": 16, "layers": 1},
    "algorithm": {"name": "maml", "inner_lr": 0.01, "inner_steps": 1},
    "outer": {"steps": 8, "lr": 3e-3},
    "engine": {"device": "cpu"},
    "cluster": {"workers": 0},
    "eval": {"every": 4, "val_episodes": 16, "episodes": 24},
    "search": {
        "space": {"algorithm.inner_lr": {"loguniform": [0.001, 3]}, "algorithm.inner_steps": {"choice": [1, 2]}},
        "trials": 5,
        "finalists": 2,
        "selection": 40,
        "fresh": 50,
    },
}
RATES = ((0.01, 1), (0.4, 2), (0.2, 1))
POINTS = [{"algorithm.inner_lr": rate, "algorithm.inner_steps": steps} for rate, steps in RATES]


class Searched(NamedTuple):
    """A search folder with all its trials, nothing concluded."""

    job: SearchJob
    trials: list[Trial]
    folder: Path

    def ledger(self) -> Ledger:
        return Ledger(self.folder / "ledger.jsonl")


def trained(job: SearchJob, index: int, folder: Path) -> Trial:
    """A trial as the search trains it."""
    trial = Trial(f"{index:03}", index, "random" if index else "baseline", dict(POINTS[index]))
    config = job.config(trial.values).with_values(eval={"test": False}, tracking={"uri": "off"})
    run = folder / "trials" / trial.id
    result = train(config, trial.id, run).result
    for row in read_metrics(run / "metrics.parquet"):
        if "val_accuracy" in row:
            values = {"score": row["val_accuracy"], "ci95": row["val_ci95"], "seconds": 0.5}
            told = {"step": row["step"], "values": values, "decision": "go", "why": ""}
            trial.reports.append(Report(**{name: told[name] for name in Report._fields}))
    facts = {"theta_sha256": result["theta_sha256"], "seconds": result["wall_seconds"], "peak_memory": 100.0 - index,
             "tasks_per_second": result["tasks_per_second"], "adaptation_mflop": 1.0 + index}  # fmt: skip
    trial.end = End("finished", result["meta_steps"], "", facts)
    return trial


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    folder = tmp_path_factory.mktemp("search") / "s"
    (folder / "logs").mkdir(parents=True)
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    job = load_search(folder / "job.yaml")
    (folder / "search.yaml").write_text(to_yaml(job))
    trials = [trained(job, index, folder) for index in range(3)]
    early = trials[1].reports[0]
    told = {"step": 4, "values": early.values | {"score": 0.4}, "decision": "stop", "why": "worse than half"}
    stop = Report(**{name: told[name] for name in Report._fields})
    trials.append(Trial("003", 3, "optuna", {"algorithm.inner_lr": 0.002, "algorithm.inner_steps": 2},
                        reports=[stop], end=End("stopped", 4, "worse than half", {"seconds": 0.2})))  # fmt: skip
    trials.append(Trial("004", 4, "optuna", {"algorithm.inner_lr": 2.9, "algorithm.inner_steps": 2},
                        end=End("diverged", 1, "step 1 is not finite", {})))  # fmt: skip
    with_events = Ledger(folder / "ledger.jsonl")
    for trial in trials:
        with_events.append({"event": "trial", "id": trial.id, "index": trial.index, "origin": trial.origin,
                            "values": trial.values, "seconds": 0.0})  # fmt: skip
        for report in trial.reports:
            with_events.append({"event": "report", "id": trial.id, "why": "", "seconds": 0.0, **report._asdict()})
        assert trial.end is not None
        with_events.append({"event": "end", "id": trial.id, "seconds": 0.0, **trial.end._asdict()})
    with_events.close()
    return Searched(job, trials, folder)


@pytest.fixture
def searched(trained_once: Searched, tmp_path: Path) -> Searched:
    """A search to conclude."""
    folder = Path(shutil.copytree(trained_once.folder, tmp_path / "s"))
    return Searched(trained_once.job, copy.deepcopy(trained_once.trials), folder)


@pytest.fixture(scope="session")
def concluded_once(trained_once: Searched, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """The same, concluded. Look only."""
    from metadist.search.outcome import conclude

    folder = Path(shutil.copytree(trained_once.folder, tmp_path_factory.mktemp("concluded") / "s"))
    done = Searched(trained_once.job, trained_once.trials, folder)
    lines: list[str] = []
    ledger = done.ledger()
    conclude(done.job, done.trials, folder, ledger, lines.append)
    ledger.close()
    (folder / "said.json").write_text(json.dumps(lines))
    return done
