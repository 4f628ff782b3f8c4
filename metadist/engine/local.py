"""Local meta-steps: a replica of θ goes some way by itself, and returns how far it came (`outer.local`).

DiLoCo (Douillard et al. 2023, algorithm 1): in round t each of R replicas begins at θ_t with
the memory its optimizer had at the end of round t − 1, takes H meta-steps on tasks of its
own, and returns θ_t − θ_r. The mean of the differences is what the outer optimizer descends
(theirs: SGD with Nesterov momentum). A replica is a lane: whoever computes it is given its memory.

Local meta-step h of round t is meta-step t·H + h, in schedules and in methods that count
meta-steps, and replica r takes its tasks r·B … r·B + B−1, B = `task.meta_batch`. So one
replica whose optimizer lives on, with an outer SGD of rate 1, is training without `outer.local`.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from metadist.config import Outer
from metadist.engine.outer import OuterStep, moved_state

Named = Mapping[str, Tensor]
Batch = Callable[[Named, Named, int], dict[str, Tensor]]
"""θ, state, meta-step → means over a replica's tasks, as a shard's sums are named, float64."""


def descend(
    outer: Outer, batch: Batch, theta: Named, state: Named, step: int, memory: Named
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One replica's round: (what it returns, its optimizer's memory afterwards).

    What it returns, float64 by name: `gradient.NAME`: θ_t − θ_r; `statistics.NAME`: its state
    at the end; `metric.NAME`: the mean over its local meta-steps. memory: empty in the first round.
    """
    local = outer.local
    assert local is not None
    optimizer = OuterStep(local.model_copy(update={"steps": local.steps * outer.steps}), theta, spread=False)
    if memory:
        optimizer.remember(memory)
    metrics: dict[str, Tensor] = {}
    for number in range(step * local.steps, (step + 1) * local.steps):
        # In memory of their own: see `Layout.unflatten`.
        mean = batch(optimizer.layout.unflatten(optimizer.flat), state, number)
        optimizer.step({name: mean[f"gradient.{name}"] for name in theta}, number)
        state = moved_state(state, {name: mean[f"statistics.{name}"] for name in state})
        for name in ("metric.loss", "metric.score"):
            metrics[name] = metrics.get(name, 0) + mean[name] / local.steps
    moved = optimizer.theta
    sums = {f"gradient.{name}": value.double() - moved[name].double() for name, value in theta.items()}
    sums |= {f"statistics.{name}": value.double() for name, value in state.items()}
    return sums | metrics, optimizer.memory()
