"""Random numbers by counter: a draw is a pure function of its coordinates.

No generator is carried along, so that anyone can make task `i` of step `t` again,
anywhere. Everything is integer arithmetic modulo 2^64 in torch's int64, which gives
the same numbers on CPU and GPU. The mixing function is the finaliser of SplitMix64
(Steele, Lea & Flood 2014).
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor

Counter = int | Tensor
"""A coordinate of a task: a number, or an int64 scalar on the device."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1

ROOM = 1 << 24
"""Pairs of swaps that `distinct` looks at, at once: three bytes each."""


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that holds it."""
    value &= _WORD
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's >> on int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, int64 in and out, any shape: a bijection of 64-bit words."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _mixed(x: int) -> int:
    """The same of one word, as a Python integer."""
    x = (x + _GOLDEN) & _WORD
    x = (x ^ (x >> 30)) * _MIX_1 & _WORD
    x = (x ^ (x >> 27)) * _MIX_2 & _WORD
    return x ^ (x >> 31)


def key(seed: int, *coordinates: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """A 64-bit key (int64) from a seed and integer coordinates, tensors among them broadcast.

    device: of the key where no coordinate is a tensor.
    """
    # Numbers are mixed as numbers as far as they go: on a device each operation is a kernel, and a copy from the host
    # cannot be part of a CUDA graph.
    state, left = _mixed(int(seed) & _WORD), deque(coordinates)
    while left and not isinstance(left[0], Tensor):
        state = _mixed(state ^ (int(left.popleft()) & _WORD))
    if not left:
        return torch.full((), _signed(state), dtype=torch.int64, device=device)
    found: Any = _signed(state)
    for coordinate in left:
        found = mix(found ^ (coordinate if isinstance(coordinate, Tensor) else _signed(int(coordinate))))
    return found  # type: ignore[no-any-return]


def below(keys: Tensor, draw: int | Tensor, bound: int | Tensor) -> Tensor:
    """Draw number `draw` of each key, int64 in [0, bound).

    The high 32 bits are scaled by `bound` < 2^31, so a value is favoured by at most
    bound / 2^32, far below anything an experiment can see.
    """
    return (_shift_right(mix(keys + draw), 32) * bound) >> 32


def distinct(keys: Tensor, size: Tensor, amount: int) -> Tensor:
    """`amount` distinct integers below `size`, in random order, for each key.

    keys: int64 [n]; size: int64 [n], each at least `amount`; returns int64 [n, amount]. A Fisher-Yates shuffle that
    stops after `amount` swaps, all keys and all swaps at once, amount² comparisons for a key: swap p exchanges places p
    and other_p ≥ p of a deck that is never laid out. What a place holds is what place p held at the last swap that put
    something there, or its number.
    """
    some = max(1, ROOM // amount**2)
    if len(keys) > some:
        each = zip(torch.split(keys, some), torch.split(size, some), strict=True)
        return torch.cat([distinct(*of_some, amount) for of_some in each])
    position = torch.arange(amount, device=keys.device)
    other = position + below(keys[:, None], position, size[:, None] - position)
    earlier, small = position < position[:, None], position.to(torch.int16 if amount < 1 << 15 else torch.int32)

    def put_by(place: Tensor) -> Tensor:
        """The last swap before the p-th that put something at a place, [amount] or [n, amount]; −1: none."""
        hit = (other[:, None] == place[..., None]) & earlier
        return torch.where(hit, small, -1).amax(-1).long()

    # What p held is what q < p held, who put it there, and so on to one that held its own number: by doubling.
    by = put_by(position)
    held = torch.where(by < 0, position, by)
    for _ in range((amount - 1).bit_length()):
        held = held.gather(1, held)
    by = put_by(other)
    return torch.where(by < 0, other, held.gather(1, by.clamp_min(0)))
