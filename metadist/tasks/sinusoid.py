"""Sinusoid regression, sampled by counter (Finn, Abbeel & Levine 2017, §5.1).

A task is y = A sin(x − φ) with A uniform in [0.1, 5] and φ uniform in [0, π]; inputs are
uniform in [−5, 5]. Which quarter φ lies in is the task's family.
"""

import math

import torch
from torch import Tensor

from metadist.tasks.counter import Counter, below, key
from metadist.tasks.episode import Drawn, Episode, Examples
from metadist.tasks.few_shot import SPLITS, key_of

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
INPUT = (-5.0, 5.0)
FAMILIES = 4

_AMPLITUDE, _PHASE, _INPUT = range(3)
_FINE = 2**30


class Sinusoid:
    """shots, queries: points of the support and of the query set."""

    ways = 1
    shape = (1,)
    classes = 0
    families = tuple(f"phase {quarter}/4 to {quarter + 1}/4 of π" for quarter in range(FAMILIES))

    def __init__(
        self,
        split: str,
        seed: int,
        shots: int,
        queries: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.split, self.seed, self.shots, self.queries = split, seed, shots, queries
        self.dtype, self.device = dtype, torch.device(device)

    def curves(self, step: Counter, first: Counter, tasks: int) -> tuple[Tensor, Tensor]:
        """Amplitudes and phases, float64 [tasks]."""
        task = self._keys(step, first, tasks)
        return (
            _uniform(below(key_of(task, _AMPLITUDE), 0, _FINE), AMPLITUDE),
            _uniform(below(key_of(task, _PHASE), 0, _FINE), PHASE),
        )

    def sample(self, step: Counter, first: Counter, tasks: int) -> Episode:
        """Tasks first … first+tasks−1 of a meta-step; support.x and support.y: [tasks, shots, 1], query likewise."""
        return self.show(self.draw(step, first, tasks))

    def draw(self, step: Counter, first: Counter, tasks: int) -> Drawn:
        """Their amplitudes and phases, float64 [tasks], and inputs, [tasks, shots + queries]; step, first: as in
        `FewShot.draw`."""
        amplitude, phase = self.curves(step, first, tasks)
        number = torch.arange(self.shots + self.queries, device=self.device)
        x = _uniform(below(key_of(self._keys(step, first, tasks), _INPUT)[:, None], number, _FINE), INPUT)
        return {"amplitude": amplitude, "phase": phase, "x": x}

    def show(self, drawn: Drawn) -> Episode:
        """The tasks that were drawn."""
        amplitude, phase, x = drawn["amplitude"], drawn["phase"], drawn["x"]
        y = amplitude[:, None] * torch.sin(x - phase[:, None])
        x, y = x[..., None].to(self.dtype), y[..., None].to(self.dtype)
        family = (phase * (FAMILIES / math.pi)).long().clamp(max=FAMILIES - 1)
        cut = self.shots
        return Episode(
            Examples(x[:, :cut], y[:, :cut]),
            Examples(x[:, cut:], y[:, cut:]),
            torch.zeros(len(x), 1, dtype=torch.int64, device=self.device),
            family,
        )

    def _keys(self, step: Counter, first: Counter, tasks: int) -> Tensor:
        number = first + torch.arange(tasks, device=self.device)
        return key(self.seed, SPLITS[self.split], step, number, device=self.device).flatten()


def _uniform(draw: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Integers in [0, 2^30) as float64 in the middle of as many cells of [low, high]."""
    low, high = bounds
    return low + (high - low) * ((draw.double() + 0.5) / _FINE)
