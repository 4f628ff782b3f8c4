"""A real Prometheus watches a run on a Ray head with metrics, sees its workers stand still and its driver die."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from metadist.runtime.metrics import METRICS

pytestmark = [pytest.mark.own_cluster, pytest.mark.chaos]

SOONER = {"> 600": "> 4", "< 60": "< 6", "> 60": "> 6"}
"""Thresholds of the rules for a test, in seconds; scrapes and evaluations are every second, and Ray's exports too."""


class Watched(NamedTuple):
    """A Ray head and a Prometheus that scrapes it."""

    address: str
    pid: int
    url: str

    def ask(self, query: str) -> dict[tuple[str, ...], float]:
        """Values of an instant query by their labels' values, those of `run` left out."""
        words = urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{words}", timeout=10) as answer:
            found = json.load(answer)["data"]["result"]
        return {tuple(v for k, v in one["metric"].items() if k != "run"): float(one["value"][1]) for one in found}

    def value(self, name: str) -> float | None:
        """The newest value of a metric that one run tells, of its newest process."""
        return self.ask(f"max by (run) (ray_metadist_{name})").get(())

    def fires(self, alert: str) -> bool:
        return bool(self.ask(f'ALERTS{{alertname="{alert}",alertstate="firing"}}'))


@contextlib.contextmanager
def started(command: list[str], log: Path, end: Callable[[Any], None]) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        end(process)


@pytest.fixture
def watched(
    prometheus: str, infra: Path, free_port: Callable[[], int], wait_until: Any, end_process: Any, tmp_path: Path
) -> Iterator[Watched]:
    """Both on loopback, the rules of `infra` with shorter times, the scrapes by Ray's own file of its nodes."""
    folder = Path(tempfile.mkdtemp(prefix="mdray"))  # short: Ray makes sockets in it
    ray, listen = free_port(), free_port()
    head = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={ray}",
        "--node-ip-address=127.0.0.1", "--num-cpus=2", f"--dashboard-port={free_port()}",
        f"--metrics-export-port={free_port()}", f"--object-store-memory={256 * 2**20}", f"--temp-dir={folder}",
        "--disable-usage-stats", '--system-config={"metrics_report_interval_ms": 1000}',
    ]  # fmt: skip
    config = yaml.safe_load((infra / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    (scrape,) = config["scrape_configs"]
    scrape["file_sd_configs"] = [{"files": [f"{folder}/prom_metrics_service_discovery.json"], "refresh_interval": "1s"}]
    rules = (infra / "prometheus" / "rules.yml").read_text()
    for before, after in SOONER.items():
        assert before in rules
        rules = rules.replace(before, after)
    (tmp_path / "rules.yml").write_text(rules)
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    server = [
        prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb",
        f"--web.listen-address=127.0.0.1:{listen}",
    ]  # fmt: skip
    try:
        with (
            started(head, folder / "head.txt", end_process) as cluster,
            started(server, tmp_path / "server.txt", end_process),
        ):
            wait_until(lambda: "Ray runtime started" in (folder / "head.txt").read_text(), 90, "the head")
            yield Watched(f"127.0.0.1:{ray}", cluster.pid, f"http://127.0.0.1:{listen}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_run_is_seen_and_missed(
    watched: Watched, start_cli: Any, tiny_job: Path, tmp_path: Path, wait_until: Any, find_processes: Any
) -> None:
    words = ("outer.steps=100000", "checkpoint.every=50", "eval.every=100", "cluster.workers=2", "cluster.backup=null")
    began = time.time()
    driver = start_cli(
        "train", tiny_job, *words, f"cluster.address={watched.address}", "--run-dir", tmp_path / "run", joins=True
    )
    wait_until(lambda: (watched.value("step") or 0) > 100 or driver.poll() is not None, 90, "a hundred meta-steps")
    assert driver.poll() is None, driver.said

    # Everything that the code defines is there, but what only async has, and what has not come to pass.
    wait_until(lambda: watched.value("validation_score") is not None, 30, "a validation")
    names = watched.ask('count by (__name__) ({__name__=~"ray_metadist_.*"})')
    there = {name.removeprefix("ray_").removesuffix("_total") for (name,) in names}
    absent = {"staleness", "ended_timestamp_seconds", "shards_recomputed", "duplicates_dropped"}
    assert there == METRICS.keys() - {f"metadist_{name}" for name in absent}
    (run,) = watched.ask("count by (run, name) (label_replace(ray_metadist_step, 'name', '$1', 'run', '(.*)'))")
    assert run[0].startswith("run-")

    assert watched.value("steps_planned") == 100_000
    assert watched.value("workers") == 2
    assert 0 < (watched.value("loss") or 0) < 10
    assert 0 <= (watched.value("validation_score") or -1) <= 1
    assert (watched.value("tasks_per_second") or 0) > 0
    for name in ("alive", "step", "checkpoint"):
        assert began <= (watched.value(f"{name}_timestamp_seconds") or 0) <= time.time()
    ratio = "sum(ray_metadist_shards_total) / sum(ray_metadist_steps_total)"
    assert watched.ask(ratio)[()] == pytest.approx(4, rel=0.2), "four shards a meta-step"
    phases = watched.ask("sum by (phase) (ray_metadist_phase_seconds_total)")
    assert phases[("adapting",)] > 0
    assert 0 < sum(phases.values()) <= time.time() - began
    for alert in ("MetadistNoStep", "MetadistGone", "MetadistCheckpointOld", "MetadistNotFinite", "MetadistFailed"):
        assert not watched.fires(alert), alert

    # The workers stand still: the driver lives, and takes no step.
    workers = find_processes(watched.pid, "ray::Worker")
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: watched.fires("MetadistNoStep"), 40, "the alert that no step is taken")
    assert not watched.fires("MetadistGone")
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not watched.fires("MetadistNoStep"), 40, "its end")

    # The driver dies, and cannot say so.
    driver.kill()
    wait_until(lambda: watched.fires("MetadistGone"), 40, "the alert that the run is gone")

    # It is resumed, and ends in order.
    again = start_cli("train", "--resume", tmp_path / "run", joins=True)
    wait_until(lambda: not watched.fires("MetadistGone"), 60, "the end of that alert")
    again.send_signal(signal.SIGTERM)
    assert again.wait(60) == 143, again.said
    stopped = "max by (run, how) (ray_metadist_ended_timestamp_seconds)"
    wait_until(lambda: ("stopped",) in watched.ask(stopped), 20, "the run's last word")
    time.sleep(8)  # longer than the silence after which it would be missed
    assert not watched.fires("MetadistGone")
    assert not watched.fires("MetadistFailed")
