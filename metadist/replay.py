"""An asynchronous run again, in one process, from the ledger of what went into each outer step."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from metadist.config import load
from metadist.engine.fingerprint import data_fingerprint, differences
from metadist.engine.layout import sha256
from metadist.errors import RunError
from metadist.run import checked_tables
from metadist.runtime.aggregator import Aggregator, Broadcast
from metadist.runtime.checkpoint import newest_good
from metadist.runtime.ledger import broken_rule, from_array, mean_of, staleness
from metadist.runtime.worker import Worker

TOLD = 10.0
"""Seconds between two lines about how far it is."""


class Replayed(NamedTuple):
    """What came out, and what the run had."""

    steps: int
    gradients: int
    mean: float
    max: float
    found: str
    expected: str

    @property
    def equal(self) -> bool:
        return self.found == self.expected

    def line(self, run_dir: Path) -> str:
        """For a person."""
        told = (
            f"{run_dir}: {self.steps} outer steps from {self.gradients} gradients, {self.mean:.2f} steps late on "
            f"average, {self.max:g} at most; θ {self.found[:16]}"
        )
        return f"{told}, the run's bits" if self.equal else f"{told} instead of the run's {self.expected[:16]}"


def replay(run_dir: Path, say: Callable[[str], None]) -> Replayed:
    """Take every outer step up to the newest checkpoint again. Raises RunError where there is nothing to replay."""
    if not (run_dir / "config.yaml").is_file():
        raise RunError(f"{run_dir}: is no run folder, it has no config.yaml")
    config = load(run_dir / "config.yaml")
    if config.cluster.strategy != "async":
        raise RunError(
            f"{run_dir}: ran with cluster.strategy={config.cluster.strategy}, which needs no ledger; the same config "
            f"gives the same bits"
        )
    checkpoint = newest_good(run_dir / "checkpoints", say)
    if checkpoint is None or checkpoint[0].ledger is None:
        raise RunError(f"{run_dir}: has no usable checkpoint with a ledger")
    kept, _, record = checkpoint
    assert kept.ledger is not None
    entries, per_step = from_array(kept.ledger), config.task.meta_batch // config.shard
    broken = broken_rule(entries, per_step, config.cluster.bound)
    if broken or len(entries) != kept.step * per_step:
        raise RunError(f"{run_dir}: the ledger of step {kept.step} is none of this run: {broken or 'it has gaps'}")
    tables = checked_tables(config, say)
    then: dict[str, str] = record.get("fingerprint", {})
    if then.get("data") != data_fingerprint(tables):
        raise RunError(f"{run_dir}: the data are not those of the run")
    worker = Worker(config, [str(table.path) for table in tables])
    introduction = worker.introduce()
    told = differences(then, introduction.fingerprint | {"probe": introduction.probe})
    if told:
        say(f"warning: this process has {told}; other bits are to be expected")
    tasks = worker.engine.tasks
    parameters = Aggregator(config, tasks.shape, None, tasks.classes)
    versions: dict[int, Broadcast] = {}
    due = time.monotonic() + TOLD
    for step in range(kept.step):
        versions[step] = parameters.broadcast()
        versions.pop(step - config.cluster.bound - 1, None)
        taken = entries[step * per_step : (step + 1) * per_step]
        sums = [worker.sums(versions[entry.version], *divmod(entry.number, per_step)).sums for entry in taken]
        parameters.move(mean_of(sums, config.task.meta_batch))
        if time.monotonic() > due:
            due = time.monotonic() + TOLD
            say(f"step {step + 1}/{kept.step}")
    late = staleness(kept.ledger)
    return Replayed(
        kept.step,
        len(entries),
        late["mean"],
        late["max"],
        _hash(parameters.snapshot().values),
        _hash(kept.values),
    )


def _hash(values: dict[str, np.ndarray]) -> str:
    return sha256({name: torch.from_numpy(np.array(value)) for name, value in values.items()})
