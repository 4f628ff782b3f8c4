"""Implicit MAML against closed forms, dense linear algebra and central differences."""

import gc
import weakref

import pytest
import torch
from inner_loop_checks import (
    SHAPES,
    check_queries_are_independent,
    check_renaming_the_classes,
    configured,
    engines_disagree,
    episodes,
    error_of_central_differences,
    error_of_sums,
    learns_clusters,
    learns_sinusoids,
    plain_loss,
    plain_queries,
)
from plain_reference import method, parameters, stored
from torch.utils._python_dispatch import TorchDispatchMode

from metadist.algorithms.algorithm import Normalisation
from metadist.algorithms.imaml import IMAML, conjugate_gradient
from metadist.algorithms.objective import Objective, mse
from metadist.config import validate
from metadist.engine.shard import loop, vectorised
from metadist.errors import ConfigError
from metadist.tasks.episode import Episode, Examples

HOW = ("together", "support", "running")
METHOD = {"name": "imaml", "inner_lr": 0.3, "inner_steps": 4, "proximal": 1.5, "cg_steps": 4, "damping": 0.1}


def best_in_krylov_space(matrix, b, steps):
    """What conjugate gradient finds, by its defining property: the x of span{b, Ab, …} with the least A-norm of the
    error, (VᵀAV)⁻¹Vᵀb in an orthonormal basis V."""
    basis = torch.zeros(len(b), 0, dtype=b.dtype)
    v = b
    for _ in range(steps):
        for _ in range(2):  # orthogonalised twice, to the last bit
            v = v - basis @ (basis.T @ v)
        basis = torch.cat([basis, (v / v.norm())[:, None]], 1)
        v = matrix @ basis[:, -1]
    return basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)


def flat(named):
    return torch.cat([value.flatten() for value in named.values()])


def named(vector, like):
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.view_as(value) for part, (name, value) in zip(parts, like.items(), strict=True)}


def adapted(config, theta, support):
    """Gradient descent on L_S(φ) + λ/2 ‖φ − θ‖², all of it by autograd."""
    keys = config.algorithm
    fast = {name: value.detach() for name, value in theta.items()}
    for _ in range(keys.inner_steps):
        leaves = {name: value.clone().requires_grad_() for name, value in fast.items()}
        pull = sum(((leaves[name] - theta[name].detach()) ** 2).sum() for name in theta)
        loss = plain_loss(config, leaves, support)[0] + keys.proximal / 2 * pull
        gradient = torch.autograd.grad(loss, list(leaves.values()))
        fast = {n: (v - keys.inner_lr * g).detach() for (n, v), g in zip(leaves.items(), gradient, strict=True)}
    return {name: value.requires_grad_() for name, value in fast.items()}


def solved(config, fast, support, b):
    """((1 + d) I + H/λ)⁻¹ b with the dense Hessian, in the Krylov space of as many steps."""
    keys = config.algorithm
    hessian = torch.autograd.functional.hessian(
        lambda v: plain_loss(config, named(v, fast), support)[0], flat(fast).detach()
    )
    matrix = (1 + keys.damping) * torch.eye(len(b), dtype=b.dtype) + hessian / keys.proximal
    return best_in_krylov_space(matrix, b, keys.cg_steps)


def plain_imaml(config, theta, episode, how, step, correction=solved):
    """A loss of the value L_Q whose gradient in θ is the direction."""
    fast = adapted(config, theta, episode.support)
    loss, outputs, seen = plain_queries(config, fast, episode, how)
    b = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(fast.values()))])
    x = correction(config, fast, episode.support, b)
    return loss.detach() + x @ (flat(theta) - flat(theta).detach()), outputs, stored(seen)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cg_steps", [1, 4])
def test_direction_with_a_dense_hessian(cg_steps, how):
    """On the mlp, whose Hessian is small enough to be written down."""
    config = configured(METHOD | {"cg_steps": cg_steps}, "mlp", how, activation="tanh")
    assert error_of_sums(config, SHAPES["mlp"], plain_imaml) < 1e-12


@pytest.mark.parametrize("cg_steps", [1, 5])
def test_direction_on_numbers(cg_steps):
    config = configured(METHOD | {"cg_steps": cg_steps, "inner_lr": 0.02, "proximal": 30.0}, "sinusoid", width=5)
    assert error_of_sums(config, (1,), plain_imaml) < 1e-12


def test_the_correction_is_there():
    """∇L_Q alone, which first-order methods take, is far from the direction."""

    def first_order(*task):
        return plain_imaml(*task, correction=lambda config, fast, support, b: b)

    assert error_of_sums(configured(METHOD, "mlp"), SHAPES["mlp"], first_order) > 0.05


# --- a quadratic task --------------------------------------------------------------

SIZE, RATE, PULL = 5, 0.3, 0.7


class LinearRegression:
    """A network whose only parameter is w; x: [n, SIZE], outputs x·w [n, 1]."""

    def init(self, generator):
        return {"head.weight": torch.randn(SIZE, 1, generator=generator, dtype=torch.float64)}

    def statistics(self):
        return {}

    def __call__(self, params, x, statistics=None):
        return x @ params["head.weight"], {}


def half_mean_square(outputs, y):
    return ((outputs - y) ** 2).mean() / 2


@pytest.mark.parametrize("engine", [loop, vectorised])
@pytest.mark.parametrize("steps", [0, 3, 400])
def test_closed_form_on_a_quadratic_task(steps, engine):
    """With as many conjugate gradient steps as coordinates the direction is (I + H/λ)⁻¹ ∇L_Q(φ_K) itself."""
    generator = torch.Generator().manual_seed(0)
    sx, sy, qx, qy = (
        torch.randn(3, n, size, generator=generator, dtype=torch.float64)
        for n, size in ((7, SIZE), (7, 1), (4, SIZE), (4, 1))
    )
    algorithm = IMAML(
        Normalisation(LinearRegression(), "together"),
        RATE,
        steps,
        PULL,
        SIZE,
        objective=Objective(half_mean_square, mse),
    )
    theta, _ = algorithm.init(generator)
    w, eye = theta["head.weight"], torch.eye(SIZE, dtype=torch.float64)
    expected = torch.zeros_like(w)
    for task in range(3):
        hessian, b = sx[task].T @ sx[task] / 7, sx[task].T @ sy[task] / 7
        solution = torch.linalg.solve(hessian + PULL * eye, b + PULL * w)
        shrink = torch.linalg.matrix_power(eye - RATE * (hessian + PULL * eye), steps)
        phi = solution + shrink @ (w - solution)
        gradient = qx[task].T @ (qx[task] @ phi - qy[task]) / 4
        expected += torch.linalg.solve(eye + hessian / PULL, gradient)
    episodes = Episode(Examples(sx, sy), Examples(qx, qy), torch.zeros(3, 1, dtype=torch.int64), torch.arange(3))
    found = engine(algorithm, theta, {}, episodes, 1, 0)["gradient.head.weight"]
    assert (found - expected).norm() < 1e-12 * expected.norm()


# --- the solver ----------------------------------------------------------------------


def test_conjugate_gradient_solves_and_stays():
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(6, dtype=torch.float64), torch.randn(6, generator=generator).double()
    expected = torch.linalg.solve(matrix, b)
    for steps in (6, 50):
        assert (conjugate_gradient(lambda v: matrix @ v, b, steps) - expected).norm() < 1e-11 * expected.norm()


def test_conjugate_gradient_of_nothing_and_against_negative_curvature():
    zero = torch.zeros(3)
    assert torch.equal(conjugate_gradient(lambda v: 2 * v, zero, 5), zero)
    assert torch.equal(conjugate_gradient(lambda v: -v, torch.ones(3), 5), zero)
    down = torch.tensor([2.0, -1.0])
    found = conjugate_gradient(lambda v: down * v, torch.tensor([1.0, 0.1]), 5)
    assert found.isfinite().all()


# --- the whole method -----------------------------------------------------------------


def test_central_differences_where_the_inner_problem_is_solved():
    """How L_Q(φ*(θ)) really moves with θ, nothing of the method's formula in it."""
    keys = {"inner_lr": 0.1, "inner_steps": 60, "proximal": 4.0, "cg_steps": 40, "damping": 0.0}
    config = configured(METHOD | keys, "sinusoid", width=4)
    assert error_of_central_differences(config, (1,)) < 1e-6


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made under it have held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            storage = value.untyped_storage() if isinstance(value, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known.add(storage)
                size = storage.nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.freed, size)
        return out

    def freed(self, size):
        self.now -= size


def test_memory_is_flat_in_inner_steps():
    """Where second-order MAML's grows."""

    def most(algorithm, steps):
        gc.collect()
        config = configured(algorithm | {"inner_steps": steps}, "mlp", width=16)
        theta, _ = parameters(config, SHAPES["mlp"])
        with LiveBytes() as held:
            loop(method(config, SHAPES["mlp"]), theta, {}, episodes(config, SHAPES["mlp"], 1), 4, 0)
        return held.most

    assert most(METHOD, 20) < 1.1 * most(METHOD, 3)
    assert most({"name": "maml"}, 20) > 3 * most({"name": "maml"}, 3)


CASES = [(what, how) for what in ("stride2", "mlp") for how in HOW] + [("sinusoid", "together")]
GENTLE = METHOD | {"inner_lr": 0.02, "proximal": 30.0}


@pytest.mark.parametrize(("what", "how"), CASES)
def test_engines_agree(what, how):
    keys = GENTLE if what == "sinusoid" else METHOD
    assert engines_disagree(configured(keys, what, how), SHAPES[what]) < 1e-12


@pytest.mark.parametrize(("what", "how"), CASES)
def test_queries_are_answered_one_by_one(what, how):
    check_queries_are_independent(configured(METHOD, what, how), SHAPES[what])


@pytest.mark.parametrize(("what", "how"), CASES[:-1])
def test_renaming_the_classes(what, how):
    check_renaming_the_classes(configured(METHOD, what, how), SHAPES[what])


def test_it_learns_clusters():
    """Accuracy on new tasks rises by 15 points or more."""
    keys = {"name": "imaml", "inner_lr": 0.5, "inner_steps": 5, "proximal": 0.5, "cg_steps": 2}
    before, after = learns_clusters(keys, steps=50, lr=1e-2)
    assert after > before + 0.15


def test_it_learns_sinusoids():
    """The squared error on new tasks falls by a quarter or more."""
    keys = {"name": "imaml", "inner_lr": 0.01, "inner_steps": 5, "proximal": 5.0, "cg_steps": 2}
    before, after = learns_sinusoids(keys, steps=80, lr=1e-2)
    assert after < before * 0.75


def test_a_pull_that_overshoots_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm\.inner_lr: 1 overshoots"):
        validate({"algorithm": {"name": "imaml", "inner_lr": 1.0, "proximal": 2.0}}, "test")
