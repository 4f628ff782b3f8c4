"""The outer step: unscale, clip, optimizer, schedule; one function, whatever runs around it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from metadist.config import Outer

STATE_MOMENTUM = 0.1
"""Weight of a meta-step's mean in the running state, as in torch's batch norm."""


def learning_rate(outer: Outer, step: int) -> float:
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
    """θ with its torch.optim optimizer; runs on one CPU thread, tensor by tensor."""

    def __init__(self, outer: Outer, theta: Mapping[str, Tensor]) -> None:
        self.outer = outer
        self.names = sorted(theta)
        self.theta = {name: theta[name].clone().requires_grad_() for name in self.names}
        # One kernel a tensor: a fused or multi-tensor kernel may round differently.
        plain = {"lr": outer.lr, "weight_decay": outer.weight_decay, "foreach": False}
        params = list(self.theta.values())
        self.optimizer: torch.optim.Optimizer
        match outer.optimizer:
            case "adam":
                self.optimizer = torch.optim.Adam(params, fused=False, **plain)  # type: ignore[arg-type]
            case "adamw":
                self.optimizer = torch.optim.AdamW(params, fused=False, **plain)  # type: ignore[arg-type]
            case "sgd":
                self.optimizer = torch.optim.SGD(params, momentum=outer.momentum, fused=False, **plain)  # type: ignore[arg-type]
            case "rmsprop":
                self.optimizer = torch.optim.RMSprop(params, momentum=outer.momentum, **plain)  # type: ignore[arg-type]

    def step(self, gradient: Mapping[str, Tensor], step: int) -> float:
        """Move θ by one mean meta-gradient (float64, by name); returns the gradient's norm before clipping."""
        norm = math.sqrt(sum(float(gradient[name].square().sum()) for name in self.names))
        factor = self.outer.clip / norm if self.outer.clip is not None and norm > self.outer.clip else 1.0
        for name in self.names:
            self.theta[name].grad = (gradient[name] * factor).to(self.theta[name].dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.outer, step)
        self.optimizer.step()
        return norm

    def memory(self) -> dict[str, Tensor]:
        """The optimizer's own tensors, by `KEY.NAME`."""
        slots = self.optimizer.state_dict()["state"]
        return {
            f"{key}.{self.names[index]}": torch.as_tensor(value).clone()
            for index, slot in slots.items()
            for key, value in slot.items()
            if value is not None
        }

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Put tensors from `memory` back."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in memory.items():
            key, _, parameter = name.partition(".")
            state.setdefault(self.names.index(parameter), {})[key] = value.clone()
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def moved_state(state: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Running averages: (1 − m) · state + m · this step's mean over tasks (float64, by name)."""
    return {
        name: ((1 - STATE_MOMENTUM) * value.double() + STATE_MOMENTUM * mean[name]).to(value.dtype)
        for name, value in state.items()
    }
