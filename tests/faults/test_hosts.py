"""Hosts of a lab: they come, are killed, lose their network and get it back, while the run goes on to the same bits."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from injuries import kill, longest_gap
from places import Driver, InLab, lab_of, seconds_computed

from metadist.config import Config, to_yaml
from metadist.run import resume, train
from metadist.runtime.checkpoint import checkpoints

pytestmark = [
    pytest.mark.own_cluster,
    pytest.mark.skipif(bool(lab_of.missing()), reason=f"needs root: {lab_of.missing()}"),
]

Make = Callable[..., Config]
ENDLESS = ("outer.steps=1000000", "checkpoint.every=50", "eval.every=0", "eval.test=false")


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[..., InLab]]:
    """Brings hosts up, each with one logical CPU; all of it is taken down behind the test."""
    labs: list[lab_of.Lab] = []

    def make(hosts: int, host: str = "host-0", **environment: str) -> InLab:
        labs.append(lab_of.up(tmp_path / "lab", hosts, 1, environment))
        return InLab(labs[-1], host)

    yield make
    for lab in labs:
        lab_of.down(lab)


@pytest.fixture
def start(tmp_path: Path, tiny: Make) -> Iterator[Callable[..., Driver]]:
    """Starts a run without an end on a lab."""
    drivers: list[Driver] = []

    def begin(place: InLab, *words: str) -> Driver:
        job = tmp_path / "endless.yaml"
        job.write_text(to_yaml(tiny(*ENDLESS, "cluster.workers={min: 1, max: 3}")))
        words = words or ("train", str(job), "--run-dir", str(tmp_path / "run"), f"cluster.address={place.address}")
        drivers.append(place.start(words, tmp_path / f"driver-{len(drivers)}.txt"))
        return drivers[-1]

    yield begin
    for driver in drivers:
        driver.end()


@pytest.fixture
def newest(tmp_path: Path) -> Callable[[], int]:
    """The step of the newest checkpoint."""
    return lambda: next((step for step, _ in checkpoints(tmp_path / "run" / "checkpoints")), 0)


def assert_calm_bits(driver: Driver, run: Path, newest: Callable[[], int], tiny: Make) -> None:
    """End the run where it is, and compare with one that nobody disturbed up to there."""
    driver.signal(signal.SIGTERM)
    assert driver.process.wait(60) == 143, driver.said
    assert "Traceback" not in driver.said
    steps = newest()
    found = resume(run, ["cluster.workers=0", f"outer.steps={steps}"]).result
    calm = train(tiny(*ENDLESS, f"outer.steps={steps}"), "calm", run.with_name("calm")).result
    assert found["theta_sha256"] == calm["theta_sha256"]
    assert found["meta_steps"] == steps
    print(f"{steps} steps")


@pytest.mark.chaos
def test_hosts_come_and_go(
    make_lab: Callable[..., InLab], start: Callable[..., Driver], newest: Callable[[], int], wait_until: Any,
    measured: Any, tiny: Make, tmp_path: Path,
) -> None:  # fmt: skip
    """1 → 3 workers as hosts join; one host is killed, another cut off and healed."""
    place, run = make_lab(1), tmp_path / "run"
    driver = start(place)

    def wait_for_line(words: str, times: int = 1) -> None:
        wait_until(lambda: driver.said.count(words) >= times or driver.process.poll() is not None, 90, words)
        assert driver.process.poll() is None, driver.said

    def goes_on() -> None:
        """Steps come in at every moment: some for each of the states that the run is in."""
        before = newest()
        wait_until(lambda: newest() > before or driver.process.poll() is not None, 90, "another checkpoint")
        assert driver.process.poll() is None, driver.said

    def while_paused(condition: Callable[[], Any], what: str) -> None:
        """Wait without steps: each one is computed a second time for the comparison."""
        driver.signal(signal.SIGSTOP)
        wait_until(condition, 90, what)
        driver.signal(signal.SIGCONT)

    def heal() -> None:
        before = set(place.on("host-1", "ray::Worker"))
        lab_of.heal(place.lab, "host-1")
        while_paused(lambda: set(place.on("host-1", "ray::Worker")) - before, "a worker on the healed host")
        wait_for_line("@host-1 joined", 2)
        (worker,) = place.on("host-1", "ray::Worker")
        started = seconds_computed(worker)
        wait_until(lambda: seconds_computed(worker) > started + 0.3, 30, "work for the healed host")

    goes_on()
    for name in ("host-1", "host-2"):
        lab_of.add(place.lab, name)
    while_paused(lambda: all(place.on(name, "ray::Worker") for name in ("host-1", "host-2")), "workers on both hosts")
    wait_for_line("3 workers now")
    goes_on()
    killed = time.time()
    lab_of.kill(place.lab, "host-2")
    wait_for_line("@host-2 died")
    goes_on()
    cut = time.time()
    lab_of.cut(place.lab, "host-1")
    wait_for_line("@host-1 died")
    goes_on()
    healed = time.time()
    heal()
    assert_calm_bits(driver, run, newest, tiny)
    # Half a second before the next deed: the gap that begins there is that one's, or a pause of this test.
    measured("host killed, one of three", longest_gap(run, killed, cut - 0.5))
    measured("network of a host cut, one of two", longest_gap(run, cut, healed - 0.5))


@pytest.mark.chaos
def test_the_head_of_the_cluster_killed(
    make_lab: Callable[..., InLab], start: Callable[..., Driver], newest: Callable[[], int], wait_until: Any,
    measured: Any, tiny: Make, tmp_path: Path,
) -> None:  # fmt: skip
    """With its state on a disk, Ray's head comes back as the same one; the run goes on, or is gone on with."""
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs")}
    place, run = make_lab(3, "host-1", **storage), tmp_path / "run"
    driver = start(place)
    wait_until(lambda: newest() >= 100 or driver.process.poll() is not None, 120, "steps")
    assert driver.process.poll() is None, driver.said
    (head,) = [pid for pid, line in lab_of.processes(place.lab, "host-0").items() if "gcs_server" in line.split()[0]]
    killed, before = time.time(), newest()
    kill(head)
    how = "the run went on"
    while newest() < before + 300:
        assert time.time() < killed + 200, driver.said
        time.sleep(0.1)
        if driver.process.poll() is not None:
            how = "the run was resumed"
            assert "Traceback" not in driver.said
            driver = start(place, "train", "--resume", str(run), f"cluster.address={place.address}")
    assert driver.process.poll() is None, driver.said
    assert_calm_bits(driver, run, newest, tiny)
    measured("head killed, its state on a disk", longest_gap(run, killed), how)
