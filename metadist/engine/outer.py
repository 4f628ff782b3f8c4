"""The outer step: unscale, clip, optimizer, schedule; one function, whatever runs around it.

What it descends is a mean over tasks or replicas: of meta-gradients, or of differences θ − φ
(Reptile's tasks, DiLoCo's replicas). It makes no difference between them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from metadist.config import Optimizer
from metadist.engine.cores import on_cores
from metadist.engine.device import one_thread
from metadist.engine.exact import Block
from metadist.engine.layout import BLOCK, Layout, Run

STATE_MOMENTUM = 0.1
"""Weight of a meta-step's mean in the running state, as in torch's batch norm."""

Item = TypeVar("Item")
Done = TypeVar("Done")

Gradient = Callable[[Run, slice], Tensor]
"""A run of θ and a block of it → that block of a mean gradient, float64, good until this thread's next call."""

ROUND = 64
"""θ is padded to a multiple of so many elements, one of the widest vectors': torch's fused kernels round what is left
over of a block otherwise than what they take in vectors."""

GROUP = 4
"""Blocks of an optimizer: what was moved by it is still in the processor's cache."""


def learning_rate(outer: Optimizer, step: int) -> float:
    """The rate of meta-step `step` (from 0): a pure function, so that a resumed run needs no scheduler's memory."""
    if step < outer.warmup:
        return outer.lr * (step + 1) / outer.warmup
    if outer.schedule == "halving":
        assert outer.halve_every is not None
        return outer.lr * 0.5 ** (step // outer.halve_every)
    progress = (step - outer.warmup) / max(1, outer.steps - outer.warmup)
    if outer.schedule == "cosine":
        return outer.final_lr + (outer.lr - outer.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    if outer.schedule == "linear":
        return outer.lr + (outer.final_lr - outer.lr) * progress
    return outer.lr


def norm_of(squares: Iterable[float]) -> float:
    """From the squared norms of all tensors, in name order."""
    return math.sqrt(sum(squares))


class OuterStep:
    """θ with its torch.optim optimizer, on all of θ as one flat buffer in name order.

    The optimizer's parameters are blocks of that buffer. What it does is done to each element by itself, so that blocks
    change no bit.

    outer: its keys; with `steps` of them the schedule is at its end. at: those in force in a meta-step, of which rate,
    clip and weight decay are read. theta: by name, views, which the next step moves. spread: the work over all cores.
    """

    def __init__(
        self,
        outer: Optimizer,
        theta: Mapping[str, Tensor],
        at: Callable[[int], Optimizer] | None = None,
        spread: bool = True,
    ) -> None:
        self._spread = spread
        self.at, self.layout = at or (lambda step: outer), Layout.of(theta)
        flat = self.layout.flatten(theta).detach()
        self._on_cpu = flat.device.type == "cpu"
        padded, self._gradient = self._zeros(flat), self._zeros(flat)
        self.flat = padded[: len(flat)]
        self.flat.copy_(flat)
        self.theta = self.layout.split(self.flat)
        self._squares = Block(len(flat), np.float64)
        self._together = False
        # A GPU has no cache to speak of, and pays for every call.
        self._block = BLOCK if self._on_cpu else max(1, len(padded))
        self._blocks = [block.requires_grad_() for block in torch.split(padded, self._block)]
        for block, gradient in zip(self._blocks, torch.split(self._gradient, self._block), strict=True):
            block.grad = gradient
        self._pieces = [(run, block) for run in self.layout.runs for block in run.blocks()]
        together = GROUP if self._on_cpu else 1
        groups = [self._blocks[first : first + together] for first in range(0, len(self._blocks), together)]
        size = together * self._block
        self._groups = [
            (_optimizer(outer, group), slice(size * number, size * (number + 1))) for number, group in enumerate(groups)
        ]

    def step(self, gradient: Mapping[str, Tensor], step: int) -> float:
        """Move θ by one mean meta-gradient (float64, by name); returns the gradient's norm before clipping."""
        flat = self.layout.flatten(gradient).detach()

        def block_of(run: Run, block: slice) -> Tensor:
            return flat[block]

        norm = norm_of(self.take(block_of))
        self.move(block_of, step, norm)
        return norm

    def take(self, gradient: Gradient) -> list[float]:
        """Read a mean gradient, once; returns the squared norm of every tensor, in name order."""

        def taken(block: tuple[Run, slice]) -> list[Tensor]:
            values = gradient(*block)
            self._gradient[block[1]].copy_(values)
            if self._on_cpu:
                squared = torch.square(values, out=torch.from_numpy(self._squares.array[: len(values)]))
            else:
                squared = values.square()
            return [squared[part].sum() for part in block[0].parts]

        # A block is one sum, whose order is torch's for its size; those of a large tensor are added up exactly.
        found = [one for some in self._each(self._pieces, taken) for one in some]
        sums = iter(torch.stack(found).tolist() if found else [])  # a GPU is waited for once
        parts: list[list[float]] = [[] for _ in self.layout.names]
        for run, _ in self._pieces:
            for index in run.tensors:
                parts[index].append(next(sums))
        return [math.fsum(each) for each in parts]

    def move(self, gradient: Gradient, step: int, norm: float, out: Tensor | None = None) -> bool:
        """Move θ by the gradient that was taken last; returns whether all of it is finite then.

        norm: of the whole, of which this may be a piece. out: where the new θ is written as well, [total].
        """
        outer = self.at(step)
        if outer.clip is not None and norm > outer.clip:
            factor = outer.clip / norm
            self._each(self._pieces, lambda block: self._gradient[block[1]].copy_(gradient(*block) * factor))

        def moved(group: tuple[torch.optim.Optimizer, slice]) -> bool:
            optimizer, at = group
            for keys in optimizer.param_groups:
                keys["lr"], keys["weight_decay"] = learning_rate(outer, step), outer.weight_decay
            optimizer.step()
            theta = self.flat[at]
            if out is not None:
                out[at].copy_(theta)
            return not len(theta) or all(math.isfinite(end) for end in theta.aminmax())  # NaN is both ends

        finite = self._each(self._groups, moved)
        self._put_memory_together()
        return all(finite)

    def _zeros(self, like: Tensor) -> Tensor:
        """For every element of θ and what it is padded with."""
        size = -(-self.layout.total // ROUND) * ROUND
        if not self._on_cpu:
            return torch.zeros(size, dtype=like.dtype, device=like.device)
        # Numpy asks the kernel for large pages, by which a pass takes half to two thirds of the time; torch does not.
        return torch.from_numpy(np.zeros(size, like[:0].numpy().dtype))

    def _put_memory_together(self) -> None:
        """What the optimizers remember of θ's elements: in one buffer, once they have made it."""
        if self._together or not self._groups[0][0].state:
            return
        states = [
            optimizer.state[block] for optimizer, _ in self._groups for block in optimizer.param_groups[0]["params"]
        ]
        for key in [key for key, value in states[0].items() if self._of_elements(value)]:
            whole = self._zeros(self.flat)
            for state, part in zip(states, torch.split(whole, self._block), strict=True):
                part.copy_(state[key])
                state[key] = part
        self._together = True

    def _of_elements(self, value: object) -> bool:
        """Whether it is the memory of a block's elements."""
        return torch.is_tensor(value) and value.shape == self._blocks[0].shape

    def _each(self, items: Sequence[Item], work: Callable[[Item], Done]) -> list[Done]:
        if not self._on_cpu:
            return [work(item) for item in items]
        with one_thread():
            return on_cores(work, items) if self._spread else [work(item) for item in items]

    def memory(self) -> dict[str, Tensor]:
        """The optimizer's own tensors: `KEY.NAME` for those that are as large as θ, else `KEY`."""
        found: dict[str, Tensor] = {}
        slots = [slot for optimizer, _ in self._groups for slot in optimizer.state_dict()["state"].values()]
        for key, value in slots[0].items() if slots else ():
            if value is None:
                continue
            if self._of_elements(value):
                whole = torch.cat([slot[key] for slot in slots])[: self.layout.total].cpu()
                found |= {f"{key}.{name}": part for name, part in self.layout.unflatten(whole).items()}
            else:  # the same of all blocks
                found[key] = torch.as_tensor(value).cpu().clone()
        return found

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Put tensors from `memory` back."""
        slots = [{key: value.clone() for key, value in memory.items() if "." not in key} for _ in self._blocks]
        for key in {name.partition(".")[0] for name in memory if "." in name}:
            flat = self.layout.flatten({name: memory[f"{key}.{name}"] for name in self.layout.names})
            whole = torch.nn.functional.pad(flat, (0, len(self._gradient) - len(flat)))
            for slot, block in zip(slots, torch.split(whole, self._block), strict=True):
                slot[key] = block
        left = iter(slots)
        for optimizer, _ in self._groups:
            groups = optimizer.state_dict()["param_groups"]
            state = dict(enumerate(islice(left, len(groups[0]["params"])))) if memory else {}
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._together = False
        self._put_memory_together()


def _optimizer(outer: Optimizer, blocks: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Fused on a CPU, it goes through memory once, not once for each operation; rmsprop has nothing fused."""
    keys = {"lr": outer.lr, "weight_decay": outer.weight_decay, "foreach": False}
    fused = keys | {"fused": blocks[0].device.type == "cpu"}
    match outer.optimizer:
        case "adam":
            return torch.optim.Adam(blocks, **fused)  # type: ignore[arg-type]
        case "adamw":
            return torch.optim.AdamW(blocks, **fused)  # type: ignore[arg-type]
        case "sgd":
            return torch.optim.SGD(blocks, momentum=outer.momentum, nesterov=outer.nesterov, **fused)  # type: ignore[arg-type]
        case "rmsprop":
            return torch.optim.RMSprop(blocks, momentum=outer.momentum, **keys)  # type: ignore[arg-type]


def moved_state(state: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Running averages: (1 − m) · state + m · this step's mean over tasks (float64, by name)."""
    return {
        name: ((1 - STATE_MOMENTUM) * value.double() + STATE_MOMENTUM * mean[name]).to(value.dtype)
        for name, value in state.items()
    }
