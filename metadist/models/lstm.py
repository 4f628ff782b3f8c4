"""A long short-term memory cell (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).

    [i f g o] = x W + h U + b
    c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g),   h' = σ(o) ⊙ tanh(c')

Written as matrix products with explicit parameters, so that it works under `vmap`. A bias of 1
on the forget gate lets a fresh cell remember (Jozefowicz, Zaremba & Sutskever 2015).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metadist.models.layers import glorot
from metadist.models.network import Params


class Memory(NamedTuple):
    """hidden: h, what the cell says; cell: c, what it keeps; [n, hidden] each."""

    hidden: Tensor
    cell: Tensor


def init_lstm(name: str, generator: torch.Generator, inputs: int, hidden: int) -> dict[str, Tensor]:
    """input: W [inputs, 4 · hidden]; recurrent: U [hidden, 4 · hidden]; bias: b [4 · hidden]."""
    bias = torch.zeros(4, hidden)
    bias[1] = 1.0
    return {
        f"{name}.input": glorot(generator, inputs, 4 * hidden),
        f"{name}.recurrent": glorot(generator, hidden, 4 * hidden),
        f"{name}.bias": bias.flatten(),
    }


def blank(name: str, params: Params, x: Tensor) -> Memory:
    """The memory before the first of a sequence of inputs like x [n, inputs]: zeros."""
    nothing = x.new_zeros(x.shape[0], params[f"{name}.recurrent"].shape[0])
    return Memory(nothing, nothing)


def lstm(name: str, params: Params, x: Tensor, memory: Memory) -> Memory:
    """One step; x: [n, inputs]."""
    gates = x @ params[f"{name}.input"] + memory.hidden @ params[f"{name}.recurrent"] + params[f"{name}.bias"]
    write, keep, candidate, show = gates.chunk(4, -1)
    cell = torch.sigmoid(keep) * memory.cell + torch.sigmoid(write) * torch.tanh(candidate)
    return Memory(torch.sigmoid(show) * torch.tanh(cell), cell)
