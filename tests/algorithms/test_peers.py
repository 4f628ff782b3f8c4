"""Our meta-gradients against those of learn2learn, higher and TorchOpt, in float64 and from the same θ.

Each peer adapts a plain `torch.nn` network in its own way. How to install them: tests/README.md.
"""

import warnings
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from inner_loop_checks import SHAPES, configured, episodes
from plain_reference import Named, parameters, relative
from torch import nn

from metadist.algorithms import for_training
from metadist.bench.contenders import CONTENDERS, meta_gradient, ours, plain_network, theirs, total
from metadist.config import Config
from metadist.engine.shard import loop, vectorised
from metadist.tasks.episode import Episode

NETWORKS = ("stride2", "conv4", "mlp")


def peer(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"needs peers: {name} (see tests/README.md)")


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


@pytest.mark.parametrize("what", NETWORKS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("name", "order"), [(name, o) for name, (_, orders) in CONTENDERS.items() for o in orders])
def test_maml_and_the_contenders_of_the_bench(name: str, order: int, what: str, steps: int) -> None:
    peer(name.lower())
    contender, _ = CONTENDERS[name]
    algorithm = {"name": "maml", "inner_steps": steps, "order": order, "inner_lr": 0.4}
    check(algorithm, what, lambda config, theta, batch: meta_gradient(contender, config, theta)(batch))


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
