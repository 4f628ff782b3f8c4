"""MAML on sinusoids: its meta-gradient against plain autograd, and a whole run in one process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from plain_reference import config_of, network, one_of, parameters, relative

from metadist.algorithms import for_evaluation, for_training
from metadist.config import Config
from metadist.engine.shard import loop, vectorised
from metadist.evaluate import evaluate
from metadist.evaluation.adapter import Adapter
from metadist.run import resume, train
from metadist.tasks.samplers import evaluation_tasks, training_tasks

TASKS = 3


def sinusoid(order: int = 2, steps: int = 1, weight: float = 0.0, norm: str = "none", activation: str = "relu"):
    return config_of(
        data={"name": "sinusoid"},
        task={"shots": 5, "queries": 6},
        model={"name": "mlp", "width": 7, "layers": 2, "norm": norm, "activation": activation},
        algorithm={
            "name": "maml", "inner_lr": 0.05, "order": order, "inner_steps": steps, "support_loss_weight": weight,
        },
    )  # fmt: skip


def plain_sums(config: Config, theta: dict[str, torch.Tensor], episodes: Any) -> dict[str, torch.Tensor]:
    """Σ over tasks of ∇_θ [L_Q(φ_K) + λ L_S(θ)], mean squared errors, one task after the other."""
    method = config.algorithm
    total = {f"gradient.{name}": torch.zeros_like(value) for name, value in theta.items()}
    total |= {"metric.loss": torch.zeros((), dtype=torch.float64), "metric.score": torch.zeros(())}
    for task in range(TASKS):
        (sx, sy), (qx, qy), *_ = one_of(episodes, task)
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        fast = dict(leaves)
        for _ in range(method.inner_steps):
            inner = F.mse_loss(network(config.model, fast, sx)[0], sy)
            gradient = torch.autograd.grad(inner, list(fast.values()), create_graph=method.order == 2)
            fast = {n: v - method.inner_lr * g for (n, v), g in zip(fast.items(), gradient, strict=True)}
        score = F.mse_loss(network(config.model, fast, qx)[0], qy)
        loss = score + method.support_loss_weight * F.mse_loss(network(config.model, leaves, sx)[0], sy)
        found = torch.autograd.grad(loss, list(leaves.values()))
        one = {f"gradient.{name}": g for name, g in zip(leaves, found, strict=True)}
        one |= {"metric.loss": loss.detach(), "metric.score": score.detach()}
        total = {name: value + one[name] for name, value in total.items()}
    return total


@pytest.mark.parametrize("engine", [loop, vectorised])
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
@pytest.mark.parametrize(("order", "steps", "weight"), [(2, 1, 0.0), (2, 3, 0.5), (1, 3, 0.5), (2, 0, 0.0)])
def test_the_meta_gradient_is_that_of_plain_autograd(order: int, steps: int, weight: float, norm: str, engine) -> None:
    config = sinusoid(order, steps, weight, norm)
    tasks = training_tasks(config, [], "cpu")
    theta, state = parameters(config, tasks.shape)
    episodes = tasks.sample(0, 0, TASKS)
    assert theta["head.weight"].shape == (7, 1), "one output, not a class each"
    found = engine(for_training(config, tasks.shape), theta, state, episodes, tasks.ways, 0)
    assert relative(found, plain_sums(config, theta, episodes)) < 1e-12


def test_the_second_order_term_is_there() -> None:
    config, first = sinusoid(steps=2), sinusoid(order=1, steps=2)
    theta, _ = parameters(config, (1,))
    episodes = training_tasks(config, [], "cpu").sample(0, 0, TASKS)
    assert relative(plain_sums(first, theta, episodes), plain_sums(config, theta, episodes)) > 1e-3


def test_central_differences() -> None:
    config = sinusoid(steps=2, weight=0.3, activation="tanh")
    tasks = training_tasks(config, [], "cpu")
    theta, state = parameters(config, tasks.shape)
    episodes, learner = tasks.sample(0, 0, TASKS), for_training(config, tasks.shape)
    gradient = vectorised(learner, theta, state, episodes, 1, 0)
    generator = torch.Generator().manual_seed(3)
    v = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in theta.items()}

    def f(h: float) -> float:
        moved = {name: value + h * v[name] for name, value in theta.items()}
        return float(loop(learner, moved, state, episodes, 1, 0)["metric.loss"])

    h = 1e-4
    difference = (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
    slope = sum(float((gradient[f"gradient.{n}"] * v[n]).sum()) for n in theta)
    assert slope == pytest.approx(difference, rel=1e-6)


# --- a whole run ---------------------------------------------------------------

RUN: dict[str, Any] = {
    "seed": 1,
    "data": {"name": "sinusoid"},
    "task": {"shots": 10, "queries": 10, "meta_batch": 8, "shard": 8},
    "model": {"name": "mlp", "width": 32, "norm": "none"},
    "algorithm": {"name": "maml", "inner_lr": 0.02, "inner_steps": 1},
    "outer": {"steps": 300, "lr": 1e-2},
    "engine": {"device": "cpu"},
    "cluster": {"workers": 0},
    "checkpoint": {"every": 100},
    "eval": {"every": 100, "val_episodes": 40, "episodes": 120, "also": [{"inner_steps": 5, "queries": 20}]},
    "tracking": {"uri": "off"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(Config.model_validate(RUN), "sinusoid", tmp_path_factory.mktemp("sinusoid") / "run")


def test_training_lowers_the_error(run: Any) -> None:
    test, untrained = run.result["test"], run.result["untrained"]
    assert test["mse"] < 0.6 * untrained["mse"]
    assert test["mse"] + test["ci95"] < untrained["mse"] - untrained["ci95"]


def test_the_result_tells_of_errors(run: Any) -> None:
    text = (run.folder / "result.json").read_text()
    result = json.loads(text)
    assert "accuracy" not in text
    assert result == run.result
    told = {key: result["test"][key] for key in ("episodes", "ways", "shots", "queries", "inner_steps")}
    assert told == {"episodes": 120, "ways": 1, "shots": 10, "queries": 10, "inner_steps": 1}
    (also,) = result["also"]
    assert (also["inner_steps"], also["queries"]) == (5, 20)
    assert set(result["untrained"]) == {"mse", "ci95"}
    metrics = pq.read_table(run.folder / "metrics.parquet").to_pydict()
    assert not any("accuracy" in name for name in metrics)
    assert metrics["loss"] == pytest.approx(metrics["mse"], rel=1e-4), "without λ the loss is the queries' error"
    validated = {step: v for step, v in zip(metrics["step"], metrics["val_mse"], strict=True) if v is not None}
    assert set(validated) == {100, 200, 300}
    best = min(validated, key=lambda step: validated[step])
    assert (result["best"]["step"], result["best"]["mse"]) == (best, validated[best]), "the least error is the best"
    assert (run.folder / "best.safetensors").exists()


def test_a_person_gets_the_same_numbers(run: Any) -> None:
    """The meta-test's error again from `Adapter.regress`, one episode after the other."""
    adapter, config = Adapter.load(run.folder), Config.model_validate(RUN)
    (sx, sy), (qx, qy), *_ = evaluation_tasks(config, [], "test", "cpu").sample(0, 0, 120)
    found = [adapter.regress(sx[i].numpy(), sy[i].numpy(), qx[i].numpy()) for i in range(120)]
    assert np.mean((np.stack(found) - qy.numpy()) ** 2) == pytest.approx(run.result["test"]["mse"], rel=1e-4)


def test_an_evaluation_under_other_conditions(run: Any) -> None:
    same, _ = evaluate(run.folder, [], best=False, split="test")
    assert same["test"] == run.result["test"]
    assert same["untrained"] == run.result["untrained"]
    more, _ = evaluate(run.folder, ["eval.inner_steps=5", "eval.shots=20", "eval.episodes=20"], best=True, split="val")
    assert (more["test"]["shots"], more["test"]["inner_steps"], more["test"]["episodes"]) == (20, 5, 20)
    assert more["test"]["mse"] < more["untrained"]["mse"]
    unadapted, _ = evaluate(run.folder, ["eval.inner_steps=0"], best=False, split="test")
    assert unadapted["test"]["mse"] > 1.5 * same["test"]["mse"], "the inner loop is what makes the difference"


def test_two_halves_are_a_whole(run: Any, tmp_path: Path) -> None:
    half = Config.model_validate(RUN).with_values(outer={"steps": 150})
    assert train(half, "sinusoid", tmp_path / "run").result["theta_sha256"] != run.result["theta_sha256"]
    result = resume(tmp_path / "run", ["outer.steps=300"]).result
    for key in ("theta_sha256", "test", "also", "best"):
        assert result[key] == run.result[key]


def test_the_judged_method_takes_its_steps_from_eval() -> None:
    config = sinusoid().with_values(eval={"inner_steps": 7})
    assert (for_evaluation(config, (1,)).inner_steps, for_training(config, (1,)).inner_steps) == (7, 1)
