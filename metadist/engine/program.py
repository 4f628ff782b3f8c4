"""One shard, from θ to its integer sums, as one program over buffers that stay (`engine.mode: graph`); so is judging.

Tasks are drawn on the device, those of some meta-steps at once, and shown from a data set in its memory; then the
inner loop, the queries' loss, the meta-gradient and the exact sum. Nothing in between asks the host anything. On a GPU
both parts are captured once as CUDA graphs, the second one replayed for every shard; on a CPU the same functions run
over the same buffers. What goes in is θ and a scale for every tensor; what comes out is copied to the host once.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from metadist.engine.exact import Part, Rounded, rounded, scales, tensor_of_each
from metadist.engine.layout import Layout
from metadist.spans import Spans
from metadist.tasks.episode import Drawn

WARM_UPS = 3
"""Runs before a capture, in which libraries allocate what they keep."""

AHEAD = 16
"""Meta-steps whose tasks are drawn at once: it takes as many kernels as for one."""

Draw = Callable[[Tensor, Tensor], Drawn]
"""Steps, int64 [steps, 1], and first task, an int64 scalar → the tasks of a shard in each, one behind the other."""

Sums = Callable[[Tensor, Drawn], dict[str, Tensor]]
"""Flat θ and state, and a shard's tasks → its sums by name."""

Judge = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""Flat θ and state, and the first of a shard's worth of evaluation tasks, an int64 scalar → score and loss of each."""

Outputs = TypeVar("Outputs")


class Program:
    """values: the layout of θ and state; sums: that of what a shard returns; parts: how many will be added; profiled: a
    GPU is waited for before the clock is read."""

    def __init__(
        self,
        draw: Draw,
        compute: Sums,
        values: Layout,
        sums: Layout,
        dtype: torch.dtype,
        device: torch.device,
        parts: int,
        spans: Spans,
        profiled: bool = False,
    ) -> None:
        self._compute, self._layout, self._parts = compute, sums, parts
        self._spans, self._profiled = spans, profiled
        self._values = torch.zeros(values.total, dtype=dtype, device=device)
        self._scales = torch.zeros(len(sums.names), dtype=torch.float64, device=device)
        self._tensor = tensor_of_each(sums).to(device)
        self._counted = torch.arange(AHEAD, device=device)[:, None]
        self._steps, self._first = self._counted.clone(), torch.zeros((), dtype=torch.int64, device=device)
        self._draw = Captured(lambda: draw(self._steps, self._first), device)
        self._run = Captured(self.outputs, device)
        self._ahead: dict[tuple[int, int], Drawn] = {}
        self._tasks: Drawn = {}
        self._taken: tuple[int, int] | None = None

    def __call__(self, values: np.ndarray, exponents: np.ndarray, step: int, first: int) -> Part:
        """The integer sums of the tasks from `first` on, at flat θ and state."""
        with self._spans.of("transfer"):
            _send(values, self._values)
            _send(scales(exponents).numpy(), self._scales)
        with self._spans.of("sampling"):
            self.take(step, first)
        outputs = self._run()
        if self._parts == 1:  # no other shard comes between: the next one's tasks, while a GPU computes
            with self._spans.of("sampling"):
                self.take(step + 1, first)
        if self._profiled and self._values.device.type == "cuda":
            torch.cuda.synchronize()  # else its time would be that of the transfer, which waits for it
        with self._spans.of("transfer"):
            return outputs.part(self._layout, self._parts)

    def take(self, step: int, first: int) -> None:
        """Have a step's tasks, from `first` on, where a shard reads them."""
        if (step, first) == self._taken:
            return
        block, place = divmod(step, AHEAD)
        if (block, first) not in self._ahead:
            self._steps.copy_(self._counted + AHEAD * block)
            self._first.fill_(first)
            drawn = {name: value.clone().view(AHEAD, -1, *value.shape[1:]) for name, value in self._draw().items()}
            self._ahead = {at: kept for at, kept in self._ahead.items() if at[0] == block} | {(block, first): drawn}
        self._taken = None  # until all of it is there
        for name, each in self._ahead[block, first].items():
            if name in self._tasks:
                self._tasks[name].copy_(each[place])
            else:
                self._tasks[name] = each[place].clone()
        self._taken = step, first

    def outputs(self) -> Rounded:
        """Of the tasks that were taken."""
        return rounded(self._layout, self._compute(self._values, self._tasks), self._scales[self._tensor])


class Judging:
    """values: the layout of θ and state."""

    def __init__(self, judge: Judge, values: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self._values = torch.zeros(values.total, dtype=dtype, device=device)
        self._first = torch.zeros((), dtype=torch.int64, device=device)
        self._run = Captured(lambda: judge(self._values, self._first), device)

    def __call__(self, values: np.ndarray, first: int) -> dict[str, Tensor]:
        """Of the tasks from `first` on, at flat θ and state; good until the next call."""
        _send(values, self._values)
        self._first.fill_(first)
        return self._run()


class Captured(Generic[Outputs]):
    """A function of buffers that stay: on a GPU captured at its first call, and its outputs stay as well."""

    def __init__(self, function: Callable[[], Outputs], device: torch.device) -> None:
        self._function, self._device = function, device
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Outputs:
        if self._device.type != "cuda":
            return self._function()
        if self._graph is None:
            self._graph, self._outputs = self._captured()
        self._graph.replay()
        return self._outputs

    def _captured(self) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._function()
        torch.cuda.current_stream().wait_stream(aside)
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                outputs = self._function()
        except BaseException:
            torch.cuda.set_stream(before)  # where a capture fails, torch leaves its own
            raise
        return graph, outputs


def _send(values: np.ndarray, there: Tensor) -> None:
    """By way of memory that a GPU reads by itself, without waiting for it. `values` may be written over afterwards."""
    here = torch.empty(there.shape, dtype=there.dtype, pin_memory=there.device.type == "cuda")
    here.numpy()[:] = values
    there.copy_(here, non_blocking=True)
