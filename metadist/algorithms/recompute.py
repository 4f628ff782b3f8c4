"""Inner steps whose graphs are not kept but built again, a segment at a time (`algorithm.recompute`).

The meta-gradient of second order needs every inner step's graph. Here K steps are taken in
segments of ⌈√K⌉ (Chen, Xu, Zhang & Guestrin 2016); only φ in front of each is kept, and while the
meta-gradient goes backwards through a segment, its steps are taken once more. So the graphs of
√K steps are there at a time, for at most one further forward pass of each step. The last segment,
which the meta-gradient enters at once, is not taken twice. (Where a network has its products in closed form, MAML does
the same with what these keep instead of graphs: `maml.py`.)

`torch.utils.checkpoint` does not go through `vmap`; a function of its own does, since it says
itself what it is with a task axis: the same, of the function with a task axis.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from metadist.algorithms.descent import Rates, SupportLoss, descend
from metadist.models.network import Params
from metadist.tasks.episode import Examples


def segment(steps: int) -> int:
    """⌈√steps⌉, at least 1."""
    return math.isqrt(max(0, steps - 1)) + 1


def descend_in_segments(
    loss: Callable[[Examples], SupportLoss], support: Examples, params: Params, rates: Rates, steps: int
) -> Params:
    """φ after some steps of second order with the same rates, for √steps of the memory.

    loss: of a support set; it closes over no tensor that differs from task to task.
    """
    size = segment(steps)
    while steps > size:
        params = {**params, **_segment(loss, support, params, rates, size)}
        steps -= size
    return descend(loss(support), params, rates, steps, order=2)


def _segment(
    loss: Callable[[Examples], SupportLoss], support: Examples, params: Params, rates: Rates, steps: int
) -> Params:
    """What has moved after some steps, without their graphs."""
    leaves, shape = tree_flatten((support, dict(params), dict(rates)))

    def moved(*leaves: Any) -> tuple[Tensor, ...]:
        support, params, rates = tree_unflatten(leaves, shape)
        after = descend(loss(support), params, rates, steps, order=2)
        return tuple(after[name] for name in rates)

    return dict(zip(rates, _Recomputed.apply(moved, *leaves), strict=True))


class _Recomputed(torch.autograd.Function):
    """function(leaves) → tensors, differentiable once; function closes over no tensor that is differentiated."""

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *leaves: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return function(*leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, *leaves = inputs
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *towards: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved, needed = iter(ctx.saved_tensors), ctx.needs_input_grad[1:]
        leaves = [next(saved).detach() if other is None else other for other in ctx.others]
        wanted = [leaf.requires_grad_() for leaf, need in zip(leaves, needed, strict=True) if need]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.function(*leaves), wanted, towards, allow_unused=True))
        return None, *(next(found) if need else None for need in needed)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], function: Callable[..., tuple[Tensor, ...]], *leaves: Any
    ) -> tuple[tuple[Tensor, ...], int]:
        return _Recomputed.apply(vmap(function, in_dims[1:]), *leaves), 0


# torch looks the signature up at every call; found here, it is not put together anew each time.
_Recomputed.forward.__signature__ = inspect.signature(_Recomputed.forward)  # type: ignore[attr-defined]
