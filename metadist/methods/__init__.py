"""The methods as a config names them: `algorithm.name` and the keys that each of them reads.

What a method is, its formula, stands in the file of its name in `metadist/algorithms/`.
"""

from typing import Annotated, get_args

from pydantic import Field

from metadist.methods.baseline import BaselinePlusPlus, Scratch
from metadist.methods.conditioned import TaskConditioned
from metadist.methods.gradient import Anil, Boil, Imaml, Maml, MamlPlusPlus, MetaSgd, Reptile
from metadist.methods.learned import LstmLearner, LstmOptimizer
from metadist.methods.memory import Mann, MetaNet
from metadist.methods.method import Algorithm, InnerLoop
from metadist.methods.metric import R2D2, Matching, ProtoNet, Relation, Siamese

__all__ = ["AnyAlgorithm", "InnerLoop", "Maml", "ProtoNet", "every_method"]

AnyAlgorithm = Annotated[
    Maml | Anil | Boil | Reptile | MetaSgd | MamlPlusPlus | Imaml
    | ProtoNet | Matching | Siamese | Relation
    | Mann | MetaNet
    | LstmOptimizer | LstmLearner
    | R2D2
    | TaskConditioned
    | Scratch | BaselinePlusPlus,
    Field(discriminator="name"),
]  # fmt: skip


def every_method() -> list[type[Algorithm]]:
    """All of them, in the order of the families."""
    return list(get_args(get_args(AnyAlgorithm)[0]))
