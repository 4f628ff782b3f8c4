"""The outer step: unscale, clip, optimizer, schedule; one function, whatever runs around it.

What it descends is a mean over tasks or replicas: of meta-gradients, or of differences θ − φ
(Reptile's tasks, DiLoCo's replicas). It makes no difference between them.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from metadist.config import Optimizer
from metadist.engine.layout import Layout

STATE_MOMENTUM = 0.1
"""Weight of a meta-step's mean in the running state, as in torch's batch norm."""


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


class OuterStep:
    """θ with its torch.optim optimizer, on all of θ as one flat buffer in name order.

    outer: its keys; with `steps` of them the schedule is at its end. at: those in force in a meta-step, of which rate,
    clip and weight decay are read.
    """

    def __init__(
        self, outer: Optimizer, theta: Mapping[str, Tensor], at: Callable[[int], Optimizer] | None = None
    ) -> None:
        self.at, self.layout = at or (lambda step: outer), Layout.of(theta)
        self.flat = self.layout.flatten(theta).requires_grad_()
        # One plain kernel after the other: a fused or multi-tensor one may round differently.
        plain = {"lr": outer.lr, "weight_decay": outer.weight_decay, "foreach": False}
        self.optimizer: torch.optim.Optimizer
        match outer.optimizer:
            case "adam":
                self.optimizer = torch.optim.Adam([self.flat], fused=False, **plain)  # type: ignore[arg-type]
            case "adamw":
                self.optimizer = torch.optim.AdamW([self.flat], fused=False, **plain)  # type: ignore[arg-type]
            case "sgd":
                momentum = {"momentum": outer.momentum, "nesterov": outer.nesterov}
                self.optimizer = torch.optim.SGD([self.flat], fused=False, **momentum, **plain)  # type: ignore[arg-type]
            case "rmsprop":
                self.optimizer = torch.optim.RMSprop([self.flat], momentum=outer.momentum, **plain)  # type: ignore[arg-type]

    @property
    def theta(self) -> dict[str, Tensor]:
        """θ by name: views, which the next step moves."""
        return self.layout.split(self.flat.detach())

    def squares(self, gradient: Mapping[str, Tensor]) -> list[float]:
        """The squared norm of every tensor of a gradient (float64, by name), in name order."""
        return [float(gradient[name].square().sum()) for name in self.layout.names]

    def step(self, gradient: Mapping[str, Tensor], step: int, squares: Sequence[float] | None = None) -> float:
        """Move θ by one mean meta-gradient (float64, by name); returns the gradient's norm before clipping.

        squares: those of all tensors of the run, where these are not all.
        """
        norm = math.sqrt(sum(self.squares(gradient) if squares is None else squares))
        outer = self.at(step)
        factor = outer.clip / norm if outer.clip is not None and norm > outer.clip else 1.0
        scaled = gradient if factor == 1.0 else {name: gradient[name] * factor for name in self.layout.names}
        self.flat.grad = self.layout.flatten({name: scaled[name].to(self.flat.dtype) for name in self.layout.names})
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = learning_rate(outer, step), outer.weight_decay
        self.optimizer.step()
        return norm

    def memory(self) -> dict[str, Tensor]:
        """The optimizer's own tensors: `KEY.NAME` for those that are as large as θ, else `KEY`."""
        found: dict[str, Tensor] = {}
        for key, value in self.optimizer.state_dict()["state"].get(0, {}).items():
            if value is None:
                continue
            value = torch.as_tensor(value).cpu().clone()
            if value.shape == self.flat.shape:
                found |= {f"{key}.{name}": part for name, part in self.layout.unflatten(value).items()}
            else:
                found[key] = value
        return found

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Put tensors from `memory` back."""
        slot = {key: value.clone() for key, value in memory.items() if "." not in key}
        for key in {name.partition(".")[0] for name in memory if "." in name}:
            slot[key] = self.layout.flatten({name: memory[f"{key}.{name}"] for name in self.layout.names})
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: slot} if slot else {}, "param_groups": groups})


def moved_state(state: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Running averages: (1 − m) · state + m · this step's mean over tasks (float64, by name)."""
    return {
        name: ((1 - STATE_MOMENTUM) * value.double() + STATE_MOMENTUM * mean[name]).to(value.dtype)
        for name, value in state.items()
    }
