"""What an episode is."""

from typing import NamedTuple

from torch import Tensor

Drawn = dict[str, Tensor]
"""What tasks were drawn, with a leading task axis, before there is an example of them."""


class Examples(NamedTuple):
    """A support or a query set.

    x: inputs, [n, channels, height, width] or [n, features]; y: targets, int64 [n] in [0, ways), or for
    regression numbers [n, outputs].
    The examples stand shot by shot: the first `ways` of them hold one of each class.
    A batch of episodes has a leading task axis in front of both.
    """

    x: Tensor
    y: Tensor


class Episode(NamedTuple):
    """One few-shot task: adapt to the support set, be judged on the query set.

    classes: int64 [ways], which classes of the split they are, for methods that are trained on
    all of them at once; family: int64 scalar, the group (alphabet) that the task is drawn from,
    for methods that compare tasks.
    """

    support: Examples
    query: Examples
    classes: Tensor
    family: Tensor
