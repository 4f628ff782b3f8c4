"""Our meta-gradients against those of learn2learn, higher and TorchOpt, in float64 and from the same θ.

Each peer adapts a plain `torch.nn` network in its own way. How to install them: tests/README.md.
"""

import warnings
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from inner_loop_checks import SHAPES, configured, episodes
from plain_reference import Named, one_of, parameters, relative
from torch import Tensor, nn

from metadist.algorithms import for_training
from metadist.config import Config
from metadist.engine.shard import loop, vectorised
from metadist.tasks.episode import Episode

NETWORKS = ("stride2", "conv4", "mlp")


def peer(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"needs peers: {name} (see tests/README.md)")


class Means(nn.Module):
    """The mean over space, which the MAML paper's network has instead of a flat vector."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Flat(nn.Module):
    """All features of an image in one vector, channels last as ours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1).flatten(1)


def plain_network(config: Config, theta: Named) -> nn.Sequential:
    """`features` and `head` from `torch.nn`, with the values of θ."""
    model = config.model
    layers: list[nn.Module] = []
    if model.name == "mlp":
        layers.append(nn.Flatten())
        for layer in range(1, model.layers + 1):
            weight = theta[f"fc{layer}.weight"]
            layers += [nn.Linear(*weight.shape, bias=False), nn.BatchNorm1d(weight.shape[1], track_running_stats=False)]
            layers += [nn.ReLU()]
    else:
        strided = model.name == "stride2"
        for block in range(1, 5):
            _, _, inputs, outputs = theta[f"conv{block}.weight"].shape
            layers.append(nn.Conv2d(inputs, outputs, 3, stride=2 if strided else 1, padding=1, bias=False))
            layers += [nn.BatchNorm2d(outputs, track_running_stats=False), nn.ReLU()]
            layers += [] if strided else [nn.MaxPool2d(2)]
        layers.append(Means() if strided else Flat())
    head = nn.Linear(*theta["head.weight"].shape)
    whole = nn.Sequential(OrderedDict(features=nn.Sequential(*layers), head=head)).double()
    with torch.no_grad():
        for parameter, value in zip(whole.parameters(), theirs(config, theta), strict=True):
            parameter.copy_(value)
    return whole


def names(config: Config) -> list[str]:
    """θ's names in the order of the plain network's parameters."""
    layers = config.model.layers if config.model.name == "mlp" else 4
    kind = "fc" if config.model.name == "mlp" else "conv"
    each = [f"{kind}{n}.{part}" for n in range(1, layers + 1) for part in ("weight", "norm.scale", "norm.shift")]
    return [*each, "head.weight", "head.bias"]


def turned(value: Tensor) -> Tensor:
    """Ours in PyTorch's layout: [height, width, in, out] → [out, in, height, width], [in, out] → [out, in]."""
    return value.permute(3, 2, 0, 1) if value.ndim == 4 else value.t()


def theirs(config: Config, theta: Named) -> list[Tensor]:
    return [turned(theta[name]) for name in names(config)]


def ours(config: Config, gradients: list[Tensor]) -> Named:
    """PyTorch's layout back in ours."""
    back = [g.permute(2, 3, 1, 0) if g.ndim == 4 else g.t() for g in gradients]
    return dict(zip(names(config), back, strict=True))


def check(algorithm: dict[str, object], what: str, peers_sum) -> None:
    """peers_sum: (config, θ, batch) → Σ over tasks of the meta-gradient, by θ's names."""
    config = configured(algorithm, what)
    theta, state = parameters(config, SHAPES[what])
    batch = episodes(config, SHAPES[what])
    expected = peers_sum(config, theta, batch)
    for engine in (loop, vectorised):
        found = engine(for_training(config, SHAPES[what]), theta, state, batch, config.task.ways, 0)
        found = {n.removeprefix("gradient."): v for n, v in found.items() if n.startswith("gradient.")}
        assert relative(found, expected) < 1e-12


def total(batch: Episode, one_task) -> Tensor:
    """Σ over the episodes of one_task(support, query)."""
    return sum(one_task(*one_of(batch, number)[:2]) for number in range(len(batch.support.y)))


@pytest.mark.parametrize("what", NETWORKS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_maml_and_learn2learn(what: str, order: int, steps: int) -> None:
    algorithms = peer("learn2learn").algorithms

    def peers_sum(config: Config, theta: Named, batch: Episode) -> Named:
        network = plain_network(config, theta)
        maml = algorithms.MAML(network, lr=0.4, first_order=order == 1)

        def one_task(support, query):
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(F.cross_entropy(learner(support.x), support.y))
            return F.cross_entropy(learner(query.x), query.y)

        return ours(config, torch.autograd.grad(total(batch, one_task), list(network.parameters())))

    check({"name": "maml", "inner_steps": steps, "order": order, "inner_lr": 0.4}, what, peers_sum)


@pytest.mark.parametrize("what", NETWORKS)
@pytest.mark.parametrize("order", [1, 2])
def test_anil_and_learn2learn(what: str, order: int) -> None:
    """As its example does it: MAML of the head alone, on features that are computed once."""
    algorithms = peer("learn2learn").algorithms

    def peers_sum(config: Config, theta: Named, batch: Episode) -> Named:
        network = plain_network(config, theta)
        head = algorithms.MAML(network.head, lr=0.4, first_order=order == 1)

        def one_task(support, query):
            learner = head.clone()
            for _ in range(2):
                learner.adapt(F.cross_entropy(learner(network.features(support.x)), support.y))
            return F.cross_entropy(learner(network.features(query.x)), query.y)

        return ours(config, torch.autograd.grad(total(batch, one_task), list(network.parameters())))

    check({"name": "anil", "inner_steps": 2, "order": order, "inner_lr": 0.4}, what, peers_sum)


@pytest.mark.parametrize("what", NETWORKS)
@pytest.mark.parametrize("order", [1, 2])
def test_meta_sgd_and_learn2learn(what: str, order: int) -> None:
    algorithms = peer("learn2learn").algorithms

    def peers_sum(config: Config, theta: Named, batch: Episode) -> Named:
        network = plain_network(config, {n: v for n, v in theta.items() if not n.startswith("rate.")})
        rates = {n.removeprefix("rate."): v for n, v in theta.items() if n.startswith("rate.")}
        lrs = nn.ParameterList([nn.Parameter(value.clone()) for value in theirs(config, rates)])
        meta_sgd = algorithms.MetaSGD(network, lrs=lrs, first_order=order == 1)

        def one_task(support, query):
            learner = meta_sgd.clone()
            for _ in range(2):
                learner.adapt(F.cross_entropy(learner(support.x), support.y))
            return F.cross_entropy(learner(query.x), query.y)

        found = torch.autograd.grad(total(batch, one_task), [*network.parameters(), *lrs])
        half = len(lrs)
        of_rates = ours(config, list(found[half:]))
        return ours(config, list(found[:half])) | {f"rate.{name}": value for name, value in of_rates.items()}

    check({"name": "meta-sgd", "inner_steps": 2, "order": order, "inner_lr": 0.4}, what, peers_sum)


@pytest.mark.parametrize("what", NETWORKS)
def test_maml_and_higher(what: str) -> None:
    higher = peer("higher")

    def peers_sum(config: Config, theta: Named, batch: Episode) -> Named:
        network = plain_network(config, theta)
        inner = torch.optim.SGD(network.parameters(), lr=0.4)

        def one_task(support, query):
            with higher.innerloop_ctx(network, inner, copy_initial_weights=False) as (learner, descent):
                for _ in range(2):
                    descent.step(F.cross_entropy(learner(support.x), support.y))
                return F.cross_entropy(learner(query.x), query.y)

        return ours(config, torch.autograd.grad(total(batch, one_task), list(network.parameters())))

    check({"name": "maml", "inner_steps": 2, "order": 2, "inner_lr": 0.4}, what, peers_sum)


@pytest.mark.parametrize("what", NETWORKS)
def test_maml_and_torchopt(what: str) -> None:
    """Its `MetaSGD` is a differentiable step of plain SGD, not Meta-SGD."""
    torchopt = peer("torchopt")

    def peers_sum(config: Config, theta: Named, batch: Episode) -> Named:
        network = plain_network(config, theta)
        start = list(network.parameters())
        inner = torchopt.MetaSGD(network, lr=0.4)
        kept = [torchopt.extract_state_dict(one, by="reference") for one in (network, inner)]

        def one_task(support, query):
            for _ in range(2):
                inner.step(F.cross_entropy(network(support.x), support.y))
            loss = F.cross_entropy(network(query.x), query.y)
            for one, state in zip((network, inner), kept, strict=True):
                torchopt.recover_state_dict(one, state)
            return loss

        return ours(config, torch.autograd.grad(total(batch, one_task), start))

    check({"name": "maml", "inner_steps": 2, "order": 2, "inner_lr": 0.4}, what, peers_sum)
