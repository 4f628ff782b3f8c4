"""Strategies on hosts of a lab: one that joins, is killed or cut off; aggregators that are killed, and then outlive."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from injuries import kill, longest_gap
from places import Driver, InLab, lab_of

from metadist.config import Config, to_yaml
from metadist.run import train
from metadist.runtime.checkpoint import checkpoints
from metadist.runtime.journal import read_metrics

pytestmark = [
    pytest.mark.own_cluster,
    pytest.mark.chaos,
    pytest.mark.skipif(bool(lab_of.missing()), reason=f"needs root: {lab_of.missing()}"),
]

Make = Callable[..., Config]
STEPS = 600
JOB = (f"outer.steps={STEPS}", "checkpoint.every=50", "eval.every=0", "eval.test=false")
HOSTS = ("host-0", "host-1", "host-2")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab_of.Lab]:
    """Two hosts, each with one logical CPU."""
    lab = lab_of.up(tmp_path_factory.mktemp("lab"), 2, 1)
    yield lab
    lab_of.down(lab)


@pytest.fixture
def three_hosts(lab: lab_of.Lab) -> InLab:
    """The third one too, and those that the test before took down or cut off."""
    for name in HOSTS:
        if name not in lab.hosts or not lab_of.alive(lab.hosts[name].pid):
            lab_of.add(lab, name)
    lab_of.wait_for(lab, len(HOSTS))
    return InLab(lab)


@pytest.fixture(scope="module")
def calm_hash(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    """θ of the run in one process."""
    return train(tiny(*JOB), "calm", tmp_path_factory.mktemp("calm") / "run").result["theta_sha256"]


class Run:
    """A run in the lab, and the processes that drove it."""

    def __init__(self, place: InLab, job: Path, folder: Path) -> None:
        self.place, self.job, self.folder = place, job, folder
        self.drivers: list[Driver] = []

    @property
    def said(self) -> str:
        return self.drivers[-1].said

    def start(self, *overrides: str) -> None:
        """Begin, or go on where there is something."""
        first = ["train", "--resume", self.folder] if self.drivers else ["train", self.job, "--run-dir", self.folder]
        words = [*first, f"cluster.address={self.place.address}", *overrides]
        self.drivers.append(self.place.start(words, self.folder.with_name(f"driver-{len(self.drivers)}.txt")))

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 90) -> None:
        """Until a condition holds, while the driver lives."""
        until = time.monotonic() + seconds
        while not condition():
            assert self.drivers[-1].process.poll() is None, f"{what} did not come before the end: {self.said}"
            assert time.monotonic() < until, f"{what} did not come within {seconds:g} s: {self.said}"
            time.sleep(0.02)

    def another_checkpoint(self) -> None:
        before = self._newest()
        self.wait(lambda: self._newest() > before, "another checkpoint")

    def result(self) -> dict[str, Any]:
        """Of a run that comes to its end by itself, with a row for every step."""
        assert self.drivers[-1].process.wait(180) == 0, self.said
        assert "Traceback" not in self.said
        assert [row["step"] for row in read_metrics(self.folder / "metrics.parquet")] == list(range(1, STEPS + 1))
        return json.loads((self.folder / "result.json").read_text())

    def _newest(self) -> int:
        return next((step for step, _ in checkpoints(self.folder / "checkpoints")), 0)


@pytest.fixture
def run_of(tiny: Make, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run in the lab."""
    runs: list[Run] = []

    def begin(place: InLab, *overrides: str) -> Run:
        job = tmp_path / "job.yaml"
        job.write_text(to_yaml(tiny(*JOB, "cluster.workers=2")))
        runs.append(Run(place, job, tmp_path / "run"))
        runs[-1].start(*overrides)
        return runs[-1]

    yield begin
    for run in runs:
        for driver in run.drivers:
            driver.end()


def on_two_hosts(place: InLab, name: str) -> str:
    """Where processes are, one each on two of the hosts; returns the one that is not the driver's."""
    held = {host: len(place.on(host, name)) for host in place.up()}
    assert sorted(count for count in held.values() if count) == [1, 1], held
    return max(host for host, count in held.items() if count)


def test_a_host_that_joins_takes_part(lab: lab_of.Lab, run_of: Callable[..., Run], calm_hash: str) -> None:
    """2 → 3 workers; the driver is paused until the new one is there, so that there are steps left for it."""
    if "host-2" in lab.hosts and lab_of.alive(lab.hosts["host-2"].pid):
        lab_of.kill(lab, "host-2")
    place = InLab(lab)
    run = run_of(place, "cluster.workers={min: 1, max: 3}")
    run.another_checkpoint()
    run.drivers[-1].signal(signal.SIGSTOP)
    try:
        lab_of.add(lab, "host-2")
        run.wait(lambda: place.on("host-2", "ray::Worker"), "a worker on the new host")
    finally:
        run.drivers[-1].signal(signal.SIGCONT)
    result = run.result()
    assert "@host-2 joined; 3 workers now" in run.said
    assert result["theta_sha256"] == calm_hash
    assert result["steps_recomputed"] == 0
    shards = {called.partition("@")[2]: count for called, count in result["shards_by_worker"].items()}
    assert set(shards) == {"", "host-1", "host-2"}, "the first is the driver's own host"
    assert min(shards.values()) > 0
    assert sum(shards.values()) == STEPS * 4


def test_allreduce_over_two_hosts_one_of_which_is_killed(
    three_hosts: InLab, run_of: Callable[..., Run], calm_hash: str, measured: Any
) -> None:
    """The ranks of the first checkpoint are on two hosts; those that go on from it again."""
    run = run_of(three_hosts, "cluster.strategy=allreduce", "cluster.placement=spread")
    run.another_checkpoint()
    victim, killed = on_two_hosts(three_hosts, "ray::RayTrainWorker"), time.time()
    lab_of.kill(three_hosts.lab, victim)
    run.another_checkpoint()
    assert on_two_hosts(three_hosts, "ray::RayTrainWorker") != victim
    result = run.result()
    assert "was lost" in run.said
    assert result["theta_sha256"] == calm_hash
    assert result["reproducible"] is True
    assert 0 <= result["steps_recomputed"] <= 50, "none where it was killed at the checkpoint"
    measured("host of an allreduce rank killed", longest_gap(run.folder, killed), "a new group starts")


def test_async_over_two_hosts_one_of_which_is_cut_off(
    three_hosts: InLab, run_of: Callable[..., Run], measured: Any, cli: Any
) -> None:
    """It ends, and its ledger gives the same bits again."""
    run = run_of(three_hosts, "cluster.strategy=async", "cluster.placement=spread")
    run.another_checkpoint()
    victim, cut = on_two_hosts(three_hosts, "ray::Worker"), time.time()
    lab_of.cut(three_hosts.lab, victim)
    try:
        result = run.result()
    finally:
        lab_of.heal(three_hosts.lab, victim)
    assert f"@{victim} died" in run.said
    assert result["reproducible"] is False
    assert result["steps_recomputed"] == 0
    assert result["staleness"]["max"] <= result["staleness"]["bound"]
    measured("network of a host cut, async", longest_gap(run.folder, cut))
    ended = cli("replay", run.folder)
    assert ended.code == 0, ended
    assert f"θ {result['theta_sha256'][:16]}, the run's bits" in ended.out


def test_an_aggregator_and_then_the_driver_killed(
    three_hosts: InLab, run_of: Callable[..., Run], calm_hash: str, wait_until: Any, measured: Any
) -> None:
    """One of two aggregators is replaced with the other one; they outlive the driver, go on with the next one, and
    end when nobody comes; what is left is a checkpoint."""
    aggregators = lambda: three_hosts.find(run.drivers[-1], "ray::Aggregator")  # noqa: E731
    run = run_of(three_hosts, "cluster.aggregators=2", "cluster.linger=100")
    run.another_checkpoint()
    first, killed = aggregators(), time.time()
    assert len(first) == 2
    kill(first[0])
    run.wait(lambda: "the aggregator was lost" in run.said, "the word of the loss")
    run.another_checkpoint()
    second = aggregators()
    assert len(second) == 2
    assert not set(first) & set(second)

    time.sleep(0.7)  # some steps beyond the checkpoint: at it there would be nothing to outlive for
    run.drivers[-1].signal(signal.SIGKILL)
    assert run.drivers[-1].process.wait(20) != 0
    died = time.time()
    run.start("cluster.linger=3")
    run.wait(lambda: "the aggregator outlived its driver; going on from step" in run.said, "the next driver")
    assert aggregators() == second
    run.another_checkpoint()

    run.drivers[-1].signal(signal.SIGKILL)
    assert run.drivers[-1].process.wait(20) != 0
    alone = time.time()
    assert aggregators() == second
    wait_until(lambda: not aggregators(), 30, "the end of the aggregators that nobody asks for")
    lingered = time.time() - alone
    assert lingered < 3 + 5

    run.start()
    result = run.result()
    assert "outlived" not in run.said
    assert result["theta_sha256"] == calm_hash
    assert 0 < result["steps_recomputed"] <= 2 * 50, "the outlived driver cost none"
    measured("one aggregator of two killed, on hosts", longest_gap(run.folder, killed, died))
    print(f"the aggregators ended {lingered:.1f} s after their driver, with cluster.linger=3")
