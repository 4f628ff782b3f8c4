"""What a method has to beat: no meta-training at all, and plain pre-training."""

from typing import Any, Literal

from pydantic import Field, model_validator

from metadist.methods.method import Algorithm, InnerLoop
from metadist.tree import Count, Rate


class Scratch(InnerLoop):
    """The same network trained from its untrained state on the support set."""

    family = "baseline"
    paper = "–"
    orders = "0"
    name: Literal["scratch"] = "scratch"
    inner_lr: Rate = Field(0.01, description="rate of the training on a support set")
    inner_steps: Count = Field(50, description="full-batch steps on it")
    inner_optimizer: Literal["sgd", "adam"] = Field("adam", description="adam has β1 = 0.9, β2 = 0.999, ε = 1e-8")

    def check(self, config: Any) -> None:
        """Nothing may need meta-training, or be it."""
        for section, optimizer in config.outer.optimizers.items():
            if optimizer.weight_decay:
                raise ValueError(f"{section}.weight_decay: would move what scratch never trains; valid is 0")
        if config.model.statistics == "running":
            raise ValueError("model.statistics: scratch keeps no running statistics; valid is support")


class BaselinePlusPlus(Algorithm):
    """Pre-training on all meta-train classes, then a head for the support set."""

    family = "baseline"
    paper = "Chen, Liu, Kira, Wang & Huang 2019"
    orders = "1"
    class_bound = False
    name: Literal["baseline++"] = "baseline++"
    head: Literal["centroid", "linear", "cosine"] = Field(
        "cosine", description="for a support set; pre-training is linear for the first two (Baseline), else cosine"
    )
    steps: Count = Field(100, description="full-batch gradient steps of the head on the support set")
    rate: Rate = Field(0.1, description="of those steps")
    scale: Rate = Field(10.0, description="τ: cosine similarities are multiplied by it")

    @model_validator(mode="after")
    def _keys_are_read(self) -> "BaselinePlusPlus":
        for key, readers in (("steps", ("linear", "cosine")), ("rate", ("linear", "cosine")), ("scale", ("cosine",))):
            if getattr(self, key) != type(self).model_fields[key].default and self.head not in readers:
                raise ValueError(f"{key}: is read by algorithm.head={' or '.join(readers)} only")
        return self
