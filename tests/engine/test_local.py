"""Local meta-steps against plain loops, in float64: DiLoCo, Reptile, and training without them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from metadist.config import Config, resolve
from metadist.data.sources import prepare
from metadist.engine.engine import Engine
from metadist.runtime.in_process import InProcess

EXACT = ("engine.dtype=float64", "task.meta_batch=4", "task.shard=2")
TO_THE_MEAN = ("outer.optimizer=sgd", "outer.lr=1")


@pytest.fixture(scope="session")
def after(tiny: Callable[..., Config]) -> Callable[..., dict[str, torch.Tensor]]:
    """θ and state after some outer steps of the tiny run with overrides."""

    def run(steps: int, *overrides: str) -> dict[str, torch.Tensor]:
        config = resolve(tiny(*EXACT, *overrides))
        runtime = InProcess(config, [prepare(config.data.sources[0])], None)
        for step in range(steps):
            runtime.begin(step)
            runtime.finish(step)
            runtime.apply(step)
        return {name: torch.from_numpy(value) for name, value in runtime.snapshot()().values.items()}

    return run


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To what is left of the grid of the exact sum, 2^-40 in the first step, after some steps of training."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=0, atol=5e-8), name


def local(**keys: object) -> str:
    return "outer.local={" + ", ".join(f"{key}: {value}" for key, value in keys.items()) + "}"


def test_diloco_is_algorithm_1_of_the_paper(tiny: Callable[..., Config], after: Any) -> None:
    """Written once more with torch.optim alone: AdamW in the replicas, SGD with Nesterov momentum over them."""
    rounds, inner, replicas = 4, 3, 2
    found = after(
        rounds, local(steps=inner, replicas=replicas, optimizer="adamw", lr=0.01, weight_decay=0.1),
        "outer.optimizer=sgd", "outer.lr=0.7", "outer.momentum=0.9", "outer.nesterov=true", "outer.steps=4",
    )  # fmt: skip
    config = resolve(tiny(*EXACT))
    engine = Engine(config, [prepare(config.data.sources[0])])
    theta = {n: v.clone().requires_grad_() for n, v in engine.blueprint.theta.items()}
    outer = torch.optim.SGD(theta.values(), lr=0.7, momentum=0.9, nesterov=True)
    workers = [{n: v.detach().clone().requires_grad_() for n, v in theta.items()} for _ in range(replicas)]
    optimizers = [torch.optim.AdamW(worker.values(), lr=0.01, weight_decay=0.1) for worker in workers]
    for round_ in range(rounds):
        for number, (worker, optimizer) in enumerate(zip(workers, optimizers, strict=True)):
            with torch.no_grad():
                for name, value in worker.items():
                    value.copy_(theta[name])
            for h in range(inner):
                episodes = engine.tasks.sample(round_ * inner + h, number * 4, 4)
                losses = [
                    engine.algorithms.at(0)
                    .task_loss(worker, {}, torch.utils._pytree.tree_map(lambda v, i=i: v[i], episodes), 3, 0)
                    .loss
                    for i in range(4)
                ]
                optimizer.zero_grad()
                (sum(losses) / 4).backward()
                optimizer.step()
        for name, value in theta.items():
            value.grad = sum(value.detach() - worker[name].detach() for worker in workers) / replicas
        outer.step()
    assert_close(found, {n: v.detach() for n, v in theta.items()})
    assert not torch.allclose(found["head.weight"], engine.blueprint.theta["head.weight"], atol=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_replica_and_an_outer_rate_of_one_is_plain_training(optimizer: str, after: Any) -> None:
    """Its optimizer lives on, its schedule goes over the whole run, its tasks are those of plain meta-steps."""
    own = {"optimizer": optimizer, "lr": 0.02, "schedule": "cosine", "warmup": 2, "clip": 0.5}
    plainly = after(12, *(f"outer.{key}={value}" for key, value in own.items()), "outer.steps=12")
    for inner in (1, 3):
        rounds = 12 // inner
        found = after(rounds, local(steps=inner, replicas=1, **own), *TO_THE_MEAN, f"outer.steps={rounds}")
        assert_close(found, plainly)


def test_one_local_step_of_one_replica_is_a_plain_step_of_sgd(after: Any) -> None:
    found = after(3, local(steps=1, replicas=1, optimizer="sgd", lr=1), *TO_THE_MEAN)
    assert_close(found, after(3, *TO_THE_MEAN))


def test_running_statistics_move_in_the_replicas(after: Any) -> None:
    running = ("model.statistics=running", "task.transductive=false")
    plainly = after(6, *running, *TO_THE_MEAN)
    assert any("mean" in name for name in plainly)
    found = after(2, local(steps=3, replicas=1, optimizer="sgd", lr=1), *running, *TO_THE_MEAN)
    assert_close(found, plainly)
    both = after(2, local(steps=3, replicas=2, optimizer="sgd", lr=1), *running, *TO_THE_MEAN)
    assert not torch.allclose(next(v for n, v in both.items() if "mean" in n), next(iter(plainly.values())).mean())


OUTERS = {
    "momentum": ("outer.optimizer=sgd", "outer.lr=0.5", "outer.momentum=0.9", "outer.nesterov=true"),
    "adam": ("outer.optimizer=adam", "outer.lr=0.01"),
}


@pytest.mark.parametrize("outer", OUTERS.values(), ids=OUTERS)
def test_reptile_is_replicas_of_one_task(outer: tuple[str, ...], after: Any) -> None:
    """One code path: Reptile's tasks return θ − φ; so do replicas whose one local step, of rate 1, leads to φ."""
    reptile = ("algorithm.name=reptile", "algorithm.inner_steps=3", "algorithm.inner_lr=0.01", "task.shard=1", *outer)
    tasks = after(4, *reptile, "task.meta_batch=4")
    replicas = after(4, *reptile, "task.meta_batch=1", local(steps=1, replicas=4, optimizer="sgd", lr=1))
    assert_close(replicas, tasks)


def test_reptile_is_sgd_over_the_mean_difference(tiny: Callable[..., Config], after: Any) -> None:
    """θ ← θ − ε (mean of θ − φ), with Nesterov momentum, written once more with torch.optim."""
    reptile = ("algorithm.name=reptile", "algorithm.inner_steps=3", "algorithm.inner_lr=0.01")
    found = after(4, *reptile, *OUTERS["momentum"])
    config = resolve(tiny(*EXACT, *reptile))
    engine = Engine(config, [prepare(config.data.sources[0])])
    theta = {n: v.clone().requires_grad_() for n, v in engine.blueprint.theta.items()}
    outer = torch.optim.SGD(theta.values(), lr=0.5, momentum=0.9, nesterov=True)
    for step in range(4):
        episodes = engine.tasks.sample(step, 0, 4)
        supports = [torch.utils._pytree.tree_map(lambda v, i=i: v[i], episodes).support for i in range(4)]
        fast = [engine.algorithms.at(0).inner_loop(theta, {}, support)[0] for support in supports]
        for name, value in theta.items():
            value.grad = value.detach() - torch.stack([phi[name] for phi in fast]).mean(0)
        outer.step()
    assert_close(found, {n: v.detach() for n, v in theta.items()})
