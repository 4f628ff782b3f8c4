"""What every node of the config tree is, and the kinds of numbers that stand in it."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _no_truth_value(value: Any) -> Any:
    """pydantic reads true as 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


Number = BeforeValidator(_no_truth_value)
Positive = Annotated[int, Field(ge=1), Number]
Count = Annotated[int, Field(ge=0), Number]
AtLeastTwo = Annotated[int, Field(ge=2), Number]
Seed = Annotated[int, Field(ge=0, lt=2**63), Number]
Rate = Annotated[float, Field(gt=0, le=1e38, allow_inf_nan=False), Number]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), Number]


class Tree(BaseModel):
    """A node of the config tree: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
