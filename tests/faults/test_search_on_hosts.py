"""Searches on several hosts: a trial's workers lie on all of them, and it decides what it would on one machine."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import Driver, Here, InLab, OnNodes, lab_of

from metadist.config import Config
from metadist.search.ledger import read_ledger

pytestmark = [pytest.mark.own_cluster, pytest.mark.chaos]
Make = Callable[..., Config]

SEARCH: dict[str, Any] = {
    "space": {"algorithm.inner_lr": {"loguniform": [0.01, 3]}, "algorithm.inner_steps": {"choice": [1, 2]}},
    "trials": 5, "startup": 2, "concurrent": 1, "selection": 20, "fresh": 20,
}  # fmt: skip


@pytest.fixture
def job(tmp_path: Path, tiny: Make) -> Path:
    base = tiny("outer.steps=60", "eval.every=20", "cluster.workers=2", "cluster.placement=spread", "eval.test=false")
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump({"search": SEARCH, **base.model_dump(mode="json")}))
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Starts a command at a place."""
    drivers: list[Driver] = []

    def begin(place: Any, *words: object) -> Driver:
        drivers.append(place.start(words, tmp_path / f"driver-{len(drivers)}.txt"))
        return drivers[-1]

    yield begin
    for driver in drivers:
        driver.end()


def decisions(folder: Path) -> list[Any]:
    """What was tried, reported and decided, each trial's θ, and the answer."""
    kept = ("event", "id", "values", "step", "decision", "why", "how", "score", "gain")
    found: list[Any] = []
    for event in read_ledger(folder / "ledger.jsonl"):
        told = {key: event[key] for key in kept if key in event}
        if event["event"] == "report":
            told["values"] = event["values"]["score"]
        if event["event"] == "end":
            told["theta"] = event["facts"].get("theta_sha256")
        found.append(told)
    return [*found, json.loads((folder / "search.json").read_text())["theta_sha256"]]


@pytest.mark.skipif(bool(lab_of.missing()), reason=f"needs root: {lab_of.missing()}")
@pytest.mark.timeout(900)
def test_two_hosts_decide_what_one_machine_does(
    job: Path, start: Callable[..., Driver], wait_until: Any, tmp_path: Path
) -> None:
    lab = lab_of.up(tmp_path / "lab", 2, 2)
    try:
        place = InLab(lab)
        spread, one = tmp_path / "spread", tmp_path / "one"
        driver = start(place, "search", job, "--run-dir", spread, f"cluster.address={place.address}")
        hosts = ("host-0", "host-1")
        on_both = lambda: all(place.on(host, "ray::Worker") for host in hosts)  # noqa: E731
        wait_until(lambda: on_both() or driver.process.poll() is not None, 120, "a trial with workers on both hosts")
        assert driver.process.wait(400) == 0, driver.said
        # The trials are made on the driver's host; its log has which hosts the workers of each lay on.
        ended = [json.loads(path.read_text()) for path in sorted((spread / "trials").glob("*/result.json"))]
        for result in ended:
            assert any("@" in worker for worker in result["shards_by_worker"]), "a worker on another host"
            assert any("@" not in worker for worker in result["shards_by_worker"]), "and one on the driver's"
        words = ("cluster.workers=0", "search.trials=1", "outer.steps=20", f"cluster.address={place.address}")
        driver = start(place, "search", job, *words, "--run-dir", tmp_path / "here")
        assert driver.process.wait(120) == 0, driver.said
        assert "cluster.workers=0: trials compute on this host alone, at most 2 at once; with 1 or more" in driver.said
        assert "lie on all 2 hosts of the cluster" in driver.said
        left = ("ray::Worker", "ray::TrialActor", "ray::Remote")
        wait_until(lambda: not any(place.on(host, name) for host in hosts for name in left), 30, "the end of them all")
    finally:
        lab_of.down(lab)
    driver = start(Here(), "search", job, "--run-dir", one)
    assert driver.process.wait(400) == 0, driver.said
    assert ended and decisions(spread) == decisions(one)


def test_a_head_without_cpus(
    job: Path, start: Callable[..., Driver], tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """What can never be placed is refused, in one line; workers on other hosts are what such a head is for."""
    place = OnNodes(tmp_path, free_port(), free_port())
    address = f"cluster.address={place.address}"
    try:
        place.add(1, "a"), place.add(1, "b")
        refused = (
            (("cluster.workers=0",), "this host, which has 0 CPU in the cluster, and needs 1 CPU; valid is"),
            (("cluster.workers=1", "cluster.cpus=2"), "need 2 CPU each, and the cluster's hosts have places for 0"),
        )  # fmt: skip
        for words, line in refused:
            driver = start(place, "search", job, *words, "--run-dir", tmp_path / words[0], address)
            assert driver.process.wait(120) == 4, driver.said
            assert line in driver.said.splitlines()[-1] and "Traceback" not in driver.said, driver.said
        driver = start(place, "search", job, "search.trials=2", "--run-dir", tmp_path / "s", address)
        assert driver.process.wait(240) == 0, driver.said
    finally:
        place.down()
