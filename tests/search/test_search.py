"""A search through Ray Tune: its trials are runs, nothing of them is left, whoever dies."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import metadist.run
from metadist.config import Config, load
from metadist.durable import lock
from metadist.search.events import trials_of
from metadist.search.job import load_search
from metadist.search.ledger import Event, read_ledger
from metadist.search.run import resume, search
from metadist.search.state import Trial

SEARCH: dict[str, Any] = {
    "space": {"algorithm.inner_lr": {"grid": [0.2, 1e38, 0.6]}},
    "searcher": "grid",
    "scheduler": "fifo",
    "trials": 4,
    "selection": 20,
    "fresh": 20,
}
"""The baseline and three more, of which one diverges."""


@pytest.fixture
def job_file(tmp_path: Path, tiny: Callable[..., Config]) -> Path:
    base = tiny("outer.steps=9", "eval.every=3", "algorithm.inner_steps=2").model_dump(mode="json")
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"search": SEARCH, **base}))
    return path


def trials_in(folder: Path) -> list[Trial]:
    return trials_of(read_ledger(folder / "ledger.jsonl"))


def hows(trials: list[Trial]) -> list[str]:
    return [trial.end.how if trial.end else "" for trial in trials]


def assert_each_is_a_run(folder: Path, alone: Path) -> None:
    """θ of every finished trial is that of its config, trained by itself in one process."""
    job = load_search(folder / "search.yaml")
    for trial in trials_in(folder):
        assert trial.end is not None
        if trial.end.how == "finished":
            config = job.config(trial.values).with_values(
                cluster={"workers": 0, "address": "local"}, eval={"test": False}
            )
            trained = metadist.run.train(config, "alone", alone / trial.id)
            assert trial.end.facts["theta_sha256"] == trained.result["theta_sha256"]


def assert_nothing_is_left(cluster: Any, folder: Path, find_processes: Any, wait_until: Any) -> None:
    from ray.util import placement_group_table

    there = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    assert not there
    for name in ("ray::TrialActor", "ray::Worker", "ray::Remote"):
        wait_until(lambda name=name: not find_processes(cluster.pid, name), 20, f"the end of {name}")

    def free(path: Path) -> bool:
        with lock(path, wait=False) as nobody:
            return nobody

    for path in (folder / "trials").glob("*/.lock"):
        wait_until(lambda path=path: free(path), 20, f"the end of who trains in {path}")


def has_checkpoint(run: Path, step: int) -> bool:
    """Of this step or a later one: only the newest are kept."""
    return any(int(path.name[5:]) >= step for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.cluster
def test_trials_are_runs(job_file: Path, tmp_path: Path, cluster: Any, find_processes: Any, wait_until: Any) -> None:
    """Four trials, two at once; one diverges."""
    folder = search(job_file, [f"cluster.address={cluster.address}"], tmp_path / "search")
    trials = trials_in(folder)
    assert hows(trials) == ["finished", "finished", "diverged", "finished"]
    assert trials[2].end is not None and "not finite" in trials[2].end.reason
    assert [[report.step for report in trial.reports] for trial in (trials[0], trials[1])] == [[3, 6, 9]] * 2
    assert_each_is_a_run(folder, tmp_path)
    assert_nothing_is_left(cluster, folder, find_processes, wait_until)
    for trial in trials:
        assert (folder / "logs" / f"{trial.id}.log").stat().st_size

    before = read_ledger(folder / "ledger.jsonl")
    resume(folder)
    assert read_ledger(folder / "ledger.jsonl") == before, "a finished search has nothing to do"


PACKS = (
    "search.pack=2", "search.concurrent=2", "search.trials=5", "search.space={algorithm.inner_lr: {grid: [0.2, 1e38, "
    "0.6, 0.1]}}",
)  # fmt: skip
"""The baseline, and two packs of two; one trial diverges."""


def assert_the_winner_is_a_run(folder: Path, alone: Path) -> None:
    """`best.yaml` trains to the bits that are told, whether the winner was packed or not."""
    told = json.loads((folder / "search.json").read_text())
    trained = metadist.run.train(load(folder / "best.yaml", ["eval.test=false"]), "best", alone / "best")
    assert told["theta_sha256"] == trained.result["theta_sha256"]
    ends = {trial.id: trial.end for trial in trials_in(folder)}
    finished = {id: end.facts["reproducible"] for id, end in ends.items() if end and end.how == "finished"}
    assert finished == {id: id == "000" for id in finished}, "all but the job's own run are packed"
    assert told["run"] == f"trials/{told['winner']}" + ("" if told["winner"] == "000" else "-alone")


@pytest.mark.cluster
def test_packs(job_file: Path, tmp_path: Path, cluster: Any, find_processes: Any, wait_until: Any) -> None:
    folder = search(job_file, [*PACKS, f"cluster.address={cluster.address}"], tmp_path / "search")
    trials = trials_in(folder)
    assert hows(trials) == ["finished", "finished", "diverged", "finished", "finished"]
    assert [[report.step for report in trial.reports] for trial in (trials[1], trials[4])] == [[3, 6, 9]] * 2
    assert_the_winner_is_a_run(folder, tmp_path)
    assert_nothing_is_left(cluster, folder, find_processes, wait_until)


@pytest.mark.chaos
@pytest.mark.cluster
def test_a_killed_pack_goes_on(
    job_file: Path, tmp_path: Path, cluster: Any, find_processes: Any, wait_until: Any
) -> None:
    """SIGKILL of a pack's process behind its second checkpoint: all its trials go on from theirs."""
    folder = tmp_path / "search"
    run = folder / "trials" / "002"

    def kill() -> None:
        wait_until(lambda: has_checkpoint(run, 6), 120)
        os.kill(int((run / ".lock").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    words = ["outer.steps=60", "search.scheduler=fifo", *PACKS, "search.space={algorithm.inner_lr: {grid: [0.2, 0.6]}}"]
    search(job_file, [*words, "search.trials=3", f"cluster.address={cluster.address}"], folder)
    killer.join()
    events = read_ledger(folder / "ledger.jsonl")
    assert [event["id"] for event in events if event["event"] == "retry"] == ["001", "002"]
    assert hows(trials_in(folder)) == ["finished"] * 3
    told = [(event["id"], event["step"]) for event in events if event["event"] == "report"]
    assert sorted(told) == [(id, step) for id in ("000", "001", "002") for step in range(3, 61, 3)], "each once"
    assert_the_winner_is_a_run(folder, tmp_path)
    assert_nothing_is_left(cluster, folder, find_processes, wait_until)


@pytest.mark.chaos
@pytest.mark.cluster
def test_workers_in_the_trials_own_group(
    job_file: Path, tmp_path: Path, cluster: Any, find_processes: Any, wait_until: Any
) -> None:
    """Each trial with a worker that has half a CPU; some are stopped early."""
    words = ["cluster.workers=1", "cluster.cpus=0.5", "search.scheduler=asha", "search.concurrent=1"]
    space = "search.space={algorithm.inner_lr: {grid: [0.6, 1.0e-6]}}"
    folder = search(job_file, [*words, space, f"cluster.address={cluster.address}"], tmp_path / "search")
    trials = trials_in(folder)
    assert len(trials) == 3
    stopped = [trial for trial in trials if trial.end and trial.end.how == "stopped"]
    assert stopped, hows(trials)
    for trial in stopped:
        assert trial.end is not None and trial.end.step < 9 and trial.end.facts["adaptation_mflop"] > 0
        assert not (folder / "trials" / trial.id / "result.json").exists()
    assert_each_is_a_run(folder, tmp_path)
    assert_nothing_is_left(cluster, folder, find_processes, wait_until)


@pytest.mark.chaos
@pytest.mark.cluster
def test_a_killed_trial_goes_on(
    job_file: Path, tmp_path: Path, cluster: Any, find_processes: Any, wait_until: Any
) -> None:
    """SIGKILL of the trial's process behind its second checkpoint."""
    folder = tmp_path / "search"
    run = folder / "trials" / "000"

    def kill() -> None:
        wait_until(lambda: has_checkpoint(run, 6), 120)
        os.kill(int((run / ".lock").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    words = ["outer.steps=60", "search.trials=2", f"cluster.address={cluster.address}"]
    search(job_file, words, folder)
    killer.join()
    events = read_ledger(folder / "ledger.jsonl")
    assert [event["id"] for event in events if event["event"] == "retry"] == ["000"]
    assert hows(trials_in(folder)) == ["finished", "finished"]
    told = [(event["id"], event["step"]) for event in events if event["event"] == "report"]
    assert sorted(told) == [(id, step) for id in ("000", "001") for step in range(3, 61, 3)], "each once"
    assert_each_is_a_run(folder, tmp_path)
    assert_nothing_is_left(cluster, folder, find_processes, wait_until)


@pytest.mark.chaos
@pytest.mark.cluster
def test_a_full_disk_under_the_ledger_ends_the_search(
    job_file: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch,
    find_processes: Any, wait_until: Any,
) -> None:  # fmt: skip
    from metadist.errors import StorageError
    from metadist.search.ledger import Ledger

    real = Ledger.append

    def full(ledger: Ledger, event: Event) -> Event:
        if event["event"] == "report" and event["step"] == 6:
            raise StorageError("ledger.jsonl: cannot be written: No space left on device")
        return real(ledger, event)

    folder = tmp_path / "search"
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", full)
        words = ["search", job_file, f"cluster.address={cluster.address}", "search.trials=2", "--run-dir", folder]
        from metadist.cli import main

        patched.setattr(sys, "argv", ["metadist", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 3
    assert_nothing_is_left(cluster, folder, find_processes, wait_until)
    resume(folder)
    assert hows(trials_in(folder)) == ["finished", "finished"]
    assert_each_is_a_run(folder, tmp_path)


@pytest.mark.chaos
@pytest.mark.cluster
def test_what_is_waited_for_is_told(
    job_file: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have reserved all CPUs until then."""
    import ray
    from ray.util import placement_group, remove_placement_group

    others, said = placement_group([{"CPU": 3}]), []
    ray.get(others.ready())

    def say(line: str) -> None:
        said.append(line)
        if "waits for a place" in line:
            remove_placement_group(others)

    monkeypatch.setattr("metadist.search.run._say", say)
    monkeypatch.setattr("metadist.search.on_tune.LOOKS", 0.5)
    folder = search(job_file, ["search.trials=2", f"cluster.address={cluster.address}"], tmp_path / "search")
    assert hows(trials_in(folder)) == ["finished", "finished"]
    (line,) = (line for line in said if "waits for a place" in line)
    assert line == "a trial waits for a place on the cluster, where 0 compute: each needs 1 CPU, 0 are free"


@pytest.mark.chaos
@pytest.mark.cluster
def test_trials_reserve_shares_of_gpus(
    job_file: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    """Two at once with three quarters of a logical GPU each; all of both is free again behind them."""
    import ray

    from metadist.search.run import _Shown

    free, show = set(), _Shown.__call__

    def watched(shown: Any, trials: Any) -> None:
        free.add(ray.available_resources().get("GPU", 0.0))
        show(shown, trials)

    monkeypatch.setattr(_Shown, "__call__", watched)
    words = ["cluster.resources={GPU: 0.75}", "outer.steps=30", "search.trials=2", f"cluster.address={cluster.address}"]
    folder = search(job_file, words, tmp_path / "search")
    assert hows(trials_in(folder)) == ["finished", "finished"]
    assert min(free) == pytest.approx(0.5)
    wait_until(lambda: ray.available_resources().get("GPU") == 2.0, 20, "the GPUs of trials that have ended")


# --- the driver's death ------------------------------------------------------------

KILLED = """
import os, signal, sys
from metadist.search.ledger import Ledger
when, name, number = sys.argv.pop(1).split(":")
real, count = Ledger.append, [0]
def append(ledger, event):
    count[0] += event["event"] == name
    mine = event["event"] == name and count[0] == int(number)
    if mine and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    found = real(ledger, event)
    if mine:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
Ledger.append = append
from metadist.cli import main
main()
"""


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., int]:
    """Runs `metadist`, killed at a point of its ledger such as after:report:3; the exit code."""

    def run(*words: object, killed: str = "never:none:1") -> int:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", KILLED, killed, *map(str, words)],
            cwd=tmp_path, env={**environment, "HOME": str(tmp_path)}, check=False, timeout=900,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return done.returncode

    return run


MEASURED = ("seconds", "facts", "reason")


def decisions(folder: Path) -> list[dict[str, Any]]:
    """Events without what differs from time to time."""
    found = []
    for event in read_ledger(folder / "ledger.jsonl"):
        kept = {key: value for key, value in event.items() if key not in MEASURED}
        if event["event"] == "report":
            kept["values"] = event["values"]["score"]
        if event["event"] == "end":
            kept["theta"] = event["facts"].get("theta_sha256")
        found.append(kept)
    return found


ONE_AT_A_TIME = (
    "search.concurrent=1", "search.searcher=optuna", "search.scheduler=asha", "search.trials=5",
    "search.space={algorithm.inner_lr: {loguniform: [0.01, 3]}}", "search.startup=2",
)  # fmt: skip


@pytest.mark.own_cluster
@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_a_killed_driver(job_file: Path, tmp_path: Path, command: Callable[..., int]) -> None:
    """Before a trial's end is recorded, between a report and its answer, and in the selection."""
    calm = tmp_path / "calm"
    assert command("search", job_file, *ONE_AT_A_TIME, "--run-dir", calm) == 0
    expected = decisions(calm)
    for point in ("before:end:2", "after:report:5", "after:judged:1"):
        folder = tmp_path / point.replace(":", "-")
        assert command("search", job_file, *ONE_AT_A_TIME, "--run-dir", folder, killed=point) == -signal.SIGKILL
        assert (folder / "trials.parquet").exists(), "told behind every end"
        before = {
            trial.id: (folder / "trials" / trial.id / "result.json").stat().st_mtime_ns
            for trial in trials_in(folder)
            if trial.end is not None and trial.end.how == "finished"
        }
        assert command("search", "--resume", folder) == 0
        assert decisions(folder) == expected, point
        for id, written in before.items():
            assert (folder / "trials" / id / "result.json").stat().st_mtime_ns == written, "not run again"


@pytest.mark.own_cluster
@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_a_killed_driver_of_packs(job_file: Path, tmp_path: Path, command: Callable[..., int]) -> None:
    """Within a pack's validation, when one of two has ended, and while the winner is trained again by itself."""
    for point in ("after:report:8", "before:end:4", "before:alone:1"):
        folder = tmp_path / point.replace(":", "-")
        words = ["search", job_file, *PACKS, "eval.test=false"]
        assert command(*words, "--run-dir", folder, killed=point) == -signal.SIGKILL
        there = read_ledger(folder / "ledger.jsonl")
        before = {
            trial.id: (folder / "trials" / trial.id / "result.json").stat().st_mtime_ns
            for trial in trials_in(folder)
            if trial.end is not None and trial.end.how == "finished"
        }
        assert before or point == "after:report:8"
        assert command("search", "--resume", folder) == 0
        events = read_ledger(folder / "ledger.jsonl")
        assert events[: len(there)] == there
        told = [(event["id"], event["step"]) for event in events if event["event"] == "report"]
        assert len(told) == len(set(told))
        assert hows(trials_in(folder)) == ["finished", "finished", "diverged", "finished", "finished"]
        for id, written in before.items():
            assert (folder / "trials" / id / "result.json").stat().st_mtime_ns == written, "not run again"
        assert_the_winner_is_a_run(folder, tmp_path / point)


@pytest.mark.chaos
@pytest.mark.own_cluster
def test_an_interrupted_search_goes_on(
    job_file: Path, tmp_path: Path, start_cli: Any, command: Callable[..., int], wait_until: Any
) -> None:
    folder = tmp_path / "search"
    process = start_cli("search", job_file, "outer.steps=30", "search.trials=2", "--run-dir", folder)
    wait_until(lambda: has_checkpoint(folder / "trials" / "001", 3), 120)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert f"--resume {folder}" in process.said.splitlines()[-1] and "Traceback" not in process.said
    assert command("search", "--resume", folder, "search.trials=3", "search.concurrent=1") == 0
    assert hows(trials_in(folder)) == ["finished", "finished", "diverged"]
    assert_each_is_a_run(folder, tmp_path)
