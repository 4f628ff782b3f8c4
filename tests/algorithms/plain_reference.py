"""The methods once more, from the papers' formulas and torch.nn.functional alone.

Nothing here uses metadist's networks, norms, convolution or engines: one task after the
other, `F.conv2d`, `F.batch_norm` in training mode, `torch.autograd.grad`. Only the names
and layouts of the parameters are shared, so that results can be compared.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms import for_training
from metadist.algorithms.algorithm import Algorithm
from metadist.config import Config, Model, validate
from metadist.engine.engine import Blueprint
from metadist.tasks.episode import Episode, Examples

Named = dict[str, Tensor]
Given = dict[str, tuple[Tensor, Tensor]]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "softplus": F.softplus, "tanh": torch.tanh}


# --- what the tests start from -------------------------------------------------


def config_of(**sections: dict[str, object]) -> Config:
    """A config in float64 on the CPU with a narrow network."""
    raw: dict[str, dict[str, object]] = {"engine": {"dtype": "float64", "device": "cpu"}, "model": {"width": 4}}
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    if raw["model"].get("name") == "conv4-fc":
        raw["model"].setdefault("hidden", 6)
    return validate(raw, "test")


def parameters(config: Config, image: tuple[int, int, int], seed: int = 0) -> tuple[Named, Named]:
    """θ and state in float64, away from the special values (0, 1) of an initialisation."""
    blueprint = Blueprint(config, image)
    generator = torch.Generator().manual_seed(seed)

    def shaken(value: Tensor) -> Tensor:
        return value + 0.2 * torch.randn(value.shape, generator=generator, dtype=torch.float64)

    theta = {name: shaken(value) for name, value in blueprint.theta.items()}
    return theta, {name: shaken(value).abs() for name, value in blueprint.state.items()}


def episodes_of(config: Config, image: tuple[int, int, int], tasks: int = 2, seed: int = 1) -> Episode:
    """Random images: no two patches are alike, so that a maximum has one argument."""
    generator = torch.Generator().manual_seed(seed)
    ways = config.task.ways

    def examples(each: int) -> Examples:
        x = torch.rand(tasks, ways * each, *image, generator=generator, dtype=torch.float64)
        return Examples(x, torch.arange(ways).repeat(each).expand(tasks, -1))

    classes = torch.arange(ways).expand(tasks, -1)
    return Episode(examples(config.task.shots), examples(config.task.queries), classes, torch.arange(tasks))


def one_of(episodes: Episode, task: int) -> Episode:
    (sx, sy), (qx, qy), classes, family = episodes
    return Episode(Examples(sx[task], sy[task]), Examples(qx[task], qy[task]), classes[task], family[task])


def method(config: Config, image: tuple[int, int, int]) -> Algorithm:
    return for_training(config, image)


def relative(found: Named, expected: Named) -> float:
    """The largest error of any tensor, relative to that tensor's largest element.

    A gradient that is zero but for rounding, such as that of a bias which moves queries and
    prototypes alike, is measured against a hundredth of the largest of all.
    """
    assert found.keys() == expected.keys()
    least = max(float(e.abs().max()) for e in expected.values()) / 100
    return max(float((found[n] - e).abs().max()) / max(float(e.abs().max()), least) for n, e in expected.items())


# --- networks ------------------------------------------------------------------


def network(model: Model, params: Named, x: Tensor, given: Given | None = None) -> tuple[Tensor, Given]:
    """Outputs, and mean and biased variance of what each batch norm saw."""
    seen: Given = {}

    def norm(name: str, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        as_channels = [1, -1] + [1] * (x.ndim - 2)
        if model.norm == "none":
            return x + params[f"{name}.bias"].view(as_channels)
        scale, shift = params[f"{name}.norm.scale"], params[f"{name}.norm.shift"]
        if model.norm == "layer":
            x = F.layer_norm(x, x.shape[1:])
            return x * scale.view(as_channels) + shift.view(as_channels)
        if given is None:
            mean = x.mean(axes)
            seen[name] = mean, ((x - mean.view(as_channels)) ** 2).mean(axes)
            return F.batch_norm(x, None, None, scale, shift, training=True)
        mean, variance = seen[name] = given[name]
        # F.batch_norm takes no gradient with respect to given statistics.
        x = (x - mean.view(as_channels)) / torch.sqrt(variance.view(as_channels) + 1e-5)
        return x * scale.view(as_channels) + shift.view(as_channels)

    activate = ACTIVATIONS[model.activation]
    if model.name == "mlp":
        x = x.flatten(1)
        for layer in range(1, model.layers + 1):
            x = activate(norm(f"fc{layer}", x @ params[f"fc{layer}.weight"]))
    else:
        for block in ("conv1", "conv2", "conv3", "conv4"):
            weight = params[f"{block}.weight"].permute(3, 2, 0, 1)
            x = F.conv2d(x, weight, stride=2 if model.name == "stride2" else 1, padding=1)
            x = activate(norm(block, x))
            if model.name != "stride2":
                x = F.max_pool2d(x, 2) if model.pool == "max" else F.avg_pool2d(x, 2)
        x = x.mean((2, 3)) if model.name == "stride2" else x.permute(0, 2, 3, 1).flatten(1)
        if model.name == "conv4-fc":
            x = activate(x @ params["fc1.weight"] + params["fc1.bias"])
            if "fc2.weight" in params:
                x = x @ params["fc2.weight"] + params["fc2.bias"]
    if "head.weight" in params:
        x = x @ params["head.weight"] + params["head.bias"]
    return x, seen


def stored(seen: Given) -> Named:
    """Statistics under the names that metadist's state has."""
    return {
        f"{n}.norm.{k}": v.detach() for n, pair in seen.items() for k, v in zip(("mean", "variance"), pair, strict=True)
    }


# --- methods -------------------------------------------------------------------


def support_loss(config: Config, params: Named, support: Examples) -> Tensor:
    return F.cross_entropy(network(config.model, params, support.x)[0], support.y)


def maml_task(config: Config, theta: Named, episode: Episode, how: str) -> tuple[Tensor, Tensor, Named]:
    """Loss, logits and statistics of one task; `how` is together or support."""
    algorithm = config.algorithm
    fast = dict(theta)
    for _ in range(algorithm.inner_steps):
        loss = support_loss(config, fast, episode.support)
        gradient = torch.autograd.grad(loss, list(fast.values()), create_graph=algorithm.order == 2)
        fast = {n: v - algorithm.inner_lr * g for (n, v), g in zip(fast.items(), gradient, strict=True)}
    given = network(config.model, fast, episode.support.x)[1] if how == "support" else None
    logits, seen = network(config.model, fast, episode.query.x, given)
    loss = F.cross_entropy(logits, episode.query.y)
    loss = loss + algorithm.support_loss_weight * support_loss(config, theta, episode.support)
    return loss, logits, stored(seen)


def protonet_task(config: Config, theta: Named, episode: Episode, how: str) -> tuple[Tensor, Tensor, Named]:
    """The same for prototypical networks, logits written as distances."""
    features, seen = network(config.model, theta, episode.support.x)
    embedded, seen_too = network(config.model, theta, episode.query.x, seen if how == "support" else None)
    ways = config.task.ways
    centres = torch.stack([features[episode.support.y == k].mean(0) for k in range(ways)])
    if config.algorithm.distance == "euclidean":
        score = -((embedded[:, None] - centres[None]) ** 2).sum(-1)
    else:
        score = F.cosine_similarity(embedded[:, None], centres[None], dim=-1)
    logits = config.algorithm.temperature * score
    one, two = stored(seen), stored(seen_too)
    return F.cross_entropy(logits, episode.query.y), logits, {n: (one[n] + two[n]) / 2 for n in one}


def reptile_direction(config: Config, theta: Named, support: Examples) -> Named:
    """θ − φ with the optimizers of torch.optim."""
    algorithm = config.algorithm
    fast = {name: value.clone().requires_grad_() for name, value in theta.items()}
    if algorithm.inner_optimizer == "adam":
        optimizer = torch.optim.Adam(list(fast.values()), lr=algorithm.inner_lr, betas=(0.0, 0.999), eps=1e-8)
    else:
        optimizer = torch.optim.SGD(list(fast.values()), lr=algorithm.inner_lr)
    size = len(support.y)
    batch = min(algorithm.inner_batch or size, size)
    position = 0
    for _ in range(algorithm.inner_steps):
        rows = [(position + i) % size for i in range(batch)]
        position += batch
        optimizer.zero_grad()
        support_loss(config, fast, Examples(support.x[rows], support.y[rows])).backward()
        optimizer.step()
    return {name: (theta[name] - fast[name]).detach() for name in theta}


def sums(config: Config, theta: Named, episodes: Episode, how: str = "together") -> Named:
    """What an engine returns for these episodes under MAML or prototypical networks."""
    task_of = maml_task if config.algorithm.name == "maml" else protonet_task
    total: Named = {}
    for task in range(len(episodes.support.y)):
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        loss, logits, statistics = task_of(config, leaves, one_of(episodes, task), how)
        gradient = torch.autograd.grad(loss, list(leaves.values()))
        right = (logits.argmax(-1) == episodes.query.y[task]).double().mean()
        one = {f"gradient.{n}": g for n, g in zip(leaves, gradient, strict=True)}
        if config.model.statistics == "running":
            one |= {f"statistics.{n}": s for n, s in statistics.items()}
        one |= {"metric.loss": loss.detach(), "metric.score": right}
        total = {n: total[n] + v if total else v for n, v in one.items()}
    return total
