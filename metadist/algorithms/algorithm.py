"""What every method is to the rest of the system.

A method is told for one task; the engine puts a task axis in front of it with `vmap`, or
loops. The runtime knows nothing of methods, and a method knows nothing of shards.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from metadist.models.network import Network, Params, Statistics
from metadist.tasks.episode import Episode, Examples

Theta = Mapping[str, Tensor]
"""Meta-parameters θ by name; what the outer optimizer moves."""

State = Mapping[str, Tensor]
"""Tensors by name that no gradient moves but the tasks do, such as running statistics."""

Predictor = Callable[[Tensor], Tensor]
"""Queries [m, channels, height, width] → logits [m, ways]."""


class Outcome(NamedTuple):
    """What one training task says.

    loss: scalar, the meta-objective; accuracy: scalar in [0, 1] on the queries;
    statistics: this task's value of every state tensor, same names and shapes.
    """

    loss: Tensor
    accuracy: Tensor
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


class Direct(Protocol):
    """A method whose outer direction is no gradient has this beside `Algorithm`."""

    def meta_gradient(
        self, theta: Theta, state: State, episode: Episode, ways: int, step: int
    ) -> tuple[dict[str, Tensor], Outcome]:
        """The direction that the outer optimizer descends, by name of θ, for one task."""
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


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of rows whose largest logit is the target's; a float64 scalar."""
    return (logits.detach().argmax(-1) == y).double().mean()


def zeros_like_state(state: State) -> Statistics:
    """For methods that leave the state alone."""
    return {name: torch.zeros_like(value) for name, value in state.items()}
