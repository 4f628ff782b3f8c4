"""One shard, from θ to its integer sums, as one program over buffers that stay (`engine.mode: graph`).

Tasks are sampled on the device, from a data set in its memory and with the meta-step and the shard as tensors; then
the inner loop, the queries' loss, the meta-gradient and the exact sum. Nothing in between asks the host anything. On
a GPU the program is captured once as a CUDA graph and replayed for every shard; on a CPU the same function runs over
the same buffers. What goes in is θ, a scale for every tensor and two numbers; what comes out is copied to the host
once.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from metadist.engine.exact import Part, Rounded, rounded, scales, tensor_of_each
from metadist.engine.layout import Layout
from metadist.spans import Spans

WARM_UPS = 3
"""Runs before a capture, in which libraries allocate what they keep."""

Sums = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""Flat θ and state, step and first task, int64 scalars, → a shard's sums by name."""


class Program:
    """values: the layout of θ and state; sums: that of what a shard returns; parts: how many will be added; profiled: a
    GPU is waited for before the clock is read."""

    def __init__(
        self,
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
        self._step, self._first = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Rounded | None = None

    def __call__(self, values: np.ndarray, exponents: np.ndarray, step: int, first: int) -> Part:
        """The integer sums of the tasks from `first` on, at flat θ and state."""
        with self._spans.of("transfer"):
            self._values.copy_(_staged(values, self._values), non_blocking=True)
            self._scales.copy_(scales(exponents))
            self._step.fill_(step)
            self._first.fill_(first)
        if self._values.device.type == "cuda":
            outputs = self._outputs or self._captured()
            assert self._graph is not None
            self._graph.replay()
            if self._profiled:
                torch.cuda.synchronize()  # else its time would be that of the transfer, which waits for it
        else:
            outputs = self._run()
        with self._spans.of("transfer"):
            return outputs.part(self._layout, self._parts)

    def _run(self) -> Rounded:
        sums = self._compute(self._values, self._step, self._first)
        return rounded(self._layout, sums, self._scales[self._tensor])

    def _captured(self) -> Rounded:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._run()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = self._run()
        return self._outputs


def _staged(values: np.ndarray, there: Tensor) -> Tensor:
    """On their way there: where a GPU reads by itself. `values` may be written over afterwards."""
    here = torch.empty(there.shape, dtype=there.dtype, pin_memory=there.device.type == "cuda")
    here.numpy()[:] = values
    return here
