"""What a task is judged by: accuracy where there are classes, squared error where there are numbers; or its loss."""

from typing import Literal, NamedTuple


class Measure(NamedTuple):
    """name: the key in metrics and results; accuracy is a fraction in [0, 1]."""

    name: Literal["accuracy", "mse", "loss"]
    higher_is_better: bool

    @property
    def judged(self) -> str:
        """What a judge calls it."""
        return "loss" if self.name == "loss" else "score"

    @property
    def mode(self) -> str:
        return "max" if self.higher_is_better else "min"

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is strictly better."""
        return one > other if self.higher_is_better else one < other

    def show(self, value: float | None, digits: int = 1) -> str:
        """As a person reads it: percent, or four significant digits."""
        if value is None:
            return "–"
        return f"{100 * value:.{digits}f} %" if self.name == "accuracy" else f"{value:.4g}"

    def interval(self, value: float, ci95: float | None, digits: int = 1) -> str:
        """With the half-width of its 95 % interval."""
        if ci95 is None:
            return self.show(value, digits)
        if self.name == "accuracy":
            return f"{100 * value:.{digits}f} ± {100 * ci95:.{digits}f} %"
        return f"{value:.4g} ± {ci95:.2g}"


ACCURACY = Measure("accuracy", True)
MSE = Measure("mse", False)
LOSS = Measure("loss", False)
MEASURES = {"classification": ACCURACY, "regression": MSE}
"""Kind of a task → its own measure."""

NORMALISATION = {True: "transductive", False: "not transductive", None: "–"}
"""How a result's `transductive` is told."""
