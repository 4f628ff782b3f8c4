"""From the last trial to the answer, on trials that were really trained."""

import copy
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from metadist.config import load
from metadist.engine.engine import Engine
from metadist.errors import RunError
from metadist.measure import ACCURACY, MSE
from metadist.run import checked_tables, train
from metadist.runtime.in_process import InProcess
from metadist.search import outcome
from metadist.search.answer import answer, gain_line, pareto
from metadist.search.job import SearchJob
from metadist.search.outcome import NothingFinished, conclude, ranked
from metadist.search.state import End, Trial


def events_of(searched: Any, name: str) -> list[dict[str, Any]]:
    ledger = searched.ledger()
    ledger.close()
    return [event for event in ledger.events if event["event"] == name]


def by_hand(
    searched: Any, trial: Trial, draw: int, episodes: int, split: str = "val", name: str = "score"
) -> list[float]:
    """Accuracy task by task, or loss: a plain loop over shards of the engine."""
    config = searched.job.config(trial.values)
    engine = Engine(config, checked_tables(config, print))
    named = load_file(searched.folder / "trials" / trial.id / "theta.safetensors")
    flat = engine.blueprint.values.flatten(named).numpy()
    judged = config.with_values(eval={"draw": draw})
    scores: list[float] = []
    while len(scores) < episodes:
        size = min(engine.shard_tasks, episodes - len(scores))
        scores += engine.judge(flat, judged, split, len(scores), size)[name].tolist()
    return scores


def interval(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, 1.96 * spread / math.sqrt(len(values))


# --- who is judged on what ---------------------------------------------------------


def test_the_best_finalists_and_the_baseline_go_on(concluded_once: Any) -> None:
    best = ranked(concluded_once.trials, ACCURACY)
    (event,) = events_of(concluded_once, "finalists")
    assert {trial.id for trial in best} == {"000", "001", "002"}
    assert event["ids"][:2] == [trial.id for trial in best[:2]] and "000" in event["ids"]
    assert [trial.id for trial in ranked(concluded_once.trials, MSE)] != [trial.id for trial in best]


def test_the_winner_is_the_best_on_the_selection_tasks(concluded_once: Any) -> None:
    trials = {trial.id: trial for trial in concluded_once.trials}
    found = {}
    for event in events_of(concluded_once, "judged"):
        found[event["id"]] = event["score"]
        mean, ci95 = interval(by_hand(concluded_once, trials[event["id"]], 0, 40))
        assert (event["score"], event["ci95"]) == pytest.approx((mean, ci95), abs=1e-12)
    (selected,) = events_of(concluded_once, "selected")
    assert found[selected["id"]] == max(found.values())


def test_the_gain_is_paired_on_the_same_fresh_tasks(concluded_once: Any) -> None:
    trials = {trial.id: trial for trial in concluded_once.trials}
    (fresh,) = events_of(concluded_once, "fresh")
    assert fresh["id"] != "000", "the job's own rate is far too small; else this test shows nothing"
    ours, theirs = (by_hand(concluded_once, trials[name], 1, 50) for name in (fresh["id"], "000"))
    assert (fresh["winner"]["score"], fresh["winner"]["ci95"]) == pytest.approx(interval(ours), abs=1e-12)
    assert (fresh["baseline"]["score"], fresh["baseline"]["ci95"]) == pytest.approx(interval(theirs), abs=1e-12)
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    assert (fresh["gain"], fresh["gain_ci95"]) == pytest.approx(interval(differences), abs=1e-12)
    assert fresh["gain"] > 0


def test_the_streams_of_tasks_are_disjoint_and_the_same_for_every_trial(concluded_once: Any) -> None:
    """Images of the tasks themselves, as two trials' judges sample them."""
    from metadist.tasks.samplers import evaluation_tasks

    def tasks(trial: Trial, draw: int, count: int) -> list[bytes]:
        config = concluded_once.job.config(trial.values)
        sampler = evaluation_tasks(config, checked_tables(config, print), "val", "cpu")
        episodes = sampler.sample(draw, 0, count)
        both = zip(episodes.support.x.numpy(), episodes.query.x.numpy(), strict=True)
        return [hashlib.sha256(support.tobytes() + query.tobytes()).digest() for support, query in both]

    one, other = concluded_once.trials[0], concluded_once.trials[1]
    screened, fresh = tasks(one, outcome.SELECTION_DRAW, 40), tasks(one, outcome.FRESH_DRAW, 50)
    assert len(set(fresh)) > 45 and not set(screened) & set(fresh)
    assert tasks(other, outcome.SELECTION_DRAW, 40) == screened and tasks(other, outcome.FRESH_DRAW, 50) == fresh


def test_the_meta_test_is_that_of_training_the_winner_alone(concluded_once: Any, tmp_path: Path) -> None:
    """`best.yaml` is a job file that gives the trial's bits, and so the same meta-test."""
    (tested,) = events_of(concluded_once, "tested")
    winner = next(trial for trial in concluded_once.trials if trial.id == tested["id"])
    config = load(concluded_once.folder / "best.yaml", ["tracking.uri=off"])
    assert config.eval.test and config.eval.draw == 0
    alone = train(config, "best", tmp_path / "alone").result
    assert winner.end is not None
    assert alone["theta_sha256"] == winner.end.facts["theta_sha256"]
    assert (alone["test"], alone["untrained"]) == (tested["test"], tested["untrained"])
    there = load_file(concluded_once.folder / "trials" / winner.id / "theta.safetensors")
    here = load_file(tmp_path / "alone" / "theta.safetensors")
    assert all(here[name].numpy().tobytes() == there[name].numpy().tobytes() for name in there)


def test_best_yaml_says_what_it_is(concluded_once: Any) -> None:
    head = [line for line in (concluded_once.folder / "best.yaml").read_text().splitlines() if line.startswith("# ")]
    (selected,) = events_of(concluded_once, "selected")
    assert head[0].startswith(f"# Trial {selected['id']} of a search: algorithm.inner_lr=")
    assert "fresh validation tasks" in " ".join(head) and "meta-test" in " ".join(head)
    assert head[-1] == "# metadist train best.yaml"


# --- nothing twice -----------------------------------------------------------------


class Killed(BaseException):
    """As far as the code is concerned, the end of the process."""


def test_killed_before_every_event_in_turn_the_rest_follows_and_nothing_is_repeated(
    searched: Any, concluded_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[str, int]] = []
    original = InProcess.judge

    def counted(self: InProcess, values: Any, setting: Any, split: str, episodes: int) -> Any:
        judged.append((split, setting.eval.draw))
        return original(self, values, setting, split, episodes)

    monkeypatch.setattr(InProcess, "judge", counted)
    whole = events_of_all(concluded_once)
    first = len(events_of_all(searched))
    said: dict[str, list[str]] = {}
    for end, event in enumerate(whole[first:], first):
        ledger = searched.ledger()
        append = ledger.append

        def dying(event: Any, ledger: Any = ledger, append: Any = append, end: int = end) -> Any:
            if len(ledger.events) == end:
                raise Killed
            return append(event)

        monkeypatch.setattr(ledger, "append", dying)
        with pytest.raises(Killed):
            conclude(searched.job, searched.trials, searched.folder, ledger, said.setdefault(event["event"], []).append)
        ledger.close()
        assert events_of_all(searched) == whole[:end], "and all that went before is kept"
    last = searched.ledger()
    conclude(searched.job, searched.trials, searched.folder, last, said.setdefault("", []).append)
    last.close()
    assert events_of_all(searched) == whole
    # What was found out but not recorded is found out once more, and nothing else: finalists, fresh tasks of two
    # trials, the meta-test of the trained and of the untrained state.
    finalists = next(len(event["ids"]) for event in whole if event["event"] == "finalists")
    assert {what: judged.count(what) for what in set(judged)} == {
        ("val", 0): 2 * finalists,
        ("val", 1): 4,
        ("test", 0): 4,
    }
    told = [name for name, lines in said.items() if any("interrupted" in line for line in lines)]
    assert told == ["done"], "the attempt that follows the one that lost its result"
    for name in ("best.yaml", "search.json"):
        ours, theirs = ((one.folder / name).read_text() for one in (searched, concluded_once))
        assert ours.replace(str(searched.folder), "") == theirs.replace(str(concluded_once.folder), "")


def events_of_all(searched: Any) -> list[dict[str, Any]]:
    ledger = searched.ledger()
    ledger.close()
    return list(ledger.events)


def test_concluding_again_adds_nothing_and_a_further_trial_is_judged_with_the_others(searched: Any) -> None:
    ledger = searched.ledger()
    conclude(searched.job, searched.trials, searched.folder, ledger, lambda line: None)
    events = list(ledger.events)
    conclude(searched.job, searched.trials, searched.folder, ledger, lambda line: None)
    assert ledger.events == events
    # The best trial of all comes later: a copy of the winner with a better screening score.
    winner = answer(searched.trials, ledger.events).winner
    assert winner is not None
    late = copy.deepcopy(winner)
    late.id, late.index = "005", 5
    late.reports[-1].values["score"] = 0.999
    (searched.folder / "trials" / "005").symlink_to(searched.folder / "trials" / winner.id)
    conclude(searched.job, [*searched.trials, late], searched.folder, ledger, lambda line: None)
    ledger.close()
    finalists = [event["ids"] for event in ledger.events if event["event"] == "finalists"]
    assert len(finalists) == 2 and finalists[1][0] == "005"
    judged = [event["id"] for event in ledger.events if event["event"] == "judged"]
    assert len(judged) == len(set(judged)), "who was judged is not judged again"
    tests = [event["id"] for event in ledger.events if event["event"] == "tested"]
    assert len(tests) == len(set(tests))
    assert json.loads((searched.folder / "search.json").read_text())["meta_tests"] == len(tests)


# --- a packed winner -----------------------------------------------------------------


def packed(searched: Any, *ids: str) -> SearchJob:
    """Let some trials have been packed; the search of that."""
    for trial in searched.trials:
        if trial.id in ids:
            trial.end.facts.update({"reproducible": False, "theta_sha256": "of the pack"})
    return searched.job._replace(search=searched.job.search.model_copy(update={"pack": 2}))


def test_a_packed_winner_is_trained_again_by_itself(searched: Any, concluded_once: Any, tmp_path: Path) -> None:
    """Interrupted on the way, it goes on; the answer is that of the same trial unpacked."""
    winner = events_of(concluded_once, "selected")[0]["id"]
    job, ledger, said = packed(searched, winner), searched.ledger(), []

    def interrupt(line: str) -> None:
        if "by itself: 4/8" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conclude(job, searched.trials, searched.folder, ledger, interrupt)
    assert not [event for event in ledger.events if event["event"] == "alone"]
    conclude(job, searched.trials, searched.folder, ledger, said.append)
    (alone,) = (event for event in ledger.events if event["event"] == "alone")
    events = list(ledger.events)
    conclude(job, searched.trials, searched.folder, ledger, said.append)
    assert ledger.events == events
    ledger.close()
    assert (alone["id"], alone["how"], alone["facts"]["reproducible"]) == (winner, "finished", True)
    told = json.loads((searched.folder / "search.json").read_text())
    calm = json.loads((concluded_once.folder / "search.json").read_text())
    assert (told["run"], calm["run"]) == (f"trials/{winner}-alone", f"trials/{winner}")
    assert told["theta_sha256"] == alone["facts"]["theta_sha256"] == calm["theta_sha256"]
    assert (told["fresh"], told["test"]) == (calm["fresh"], calm["test"])
    assert "packed with others" in (searched.folder / "best.yaml").read_text()
    trained = train(load(searched.folder / "best.yaml", ["tracking.uri=off", "eval.test=false"]), "b", tmp_path / "b")
    assert trained.result["theta_sha256"] == told["theta_sha256"]
    shown = (searched.folder / "report.html").read_text()
    assert "Trained again by itself, to " in shown


def test_a_packed_winner_of_its_own_bits_is_not_trained_again(searched: Any, concluded_once: Any) -> None:
    winner = events_of(concluded_once, "selected")[0]["id"]
    job, ledger = packed(searched), searched.ledger()
    for trial in searched.trials:
        if trial.end.how == "finished":
            trial.end.facts["reproducible"] = True
    conclude(job, searched.trials, searched.folder, ledger, lambda line: None)
    ledger.close()
    assert not [event for event in ledger.events if event["event"] == "alone"]
    told, calm = (
        json.loads((folder / "search.json").read_text()) for folder in (searched.folder, concluded_once.folder)
    )
    assert told["run"] == calm["run"] == f"trials/{winner}"
    assert told["theta_sha256"] == calm["theta_sha256"]


def test_a_packed_finalist_that_fails_by_itself_does_not_win(
    searched: Any, concluded_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = events_of(concluded_once, "selected")[0]["id"]
    job, ledger = packed(searched, winner), searched.ledger()
    end = End("diverged", 3, "step 3 is not finite", {"seconds": 1.0})
    monkeypatch.setattr(outcome, "run_trial", lambda *_: end)
    conclude(job, searched.trials, searched.folder, ledger, lambda line: None)
    found = answer(searched.trials, ledger.events)
    assert found.winner is not None and found.winner.id != winner and found.alone is None
    ledger.close()


# --- what is left behind ------------------------------------------------------------


def test_the_tables(concluded_once: Any) -> None:
    trials = pq.read_table(concluded_once.folder / "trials.parquet")
    kinds = {field.name: field.type for field in trials.schema}
    assert kinds == {
        "id": pa.string(), "index": pa.int64(), "origin": pa.string(), "attempt": pa.int64(),
        "algorithm.inner_lr": pa.float64(), "algorithm.inner_steps": pa.int64(), "how": pa.string(),
        "reason": pa.string(), "steps": pa.int64(), "score": pa.float64(), "ci95": pa.float64(), "early": pa.float64(),
        "selection": pa.float64(), "selection_ci95": pa.float64(), "seconds": pa.float64(),
        "tasks_per_second": pa.float64(), "peak_memory": pa.float64(), "adaptation_mflop": pa.float64(),
        "reproducible": pa.bool_(), "theta_sha256": pa.string(),
    }  # fmt: skip
    rows = trials.to_pylist()
    assert [row["id"] for row in rows] == ["000", "001", "002", "003", "004"]
    assert [row["how"] for row in rows] == ["finished"] * 3 + ["stopped", "diverged"]
    assert [row["steps"] for row in rows] == [8, 8, 8, 4, 1]
    assert rows[0]["score"] == concluded_once.trials[0].reports[-1].values["score"]
    assert rows[0]["early"] == concluded_once.trials[0].reports[0].values["score"]
    assert rows[4]["score"] is None and rows[4]["reason"] == "step 1 is not finite"
    assert all((row["selection"] is None) == (row["id"] in ("003", "004")) for row in rows)
    curves = pq.read_table(concluded_once.folder / "curves.parquet")
    assert [(f.name, f.type) for f in curves.schema] == [
        ("trial", pa.string()), ("step", pa.int64()), ("score", pa.float64()), ("ci95", pa.float64())
    ]  # fmt: skip
    assert [(row["trial"], row["step"]) for row in curves.to_pylist()] == [
        ("000", 4), ("000", 8), ("001", 4), ("001", 8), ("002", 4), ("002", 8), ("003", 4)
    ]  # fmt: skip


def test_the_report_needs_nothing_from_elsewhere(concluded_once: Any) -> None:
    page = (concluded_once.folder / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "<link" not in page and "@import" not in page
    sources = re.findall(r'\b(?:src|href)\s*=\s*"([^"]*)"', page)
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert "url(" not in page
    for name in ("heatmap", "curves", "parallel", "importance"):
        png = (concluded_once.folder / "figures" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 4000
    (selected,) = events_of(concluded_once, "selected")
    assert f"Winner: trial {selected['id']}" in page and "step 1 is not finite" in page


def test_no_trial_finished(searched: Any) -> None:
    left = [trial for trial in searched.trials if trial.id in ("003", "004")]
    more = Trial("005", 5, "optuna", {}, end=End("diverged", 2, "another <b>reason", {}))
    ledger = searched.ledger()
    with pytest.raises(NothingFinished) as told:
        conclude(searched.job, [*left, more], searched.folder, ledger, print)
    ledger.close()
    assert told.value.exit_code == 5
    assert "1 stopped (worse than half); 2 diverged (step 1 is not finite)" in str(told.value)
    assert not (searched.folder / "best.yaml").exists()
    page = (searched.folder / "report.html").read_text()
    assert "another &lt;b&gt;reason" in page and "<b>reason" not in page


def test_a_lost_state_of_a_finalist_is_told_in_one_line(searched: Any) -> None:
    for trial in searched.trials[:3]:
        (searched.folder / "trials" / trial.id / "theta.safetensors").write_bytes(b"no")
    ledger = searched.ledger()
    with pytest.raises(RunError, match=r"theta\.safetensors: the state of a finished trial cannot be read"):
        conclude(searched.job, searched.trials, searched.folder, ledger, print)
    ledger.close()


def test_without_a_baseline_and_without_a_meta_test(searched: Any) -> None:
    base = searched.job.base.with_values(eval={"test": False})
    job = SearchJob(searched.job.search, base)
    ledger = searched.ledger()
    said: list[str] = []
    conclude(job, searched.trials[1:], searched.folder, ledger, said.append)
    ledger.close()
    (fresh,) = [event for event in ledger.events if event["event"] == "fresh"]
    assert fresh["against"] is None and "gain" not in fresh
    assert any("no finished trial of the job's own values" in line for line in said)
    assert not any(event["event"].startswith("test") for event in ledger.events)


def test_several_aims(searched: Any) -> None:
    search = searched.job.search.model_copy(update={"also": ["adaptation_mflop", "peak_memory"], "scheduler": "fifo"})
    job = SearchJob(search, searched.job.base)
    ledger = searched.ledger()
    conclude(job, searched.trials, searched.folder, ledger, lambda line: None)
    ledger.close()
    rows = pq.read_table(searched.folder / "pareto.parquet").to_pylist()
    assert {row["id"] for row in rows} == {"000", "001", "002"}, "each has the smallest or the best of something"
    for row in rows:
        config = load(searched.folder / "pareto" / f"{row['id']}.yaml")
        assert config.algorithm.inner_lr == row["algorithm.inner_lr"]  # type: ignore[union-attr]
    assert "Pareto front" in (searched.folder / "report.html").read_text()


def test_the_pareto_front_is_what_nobody_beats() -> None:
    noise = np.random.default_rng(0)
    rows = [
        {"id": str(n), "index": n, "how": "finished", "score": float(a), "seconds": float(b)}
        for n, (a, b) in enumerate(noise.integers(0, 9, (60, 2)))
    ]
    for measure, sign in ((ACCURACY, -1), (MSE, 1)):
        front = {row["id"] for row in pareto(rows, ["seconds"], measure)}
        for row in rows:
            beaten = any(
                sign * o["score"] <= sign * row["score"]
                and o["seconds"] <= row["seconds"]
                and (o["score"], o["seconds"]) != (row["score"], row["seconds"])
                for o in rows
            )
            assert (row["id"] in front) != beaten


def test_words_of_the_gain() -> None:
    event = {"id": "003", "against": "000", "episodes": 1000, "winner": {"score": 0.932, "ci95": 0.004},
             "baseline": {"score": 0.914, "ci95": 0.005}, "gain": 0.018, "gain_ci95": 0.009}  # fmt: skip
    assert gain_line(event, ACCURACY) == (
        "93.2 ± 0.4 % on 1,000 fresh validation tasks, the job's own values 91.4 ± 0.5 %: "
        "better by 1.8 ± 0.9 points, task by task"
    )
    assert "nothing better was found" in gain_line({**event, "id": "000"}, ACCURACY)
    assert "worse by 0.018 ± 0.009, task" in gain_line({**event, "gain": -0.018}, MSE)


@pytest.mark.parametrize("mode", [None, "max"])
def test_a_search_by_loss_is_decided_by_the_loss(searched: Any, mode: str | None) -> None:
    section = searched.job.search.model_copy(update={"metric": "loss", "mode": mode, "finalists": 3, "selection": 40})
    job = searched.job._replace(search=section)
    ledger = searched.ledger()
    conclude(job, searched.trials, searched.folder, ledger, lambda line: None)
    ledger.close()
    loss = {trial.id: np.mean(by_hand(searched, trial, 0, 40, name="loss")) for trial in searched.trials[:3]}
    found = json.loads((searched.folder / "search.json").read_text())
    assert found["winner"] == (max if mode else min)(loss, key=lambda id: loss[id])
    assert found["selection"][found["winner"]]["score"] == loss[found["winner"]]
    assert (found["measure"], found["mode"]) == ("loss", mode or "min") and "accuracy" in found["test"]["test"]
