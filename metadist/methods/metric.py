"""Methods that compare queries with the support set in a learned space."""

from typing import Literal

from pydantic import Field, model_validator

from metadist.methods.method import Algorithm
from metadist.tree import Positive, Rate


class ProtoNet(Algorithm):
    """Prototypical networks."""

    family = "metric-based"
    paper = "Snell, Swersky & Zemel 2017"
    orders = "1"
    class_bound = False
    finetunable = True
    name: Literal["protonet"] = "protonet"
    distance: Literal["euclidean", "cosine"] = Field("euclidean", description="squared distance, or cosine similarity")
    temperature: Rate = Field(1.0, description="logits are multiplied by it; 10 suits cosine")


ATTENTION_STEPS = 5


class Matching(Algorithm):
    """Matching networks: cosine attention over the support set."""

    family = "metric-based"
    paper = "Vinyals, Blundell, Lillicrap, Kavukcuoglu & Wierstra 2016"
    orders = "1"
    class_bound = False
    name: Literal["matching"] = "matching"
    temperature: Rate = Field(10.0, description="cosines are multiplied by it before the softmax; 1 in the paper")
    full_context: bool = Field(False, description="embed each image in the light of the whole support set")
    attention_steps: Positive = Field(ATTENTION_STEPS, description="of the queries' LSTM, with full_context")

    @model_validator(mode="after")
    def _steps_are_read(self) -> "Matching":
        if self.attention_steps != ATTENTION_STEPS and not self.full_context:
            raise ValueError("attention_steps: is read with algorithm.full_context=true only")
        return self


class Siamese(Algorithm):
    """Siamese networks: are two images of one class, by a learned distance."""

    family = "metric-based"
    paper = "Koch, Zemel & Salakhutdinov 2015"
    orders = "1"
    class_bound = False
    name: Literal["siamese"] = "siamese"


class Relation(Algorithm):
    """Relation networks: a second network says how alike two embeddings are."""

    family = "metric-based"
    paper = "Sung, Yang, Zhang, Xiang, Torr & Hospedales 2018"
    orders = "1"
    class_bound = False
    name: Literal["relation"] = "relation"
    hidden: Positive = Field(8, description="units of the relation module's last hidden layer")


class R2D2(Algorithm):
    """A ridge-regression head, solved in closed form."""

    family = "closed form"
    paper = "Bertinetto, Henriques, Torr & Vedaldi 2019"
    orders = "1"
    class_bound = False
    regression = True
    name: Literal["r2d2"] = "r2d2"
    ridge: Rate = Field(1.0, description="λ at the start of meta-training, beside a mean over the support set")
    scale: Rate = Field(10.0, description="α at the start of meta-training: of the head's outputs")
