"""Methods whose initialisation depends on an embedding of the task."""

from typing import Annotated, Any, Literal

from pydantic import Field

from metadist.methods.method import SecondOrder
from metadist.tree import NonNegative, Number, Positive


class TaskConditioned(SecondOrder):
    """A Siamese task encoder conditions the initialisation and the inner rates of MAML."""

    family = "task embedding"
    paper = "metadist, after MAML"
    compares_tasks = True
    name: Literal["task-conditioned"] = "task-conditioned"
    embedding: Positive = Field(32, description="numbers in the embedding of a task")
    encoder_width: Positive = Field(32, description="model.width of the task encoder, else a network like the model")
    contrastive_weight: NonNegative = Field(1.0, description="λ: of the contrastive loss over the pairs of a shard")
    margin: Annotated[float, Field(gt=0, le=2), Number] = Field(
        1.0, description="up to which other families are held apart; unit vectors are at most 2 apart"
    )

    def check(self, config: Any) -> None:
        """Two tasks of a shard must be able to differ in family."""
        if config.shard < 2:
            raise ValueError(
                f"task.shard: task-conditioned compares the tasks of a shard; {config.shard} leaves none, 2 is valid"
            )
        if config.kind == "classification" and not config.task.within_group and len(config.data.sources) < 2:
            raise ValueError(
                "task.within_group: task-conditioned tells families of tasks apart, and without it all are of one; "
                "valid is true, or a list of data sets in data.name"
            )
