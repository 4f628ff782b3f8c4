"""MAML against a closed form on a quadratic task, and against central differences on smooth nets."""

import pytest
import torch
from plain_reference import config_of, episodes_of, method, one_of, parameters

from metadist.algorithms.algorithm import Normalisation
from metadist.algorithms.maml import MAML
from metadist.algorithms.objective import Objective
from metadist.engine.shard import loop, vectorised
from metadist.tasks.episode import Episode, Examples

TASKS, SUPPORT, QUERIES, SIZE, RATE = 3, 7, 4, 5, 0.3


class LinearRegression:
    """A network whose only parameter is w; x: [n, SIZE, 1, 1], outputs x·w [n, 1]."""

    def init(self, generator):
        return {"head.weight": torch.randn(SIZE, 1, generator=generator, dtype=torch.float64)}

    def statistics(self):
        return {}

    def __call__(self, params, x, statistics=None):
        return x.flatten(1) @ params["head.weight"], {}


def half_mean_square(outputs, y):
    return ((outputs[:, 0] - y) ** 2).mean() / 2


def quadratic(x, y):
    """H and b of ½ wᵀHw − bᵀw + const."""
    x = x.flatten(1)
    return x.T @ x / len(y), (x.T @ y / len(y))[:, None]


@pytest.mark.parametrize("engine", [loop, vectorised])
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_closed_form_on_a_quadratic_task(steps, order, weight, engine):
    """φ_K is affine in θ: dφ_K/dθ = (I − αH)^K, and 1 in its place for first order."""
    generator = torch.Generator().manual_seed(0)
    sx = torch.randn(TASKS, SUPPORT, SIZE, 1, 1, generator=generator, dtype=torch.float64)
    qx = torch.randn(TASKS, QUERIES, SIZE, 1, 1, generator=generator, dtype=torch.float64)
    sy = torch.randn(TASKS, SUPPORT, generator=generator, dtype=torch.float64)
    qy = torch.randn(TASKS, QUERIES, generator=generator, dtype=torch.float64)
    objective = Objective(half_mean_square, half_mean_square)
    algorithm = MAML(Normalisation(LinearRegression(), "together"), RATE, steps, order, weight, objective)
    theta, _ = algorithm.init(generator)
    w = theta["head.weight"]

    expected, loss = torch.zeros_like(w), 0.0
    for task in range(TASKS):
        hessian, b = quadratic(sx[task], sy[task])
        hessian_q, b_q = quadratic(qx[task], qy[task])
        step = torch.eye(SIZE, dtype=torch.float64) - RATE * hessian
        phi = w
        for _ in range(steps):
            phi = phi - RATE * (hessian @ phi - b)
        through = torch.linalg.matrix_power(step, steps) if order == 2 else torch.eye(SIZE, dtype=torch.float64)
        expected += through.T @ (hessian_q @ phi - b_q) + weight * (hessian @ w - b)
        loss += half_mean_square(qx[task].flatten(1) @ phi, qy[task])
        loss += weight * half_mean_square(sx[task].flatten(1) @ w, sy[task])

    none = torch.zeros(TASKS, dtype=torch.int64)
    episodes = Episode(Examples(sx, sy), Examples(qx, qy), none[:, None], none)
    found = engine(algorithm, theta, {}, episodes, 1, 0)
    assert (found["gradient.head.weight"] - expected).norm() < 1e-12 * expected.norm()
    assert found["metric.loss"] == pytest.approx(float(loss), rel=1e-12)


SMOOTH = {
    "stride2": {"activation": "softplus"},
    "conv4": {"activation": "tanh", "pool": "avg"},
    "conv4-fc": {"activation": "softplus", "pool": "avg", "hidden": 6},
    "mlp": {"activation": "tanh"},
}


@pytest.mark.parametrize("transductive", [True, False], ids=["transductive", "support-statistics"])
@pytest.mark.parametrize("name", ["maml", "protonet", "protonet-cosine"])
@pytest.mark.parametrize("model", list(SMOOTH))
def test_central_differences_on_a_smooth_net(model, name, transductive):
    """(f(θ + hv) − f(θ − hv)) / 2h, with h and 2h so that the h² term cancels, in random directions v."""
    algorithm = {
        "maml": {"name": "maml", "order": 2, "inner_steps": 2, "inner_lr": 0.4, "support_loss_weight": 0.3},
        "protonet": {"name": "protonet", "temperature": 0.5},
        "protonet-cosine": {"name": "protonet", "distance": "cosine", "temperature": 10.0},
    }[name]
    config = config_of(
        task={"ways": 4, "shots": 2, "queries": 2, "transductive": transductive},
        model={"name": model, **SMOOTH[model]},
        algorithm=algorithm,
    )
    image = (1, 16, 16) if model.startswith("conv4") else (1, 9, 8)
    theta, state = parameters(config, image)
    episodes = episodes_of(config, image, tasks=1)
    learner, episode = method(config, image), one_of(episodes, 0)

    def f(direction, h):
        with torch.no_grad():
            moved = {name: value + h * direction[name] for name, value in theta.items()}
            return float(learner.task_loss(moved, state, episode, 4, 0).loss)

    found = vectorised(learner, theta, state, episodes, 4, 0)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        v = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in theta.items()}
        h = 1e-4
        difference = (8 * (f(v, h) - f(v, -h)) - (f(v, 2 * h) - f(v, -2 * h))) / (12 * h)
        slope = sum(float((found[f"gradient.{n}"] * v[n]).sum()) for n in theta)
        assert slope == pytest.approx(difference, rel=1e-6, abs=1e-9)
