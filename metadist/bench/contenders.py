"""MAML as other libraries do it, on a plain `torch.nn` network: what tests and the bench compare our engines with.

Each contender sums the meta-gradient over the tasks of a batch, one task after the other, the way its own examples do.
"""

import importlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metadist.config import Config
from metadist.tasks.episode import Episode, Examples

Named = Mapping[str, Tensor]
OneTask = Callable[[Examples, Examples], Tensor]
"""Support and query set of one task → the queries' loss after adaptation, differentiable in the network's weights."""


class Means(nn.Module):
    """The mean over space, which the MAML paper's network has instead of a flat vector."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Flat(nn.Module):
    """All features of an image in one vector, channels last as ours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1).flatten(1)


def plain_network(config: Config, theta: Named) -> nn.Sequential:
    """`features` and `head` from `torch.nn`, with the values and the dtype of θ."""
    model = config.model
    layers: list[nn.Module] = []
    if model.name == "mlp":
        layers.append(nn.Flatten())
        for layer in range(1, model.layers + 1):
            inputs, outputs = theta[f"fc{layer}.weight"].shape
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, track_running_stats=False)]
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
    whole = nn.Sequential(OrderedDict(features=nn.Sequential(*layers), head=head)).to(theta["head.weight"])
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


def theirs(config: Config, theta: Named) -> list[Tensor]:
    """Ours in PyTorch's layout: [height, width, in, out] → [out, in, height, width], [in, out] → [out, in]."""
    return [v.permute(3, 2, 0, 1) if v.ndim == 4 else v.t() for v in (theta[name] for name in names(config))]


def ours(config: Config, gradients: list[Tensor]) -> dict[str, Tensor]:
    """PyTorch's layout back in ours."""
    back = [g.permute(2, 3, 1, 0) if g.ndim == 4 else g.t() for g in gradients]
    return dict(zip(names(config), back, strict=True))


def total(batch: Episode, one_task: OneTask) -> Tensor:
    """Σ over the episodes of one_task(support, query)."""
    losses = [one_task(support, query) for support, query in _each(batch)]
    return torch.stack(losses).sum()


def peer(name: str) -> ModuleType:
    """A library by name; ImportError where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def plain(config: Config, network: nn.Sequential) -> OneTask:
    """Nobody's library: `torch.func.functional_call` and autograd."""
    maml: Any = config.algorithm
    start: dict[str, Tensor] = {**dict(network.named_parameters())}

    def one_task(support: Examples, query: Examples) -> Tensor:
        fast = start
        for _ in range(maml.inner_steps):
            loss = F.cross_entropy(torch.func.functional_call(network, fast, (support.x,)), support.y)
            taken = torch.autograd.grad(loss, list(fast.values()), create_graph=maml.order == 2)
            fast = {name: fast[name] - maml.inner_lr * g for name, g in zip(fast, taken, strict=True)}
        return F.cross_entropy(torch.func.functional_call(network, fast, (query.x,)), query.y)

    return one_task


def learn2learn(config: Config, network: nn.Sequential) -> OneTask:
    """Its `MAML`."""
    maml: Any = config.algorithm
    learners = peer("learn2learn").algorithms.MAML(network, lr=maml.inner_lr, first_order=maml.order == 1)

    def one_task(support: Examples, query: Examples) -> Tensor:
        learner = learners.clone()
        for _ in range(maml.inner_steps):
            learner.adapt(F.cross_entropy(learner(support.x), support.y))
        return F.cross_entropy(learner(query.x), query.y)

    return one_task


def higher(config: Config, network: nn.Sequential) -> OneTask:
    """Its `innerloop_ctx`, on second order."""
    library, maml = peer("higher"), config.algorithm
    assert maml.name == "maml"
    inner = torch.optim.SGD(network.parameters(), lr=maml.inner_lr)

    def one_task(support: Examples, query: Examples) -> Tensor:
        with library.innerloop_ctx(network, inner, copy_initial_weights=False) as (learner, descent):
            for _ in range(maml.inner_steps):
                descent.step(F.cross_entropy(learner(support.x), support.y))
            return F.cross_entropy(learner(query.x), query.y)

    return one_task


def torchopt(config: Config, network: nn.Sequential) -> OneTask:
    """Its `MetaSGD`, which is a differentiable step of plain SGD, not Meta-SGD."""
    library, maml = peer("torchopt"), config.algorithm
    assert maml.name == "maml"
    inner = library.MetaSGD(network, lr=maml.inner_lr)
    kept = [library.extract_state_dict(one, by="reference") for one in (network, inner)]

    def one_task(support: Examples, query: Examples) -> Tensor:
        for _ in range(maml.inner_steps):
            inner.step(F.cross_entropy(network(support.x), support.y))
        loss = F.cross_entropy(network(query.x), query.y)
        for one, state in zip((network, inner), kept, strict=True):
            library.recover_state_dict(one, state)
        return loss

    return one_task


def meta_gradient(
    contender: Callable[[Config, nn.Sequential], OneTask], config: Config, theta: Named
) -> Callable[[Episode], dict[str, Tensor]]:
    """Episodes → Σ over the tasks of a contender's meta-gradient, by θ's names; each task goes backwards by itself."""
    network = plain_network(config, theta)
    start = list(network.parameters())
    one_task = contender(config, network)

    def found(batch: Episode) -> dict[str, Tensor]:
        sums: list[Tensor] = []
        for support, query in _each(batch):
            taken = torch.autograd.grad(one_task(support, query), start)
            sums = [one.add_(g) for one, g in zip(sums, taken, strict=True)] if sums else [g.clone() for g in taken]
        return ours(config, sums)

    return found


CONTENDERS: dict[str, tuple[Callable[[Config, nn.Sequential], OneTask], tuple[int, ...]]] = {
    "learn2learn": (learn2learn, (1, 2)),
    "TorchOpt": (torchopt, (2,)),
    "higher": (higher, (2,)),
}
"""The peers, and the orders they have: TorchOpt and higher have no first order that hands its gradient back to θ."""


def _each(batch: Episode) -> list[tuple[Examples, Examples]]:
    tasks = batch.family.shape[0]
    each = [tree_map(lambda value, i=i: value[i], batch) for i in range(tasks)]
    return [(one.support, one.query) for one in each]
