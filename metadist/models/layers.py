"""The layers that the networks are made of, each a function of named parameters."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.models.network import Params, Statistics
from metadist.models.norm import batch_norm, layer_norm, own_batch_norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky-relu": partial(F.leaky_relu, negative_slope=0.1),
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


def glorot(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform in ±√(6 / (fan in + fan out)) (Glorot & Bengio 2010); the last two axes are in and out."""
    window = math.prod(shape[:-2])
    limit = math.sqrt(6 / (window * (shape[-2] + shape[-1])))
    return torch.empty(shape).uniform_(-limit, limit, generator=generator)


def init_norm(name: str, norm: str, channels: int) -> dict[str, Tensor]:
    """Scale 1 and shift 0; a layer without norm has a bias instead."""
    if norm == "none":
        return {f"{name}.bias": torch.zeros(channels)}
    return {f"{name}.norm.scale": torch.ones(channels), f"{name}.norm.shift": torch.zeros(channels)}


def init_statistics(name: str, norm: str, channels: int) -> Statistics:
    """Running statistics of a layer that nothing has passed yet."""
    if norm != "batch":
        return {}
    return {f"{name}.norm.mean": torch.zeros(channels), f"{name}.norm.variance": torch.ones(channels)}


def normalise(name: str, norm: str, params: Params, x: Tensor, given: Statistics | None, used: Statistics) -> Tensor:
    """The layer's norm (or bias); the statistics it used are put into `used`."""
    if norm == "none":
        return x + params[f"{name}.bias"]
    scale, shift = params[f"{name}.norm.scale"], params[f"{name}.norm.shift"]
    if norm == "layer":
        return layer_norm(x, scale, shift)
    if given is None:
        out, mean, variance = own_batch_norm(x, scale, shift)
    else:
        mean, variance = given[f"{name}.norm.mean"], given[f"{name}.norm.variance"]
        out = batch_norm(x, mean, variance, scale, shift)
    used[f"{name}.norm.mean"], used[f"{name}.norm.variance"] = mean, variance
    return out


def init_linear(name: str, generator: torch.Generator, inputs: int, outputs: int) -> dict[str, Tensor]:
    """Weight [inputs, outputs] and bias [outputs]."""
    return {f"{name}.weight": glorot(generator, inputs, outputs), f"{name}.bias": torch.zeros(outputs)}


def init_head(generator: torch.Generator, inputs: int, outputs: int) -> dict[str, Tensor]:
    """Small normal weights, as in Finn's code, so that an untrained head favours no class."""
    weight = torch.empty(inputs, outputs)
    torch.nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02, generator=generator)
    return {"head.weight": weight, "head.bias": torch.zeros(outputs)}


def linear(name: str, params: Params, x: Tensor) -> Tensor:
    """x: [n, in]; weight: [in, out]; bias: [out]."""
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def pool(kind: str, x: Tensor) -> Tensor:
    """Non-overlapping 2 × 2 windows, an odd last row or column dropped; x: [n, height, width, channels]."""
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    if kind == "avg":
        return x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    top, bottom = x[:, 0::2], x[:, 1::2]
    tall = torch.maximum(top, bottom)
    return torch.maximum(tall[:, :, 0::2], tall[:, :, 1::2])
