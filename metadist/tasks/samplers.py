"""The tasks that a config asks for."""

from collections.abc import Sequence
from typing import Protocol

import torch

from metadist.config import Config
from metadist.data.table import Table
from metadist.tasks.counter import Counter
from metadist.tasks.episode import Drawn, Episode
from metadist.tasks.few_shot import FewShot
from metadist.tasks.sinusoid import Sinusoid


class Sampler(Protocol):
    """Tasks by counter.

    shape: of one input; ways: classes of an episode, 1 where targets are numbers; classes:
    how many the split has, 0 where targets are numbers; families: names of what `Episode.family` counts.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ways(self) -> int: ...

    @property
    def classes(self) -> int: ...

    @property
    def families(self) -> Sequence[str]: ...

    def sample(self, step: Counter, first: Counter, tasks: int) -> Episode:
        """Tasks first … first+tasks−1 of a meta-step as one batch with a leading task axis."""
        ...

    def draw(self, step: Counter, first: Counter, tasks: int) -> Drawn:
        """What they are, small; step: also int64 [steps, 1], for those of several."""
        ...

    def show(self, drawn: Drawn) -> Episode:
        """What `sample` returns of them."""
        ...


def training_tasks(config: Config, tables: Sequence[Table], device: torch.device | str) -> Sampler:
    """The tasks of meta-training."""
    task, dtype = config.task, getattr(torch, config.engine.dtype)
    if config.kind == "regression":
        return Sinusoid("train", _or(task.seed, config.seed), task.shots, task.queries, dtype, device)
    return FewShot(
        tables,
        [source.weight for source in config.data.sources],
        "train",
        seed=_or(task.seed, config.seed),
        ways=task.ways,
        shots=task.shots,
        queries=task.queries,
        within_group=task.within_group,
        rotate=task.rotate,
        dtype=dtype,
        device=device,
    )


def evaluation_tasks(config: Config, tables: Sequence[Table], split: str, device: torch.device | str) -> Sampler:
    """The tasks of a validation or meta-test; what `eval` leaves open is the task's."""
    task, judged, dtype = config.task, config.eval, getattr(torch, config.engine.dtype)
    shots, queries = judged.shots or task.shots, judged.queries or task.queries
    if config.kind == "regression":
        return Sinusoid(split, _or(judged.seed, config.seed), shots, queries, dtype, device)
    return FewShot(
        tables,
        [source.weight for source in config.data.sources],
        split,
        seed=_or(judged.seed, config.seed),
        ways=judged.ways or task.ways,
        shots=shots,
        queries=queries,
        within_group=task.within_group,
        dtype=dtype,
        device=device,
        keys="eval" if (judged.ways or judged.shots or judged.queries) else "task",
    )


def _or(own: int | None, run: int) -> int:
    return run if own is None else own
