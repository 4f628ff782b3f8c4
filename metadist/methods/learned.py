"""Learned optimizers: the inner loop's update rule is a recurrent network."""

from typing import Any, Literal

from pydantic import Field, model_validator

from metadist.methods.method import InnerLoop
from metadist.tree import NonNegative, Positive, Rate


class LstmOptimizer(InnerLoop):
    """A coordinate-wise LSTM proposes the updates."""

    family = "learned optimizer"
    paper = "Andrychowicz, Denil, Gómez, Hoffman, Pfau, Schaul & de Freitas 2016"
    orders = "1"
    name: Literal["lstm-optimizer"] = "lstm-optimizer"
    inner_lr: Rate = Field(0.1, description="α: the LSTM's output is multiplied by it")
    inner_steps: Positive = Field(5, description="updates on the support set")
    hidden: Positive = Field(20, description="units of a layer of the LSTM")
    layers: Positive = Field(2, description="layers of the LSTM")
    start: Literal["learned", "fixed"] = Field(
        "learned", description="the network's initialisation: learned too, or the run's random one"
    )
    trajectory: NonNegative = Field(
        0.0, description="w: support loss after each update, added to the query loss of the last one"
    )

    def check(self, config: Any) -> None:
        """A fixed start stays where it is."""
        for section, optimizer in config.outer.optimizers.items():
            if self.start == "fixed" and optimizer.weight_decay:
                raise ValueError(
                    f"{section}.weight_decay: would shrink the initialisation that algorithm.start=fixed keeps"
                )


class LstmLearner(InnerLoop):
    """An LSTM whose cell state is the learner; it also learns where to start."""

    family = "learned optimizer"
    paper = "Ravi & Larochelle 2017"
    orders = "1"
    name: Literal["lstm-learner"] = "lstm-learner"
    inner_lr: Rate = Field(0.01, description="rate that a fresh input gate gives, for a mean loss over the support set")
    inner_steps: Positive = Field(12, description="updates on the support set")
    hidden: Positive = Field(20, description="units of the LSTM below the gates")
    largest_lr: Rate = Field(1.0, description="rate that an open input gate gives; 1 in the paper")

    @property
    def adapts_at_inner_lr(self) -> bool:
        return False

    @model_validator(mode="after")
    def _gate_is_between(self) -> "LstmLearner":
        if self.inner_lr >= self.largest_lr:
            raise ValueError(
                f"inner_lr: {self.inner_lr:g} is a share of algorithm.largest_lr={self.largest_lr:g}; "
                f"less than that is valid"
            )
        return self
