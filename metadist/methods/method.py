"""What every method's node of the config tree has."""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from metadist.tree import Count, Rate, Tree


class Algorithm(Tree):
    """What every method has. The class variables say what it is; `metadist methods` prints them."""

    family: ClassVar[str]
    paper: ClassVar[str]
    orders: ClassVar[str]
    """of differentiation in meta-training"""
    class_bound: ClassVar[bool]
    """whether the network ends in a head with a row for each class of the training episodes"""
    regression: ClassVar[bool] = False
    """whether it also learns regression tasks"""
    finetunable: ClassVar[bool] = False
    """whether `eval.finetune_steps` can adapt it further at test"""
    compares_tasks: ClassVar[bool] = False
    """whether its loss also compares the tasks of a shard with one another"""

    def check(self, config: Any) -> None:
        """Raise ValueError where other keys of the whole config do not go with this method."""

    @classmethod
    def method_name(cls) -> str:
        """Its `algorithm.name`."""
        return str(cls.model_fields["name"].default)

    @classmethod
    def short_paper(cls) -> str:
        """The paper with at most two of its authors."""
        authors, _, last = cls.paper.rpartition(" & ")
        if "," in authors:
            return f"{authors.partition(',')[0]} et al. {last.rpartition(' ')[2]}"
        return cls.paper


class InnerLoop(Algorithm):
    """What every method with gradient steps on the support set has."""

    family = "optimisation-based"
    class_bound = True
    regression = True
    inner_lr: Rate = Field(0.4, description="rate of the inner loop, for a mean loss over the support set")
    inner_steps: Count = Field(1, description="gradient steps on the support set")

    @property
    def adapts_at_inner_lr(self) -> bool:
        """Whether a trained one still reads `inner_lr`: not where it is only what learned rates began with."""
        return True


class SecondOrder(InnerLoop):
    """What methods have whose meta-gradient goes through the inner steps of the whole network."""

    orders = "1 or 2"
    order: Literal[1, 2] = Field(2, description="1 drops the second derivatives")
    recompute: bool = Field(
        False,
        description="make again what inner steps keep for the way back, ⌈√K⌉ steps at a time, instead of keeping it of "
        "all K: less memory, more time",
    )

    @model_validator(mode="after")
    def _graphs_are_of_second_order(self) -> "SecondOrder":
        if self.recompute and self.order == 1:
            raise ValueError("recompute: with algorithm.order=1 no inner step's graph is kept; valid is false")
        return self
