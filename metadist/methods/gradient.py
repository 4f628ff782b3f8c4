"""Methods that learn where gradient descent starts, or how far it goes."""

from typing import Any, Literal

from pydantic import Field, model_validator

from metadist.methods.method import InnerLoop, SecondOrder
from metadist.tree import Count, NonNegative, Positive, Rate


class Maml(SecondOrder):
    """Model-agnostic meta-learning."""

    paper = "Finn, Abbeel & Levine 2017"
    name: Literal["maml"] = "maml"
    order: Literal[1, 2] = Field(2, description="1 drops the second derivatives (FOMAML)")
    support_loss_weight: NonNegative = Field(0.0, description="λ: support loss of θ added to the meta-objective")


class Reptile(InnerLoop):
    """The outer direction is θ − φ."""

    paper = "Nichol, Achiam & Schulman 2018"
    orders = "1"
    name: Literal["reptile"] = "reptile"
    inner_lr: Rate = Field(1e-3, description="rate of the inner loop")
    inner_steps: Count = Field(5, description="gradient steps, each on the next mini-batch of the support set")
    inner_optimizer: Literal["sgd", "adam"] = Field("adam", description="adam has β1 = 0, β2 = 0.999, ε = 1e-8")
    inner_batch: Positive | None = Field(None, description="examples per inner step; the whole support set without it")
    judged_batch: Positive | None = Field(None, description="the same where it is judged; inner_batch without it")
    moments: Literal["fresh", "kept"] = Field(
        "fresh", description="adam's second moments: zero for each task, or kept over tasks as in the paper's code"
    )

    @model_validator(mode="after")
    def _sgd_has_no_moments(self) -> "Reptile":
        if self.moments == "kept" and self.inner_optimizer == "sgd":
            raise ValueError("moments: are adam's; valid with algorithm.inner_optimizer=sgd is fresh")
        return self

    def check(self, config: Any) -> None:
        """Its direction has no place for statistics."""
        if config.model.statistics == "running":
            raise ValueError("model.statistics: reptile keeps no running statistics; valid is support")


class Anil(InnerLoop):
    """Almost no inner loop: only the head adapts."""

    paper = "Raghu, Raghu, Bengio & Vinyals 2020"
    orders = "1 or 2"
    name: Literal["anil"] = "anil"
    order: Literal[1, 2] = Field(2, description="1 drops the second derivatives")


class Boil(SecondOrder):
    """Body only update in the inner loop: the head stays."""

    paper = "Oh, Yoo, Kim & Yun 2021"
    name: Literal["boil"] = "boil"


class MetaSgd(SecondOrder):
    """A learned rate for every element of θ."""

    paper = "Li, Zhou, Chen & Li 2017"
    name: Literal["meta-sgd"] = "meta-sgd"
    inner_lr: Rate = Field(0.4, description="of every element at the start of meta-training")

    @property
    def adapts_at_inner_lr(self) -> bool:
        return False


class MamlPlusPlus(InnerLoop):
    """MAML made stable."""

    paper = "Antoniou, Edwards & Storkey 2019"
    orders = "1, then 2"
    name: Literal["maml++"] = "maml++"
    inner_lr: Rate = Field(0.1, description="of every tensor and step; with learned_rates where they start")
    inner_steps: Count = Field(5, description="gradient steps on the support set")
    learned_rates: bool = Field(True, description="a learned rate for every parameter tensor and inner step")
    multi_step_loss: Count = Field(
        500, description="meta-steps until only the last inner step's query loss counts; 0: from the start"
    )
    first_order_steps: Count = Field(0, description="meta-steps without second derivatives, before those with them")
    per_step_affine: bool = Field(
        True, description="scale and shift of each norm for every number of inner steps, moved by the outer loop only"
    )
    per_step_statistics: bool = Field(
        True, description="with model.statistics=running: running statistics for every number of inner steps"
    )

    @property
    def adapts_at_inner_lr(self) -> bool:
        return not self.learned_rates

    def check(self, config: Any) -> None:
        """No evaluation takes more steps than were learned."""
        affine = self.per_step_affine and config.model.norm != "none"
        statistics = self.per_step_statistics and config.model.statistics == "running"
        if not (self.learned_rates or affine or statistics):
            return
        for key, steps in config.judged("inner_steps"):
            if steps is not None and steps > self.inner_steps:
                raise ValueError(
                    f"{key}: maml++ learns what belongs to each of its {self.inner_steps} inner steps "
                    f"and cannot take {steps}; valid is 0 to {self.inner_steps}"
                )


class Imaml(InnerLoop):
    """The implicit gradient of a proximal inner problem, by conjugate gradient."""

    paper = "Rajeswaran, Finn, Kakade & Levine 2019"
    orders = "1 and H·v"
    name: Literal["imaml"] = "imaml"
    inner_lr: Rate = Field(0.1, description="rate of the inner loop, for a mean loss over the support set")
    inner_steps: Count = Field(16, description="gradient steps on the proximal problem")
    proximal: Rate = Field(2.0, description="λ: λ/2 ‖φ − θ‖² is added to the support loss")
    cg_steps: Positive = Field(5, description="conjugate gradient steps of the implicit gradient")
    damping: NonNegative = Field(0.0, description="d: the linear system is (1 + d) I + H/λ")

    @model_validator(mode="after")
    def _pull_is_stable(self) -> "Imaml":
        if self.inner_lr * self.proximal >= 2:
            raise ValueError(
                f"inner_lr: {self.inner_lr:g} overshoots the pull of algorithm.proximal={self.proximal:g} for ever; "
                f"less than {2 / self.proximal:g} is valid"
            )
        return self
