"""Random numbers by counter: a draw is a pure function of its coordinates.

No generator is carried along, so that anyone can make task `i` of step `t` again,
anywhere. Everything is integer arithmetic modulo 2^64 in torch's int64, which gives
the same numbers on CPU and GPU. The mixing function is the finaliser of SplitMix64
(Steele, Lea & Flood 2014).
"""

import torch
from torch import Tensor

Counter = int | Tensor
"""A coordinate of a task: a number, or an int64 scalar on the device."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that holds it."""
    value &= (1 << 64) - 1
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


def key(seed: int, *coordinates: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """A 64-bit key (int64) from a seed and integer coordinates, tensors among them broadcast."""
    # Filled on the device, not copied to it: a copy from the host cannot be part of a CUDA graph.
    state = mix(torch.full((), _signed(seed), dtype=torch.int64, device=device))
    for coordinate in coordinates:
        state = mix(state ^ (_signed(coordinate) if isinstance(coordinate, int) else coordinate))
    return state


def below(keys: Tensor, draw: int | Tensor, bound: int | Tensor) -> Tensor:
    """Draw number `draw` of each key, int64 in [0, bound).

    The high 32 bits are scaled by `bound` < 2^31, so a value is favoured by at most
    bound / 2^32, far below anything an experiment can see.
    """
    return (_shift_right(mix(keys + draw), 32) * bound) >> 32


def distinct(keys: Tensor, size: Tensor, amount: int, largest: int | None = None) -> Tensor:
    """`amount` distinct integers below `size`, in random order, for each key.

    keys: int64 [n]; size: int64 [n], each at least `amount`; largest: none of the sizes is above it, found
    where it is not given; returns int64 [n, amount]. A Fisher-Yates shuffle that stops after `amount` swaps,
    all keys at once.
    """
    n, largest = keys.shape[0], int(size.max()) if largest is None else largest
    deck = torch.arange(largest, device=keys.device).repeat(n, 1)
    for position in range(amount):
        other = position + below(keys, position, size - position)
        taken = deck.gather(1, other[:, None])
        deck.scatter_(1, other[:, None], deck[:, position : position + 1].clone())
        deck[:, position : position + 1] = taken
    return deck[:, :amount]
