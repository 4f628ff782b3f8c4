"""Several Ray nodes on one machine, without root: workers that come and go, are placed, wait and are refused."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from injuries import kill
from places import Driver, OnNodes

from metadist.config import Config, to_yaml
from metadist.run import resume, train
from metadist.runtime.checkpoint import checkpoints

pytestmark = [pytest.mark.own_cluster, pytest.mark.chaos]

Make = Callable[..., Config]
LONG = ("outer.steps=300",)
ENDLESS = ("outer.steps=1000000", "checkpoint.every=50", "eval.every=0", "eval.test=false")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[OnNodes]:
    """A head without CPUs; each test adds the nodes that it needs, and takes them away again."""
    place = OnNodes(tmp_path_factory.mktemp("nodes"), free_port(), free_port())
    yield place
    place.down()


@pytest.fixture
def node(nodes: OnNodes) -> Iterator[Callable[..., Any]]:
    """Adds a node with some CPUs that has a custom resource as its mark."""
    added: list[Any] = []

    def add(cpus: int, mark: str) -> Any:
        added.append(nodes.add(cpus, mark))
        return added[-1]

    yield add
    for one in added:
        nodes.remove(one)


@pytest.fixture
def start(nodes: OnNodes, tiny: Make, tmp_path: Path, wait_until: Any) -> Iterator[Callable[..., Driver]]:
    """Starts a run without an end whose workers go where a mark is."""
    drivers: list[Driver] = []

    def begin(name: str, mark: str, *overrides: str) -> Driver:
        job = tmp_path / f"{name}.yaml"
        job.write_text(to_yaml(tiny(*ENDLESS, f"cluster.resources={{{mark}: 1}}", "cluster.timeout=100")))
        words = ["train", job, "--run-dir", tmp_path / name, f"cluster.address={nodes.address}", *overrides]
        drivers.append(nodes.start(words, tmp_path / f"{name}.txt"))
        return drivers[-1]

    yield begin
    for driver in drivers:
        driver.end()


@pytest.fixture
def reaches(tmp_path: Path, wait_until: Any) -> Callable[..., None]:
    """Waits until a run has said something, or is so many steps further."""

    def wait(driver: Driver, name: str = "", line: str = "") -> None:
        folder = tmp_path / name / "checkpoints"
        newest = lambda: next((step for step, _ in checkpoints(folder)), 0)  # noqa: E731
        before = newest()
        met = (lambda: line in driver.said) if line else (lambda: newest() > before)
        wait_until(lambda: met() or driver.process.poll() is not None, 120, line or "another checkpoint")
        assert driver.process.poll() is None, driver.said

    return wait


def test_one_three_two_workers(
    node: Callable[..., Any], nodes: OnNodes, start: Callable[..., Driver], reaches: Callable[..., None], tiny: Make,
    tmp_path: Path,
) -> None:  # fmt: skip
    node(1, "elastic")
    driver = start("run", "elastic", "cluster.workers={min: 1, max: 3}")
    reaches(driver, "run")
    node(1, "elastic")
    third = node(1, "elastic")
    reaches(driver, line="3 workers now")
    reaches(driver, "run")
    nodes.remove(third)
    reaches(driver, line=" died (")
    reaches(driver, "run")
    driver.signal(signal.SIGTERM)
    assert driver.process.wait(60) == 143, driver.said
    assert "Traceback" not in driver.said
    (steps, _) = next(checkpoints(tmp_path / "run" / "checkpoints"))
    found = resume(tmp_path / "run", ["cluster.workers=0", f"outer.steps={steps}"]).result
    calm = train(tiny(*ENDLESS, f"outer.steps={steps}"), "calm", tmp_path / "calm").result
    assert found["theta_sha256"] == calm["theta_sha256"]
    assert found["steps_recomputed"] == 0


@pytest.mark.parametrize(("placement", "different"), [("spread", 2), ("pack", 1)])
def test_placement(
    placement: str, different: int, node: Callable[..., Any], nodes: OnNodes, start: Callable[..., Driver],
    reaches: Callable[..., None],
) -> None:  # fmt: skip
    """Two workers where two nodes have room for both of them."""
    two = [node(2, placement) for _ in range(2)]
    driver = start("run", placement, "cluster.workers=2", f"cluster.placement={placement}")
    reaches(driver, "run")
    held = [len(nodes.on(one, "ray::Worker")) for one in two]
    assert sum(held) == 2
    assert sum(count > 0 for count in held) == different


def test_a_run_that_has_to_wait_says_what_for(
    node: Callable[..., Any], start: Callable[..., Driver], reaches: Callable[..., None]
) -> None:
    """There is room for one of two runs; the second one begins when the first is over."""
    node(1, "narrow")
    first = start("first", "narrow", "cluster.workers=1")
    reaches(first, "first")
    second = start("second", "narrow", "cluster.workers=1")
    line = "waiting for workers: 0 of 1 are there; each needs 1 CPU, 0 are free, each needs 1 narrow, 0 are free"
    reaches(second, line=line)
    first.signal(signal.SIGTERM)
    assert first.process.wait(60) == 143
    reaches(second, "second")


def test_a_run_does_not_wait_for_room_that_another_one_has(
    node: Callable[..., Any], start: Callable[..., Driver], reaches: Callable[..., None]
) -> None:
    """It has as many workers as it needs: it begins, although the cluster is large enough for one more."""
    node(2, "shared")
    first = start("first", "shared", "cluster.workers=1")
    reaches(first, "first")
    second = start("second", "shared", "cluster.workers={min: 1, max: 2}", "cluster.timeout=1000")
    reaches(second, "second")


def test_from_outside_of_the_cluster(
    node: Callable[..., Any], nodes: OnNodes, start: Callable[..., Driver], tiny: Make, tmp_path: Path
) -> None:
    """Over `ray://`, whose client calls for a driver that is no member: the same bits, a killed worker included."""
    there = node(2, "client")
    driver = start("run", "client", "cluster.workers=2", f"cluster.address={nodes.outside}", *LONG)
    newest = lambda: next((step for step, _ in checkpoints(tmp_path / "run" / "checkpoints")), 0)  # noqa: E731
    while newest() < 50:
        assert driver.process.poll() is None, driver.said
        time.sleep(0.05)
    kill(nodes.on(there, "ray::Worker")[0])
    assert driver.process.wait(120) == 0, driver.said
    assert "Traceback" not in driver.said
    assert " died (" in driver.said
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    calm = train(tiny(*ENDLESS, *LONG), "calm", tmp_path / "calm").result
    assert found["theta_sha256"] == calm["theta_sha256"]
    assert found["steps_recomputed"] == 0


def test_what_can_never_be_is_refused(node: Callable[..., Any], start: Callable[..., Driver]) -> None:
    node(1, "one")
    for mark, words in (("two", "1 two each need 1, the cluster"), ("one", "1 one each need 2, the cluster")):
        driver = start(f"{mark}-refused", mark, f"cluster.workers={2 if mark == 'one' else 1}")
        assert driver.process.wait(60) == 4
        (told,) = driver.said.strip().splitlines()
        assert words in told or "1 CPU each need 2" in told
        assert "are valid" in told
