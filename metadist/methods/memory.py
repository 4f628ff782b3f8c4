"""Methods that read the support set into a memory, or write weights from it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from metadist.methods.method import Algorithm
from metadist.tree import Number, Positive, Rate


class Mann(Algorithm):
    """A memory-augmented network with least-recently-used access."""

    family = "memory- and model-based"
    paper = "Santoro, Bartunov, Botvinick, Wierstra & Lillicrap 2016"
    orders = "1"
    class_bound = True
    name: Literal["mann"] = "mann"
    hidden: Positive = Field(200, description="units of the LSTM controller")
    slots: Positive = Field(128, description="of the memory")
    cell: Positive = Field(40, description="numbers in a slot, and in a key")
    reads: Positive = Field(4, description="read heads; as many least-used slots are written to at each step")
    decay: Annotated[float, Field(ge=0, le=1), Number] = Field(0.99, description="γ: of the usage weights, each step")
    sharpness: Rate = Field(1.0, description="β: cosine similarities are multiplied by it; 1 in the paper")
    labels: Literal["late", "beside"] = Field(
        "late", description="late: with the next input, as in the paper; beside: with its own, and queries have none"
    )

    @model_validator(mode="after")
    def _memory_holds_more_than_a_step_writes(self) -> "Mann":
        if self.slots <= self.reads:
            raise ValueError(
                f"slots: {self.slots} slots, of which every step empties reads={self.reads}; more is valid"
            )
        return self


class MetaNet(Algorithm):
    """Meta networks: fast weights from a meta learner."""

    family = "memory- and model-based"
    paper = "Munkhdalai & Yu 2017"
    orders = "1 or 2"
    class_bound = True
    name: Literal["metanet"] = "metanet"
    hidden: Positive = Field(64, description="units of the representation's and of the base learner's augmented layer")
    generator: Positive = Field(20, description="units of both layers of the generators of fast weights")
    sharpness: Rate = Field(1.0, description="β: the attention's cosine similarities are multiplied by it")
    order: Literal[1, 2] = Field(2, description="1 takes the loss gradients that become fast weights as constants")
