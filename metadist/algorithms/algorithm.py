"""What every method is to the rest of the system.

A method is told for one task; the engine puts a task axis in front of it with `vmap`, or
loops. The runtime knows nothing of methods, and a method nothing of how a shard is computed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from metadist.models.network import Network, Params, Statistics
from metadist.tasks.episode import Episode, Examples

Theta = Mapping[str, Tensor]
"""Meta-parameters θ by name; what the outer optimizer moves."""

State = Mapping[str, Tensor]
"""Tensors by name that no gradient moves but the tasks do, such as running statistics."""

Predictor = Callable[[Tensor], Tensor]
"""Queries [m, …] → logits [m, ways], or for regression numbers [m, outputs]."""


class Outcome(NamedTuple):
    """What one training task says.

    loss: scalar, the meta-objective; score: scalar, the objective's score on the queries;
    statistics: this task's value of every state tensor, same names and shapes.
    """

    loss: Tensor
    score: Tensor
    statistics: Statistics


class Algorithm(Protocol):
    """A meta-learning method."""

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Initial θ and initial state, float32 or wider, each a flat mapping of named tensors."""
        ...

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        """The inner loop, the only implementation of it: from a support set to a predictor."""
        ...

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        """The meta-objective of one task at meta-step `step`, differentiable in θ."""
        ...


@runtime_checkable
class Direct(Protocol):
    """A method whose outer direction is no gradient has this beside `Algorithm`."""

    def meta_gradient(
        self, theta: Theta, state: State, episode: Episode, ways: int, step: int
    ) -> tuple[dict[str, Tensor], Outcome]:
        """The direction that the outer optimizer descends, by name of θ, for one task."""
        ...


@runtime_checkable
class Stepping(Protocol):
    """A method whose inner loop can be judged behind any number of its steps has this beside `Algorithm`."""

    def after(self, theta: Theta, state: State, support: Examples, ways: int, steps: Sequence[int]) -> list[Predictor]:
        """The predictors behind some numbers of inner steps, ascending, of one inner loop; `adapt` is that behind
        `inner_steps`."""
        ...


@runtime_checkable
class Comparing(Protocol):
    """A method whose loss also compares the tasks of a shard with one another has this beside `Algorithm`.

    The meta-objective of a shard is then Σ of its tasks' losses plus `comparison`.
    """

    def compared(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> tuple[Outcome, Tensor]:
        """`task_loss` of one task, and what of it is compared with others, a vector; both differentiable in θ."""
        ...

    def comparison(self, compared: Tensor, family: Tensor) -> Tensor:
        """The further loss of a shard, a scalar, of its tasks' vectors [tasks, d] and families int64 [tasks]."""
        ...


@runtime_checkable
class Closed(Protocol):
    """A method that, for some networks, has the meta-gradient in closed form has this beside `Algorithm`."""

    def at_once(self, episodes: Episode) -> int:
        """How many of these tasks are best taken at once; 0: not in closed form, `task_loss` is differentiated."""
        ...

    def gradient_of_all(
        self, theta: Theta, state: State, episodes: Episode, ways: int, step: int
    ) -> tuple[dict[str, Tensor], Outcome]:
        """Σ over tasks of the gradient of `task_loss`, by name of θ, and their outcomes with a leading task axis."""
        ...


class Normalisation(NamedTuple):
    """Which statistics the batch norms use.

    queries: `together`, the queries' own (transductive); `support`, those of the support
    set under the adapted parameters; `running`, the state's. keep: whether training keeps
    running statistics for that.
    """

    network: Network
    queries: Literal["together", "support", "running"]
    keep: bool = False

    def initial_state(self) -> Statistics:
        """Running statistics to begin with; none where nobody will read them."""
        return self.network.statistics() if self.keep else {}

    def predictor(self, params: Params, state: State, support: Examples) -> Predictor:
        """Query outputs of the network with adapted parameters."""
        given = self.given(params, state, support)
        return lambda x: self.network(params, x, given)[0]

    def given(self, params: Params, state: State, support: Examples) -> Statistics | None:
        """The statistics that the queries get; None where they have their own."""
        if self.queries == "together":
            return None
        if self.queries == "running":
            return dict(state)
        return self.network(params, support.x)[1]
