"""What a method is built from, beside its own keys."""

from typing import NamedTuple

from metadist.algorithms.algorithm import Normalisation
from metadist.algorithms.objective import Objective
from metadist.config import Config, Eval


class Context(NamedTuple):
    """config: the whole run's; normalisation: its network (with a head where the method is
    class-bound) and the statistics that the queries get; shape: of one input; ways: classes of
    a training episode, or outputs of a regression; classes: how many meta-train has, 0 for
    regression; evaluation: how it is judged, None in training.
    """

    config: Config
    normalisation: Normalisation
    objective: Objective
    shape: tuple[int, ...]
    ways: int
    classes: int
    evaluation: Eval | None
