"""What an episode is."""

from typing import NamedTuple

from torch import Tensor


class Examples(NamedTuple):
    """A support or a query set.

    x: inputs, [n, channels, height, width]; y: targets, int64 [n] in [0, ways).
    The examples stand shot by shot: the first `ways` of them hold one of each class.
    A batch of episodes has a leading task axis in front of both.
    """

    x: Tensor
    y: Tensor


class Episode(NamedTuple):
    """One few-shot task: adapt to the support set, be judged on the query set."""

    support: Examples
    query: Examples
