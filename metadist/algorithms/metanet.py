"""Meta networks (Munkhdalai & Yu 2017): fast weights, generated from loss gradients, beside slow ones.

f(x) are features, Q the slow weights of the representation u, W those of the base learner b;
⊕ is layer augmentation, slow and fast weights side by side in one layer:

    u(Q ⊕ Q*, x) = relu(f(x) Q) + relu(f(x) Q*)
    b(W ⊕ W*, x) = h W_2 + h W_2*,   h = relu(f(x) W_1) + relu(f(x) W_1*)

Fast weights come from the support set, coordinate by coordinate, through two generators d and m
that all coordinates share, each an MLP, plus a linear map, of what `coordinates.preprocessed`
makes of one derivative:

    1. Q* = mean_i d(∇_Q ℓ(u(Q, x_i) V, y_i))         ℓ: cross-entropy of the i-th support example
    2. W*_i = m(∇_W ℓ(b(W, x_i), y_i)),  r_i = u(Q ⊕ Q*, x_i)
       memory: keys r_i, values W*_i
    3. query x: r = u(Q ⊕ Q*, x),  a = softmax_i(β cos(r, r_i)),  W* = Σ_i a_i W*_i
       logits = b(W ⊕ W*, x)

The loss is the queries' mean cross-entropy, over all slow weights, V, f and both generators.
Order 2 differentiates through the loss gradients. Order 1 takes them as constants; nothing then
trains V.

Simplifications. All layers of the paper's networks have fast weights; here the convolutions f
are slow and shared by u and b, and the layers behind them are augmented. d is the MLP of m, its
results averaged, in place of an LSTM over the support set, so that its order does not matter;
the linear maps are ours.
The paper's contrastive embedding loss for several shots is the cross-entropy of its one-shot
case here. β is 1 in the paper.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.algorithms import embedding
from metadist.algorithms.algorithm import Normalisation, Outcome, Predictor, State, Theta
from metadist.algorithms.context import Context
from metadist.algorithms.coordinates import preprocessed
from metadist.algorithms.objective import accuracy
from metadist.methods.memory import MetaNet as Keys
from metadist.models.layers import init_head, init_linear, linear
from metadist.models.network import Params
from metadist.tasks.episode import Episode, Examples

SLOW_U, SLOW_B = ("u.weight", "u.bias"), ("b1.weight", "b1.bias", "b2.weight", "b2.bias")
"""Names in θ of Q and of W."""


@dataclass(frozen=True)
class MetaNet:
    """shape: of one input; ways: outputs of b; hidden: units of u and of b; generator: of d and m; sharpness: β."""

    normalisation: Normalisation
    shape: tuple[int, ...]
    ways: int
    hidden: int = 64
    generator: int = 20
    sharpness: float = 1.0
    order: int = 2

    def init(self, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        theta = self.normalisation.network.init(generator)
        features = embedding.features_of(self.normalisation, theta, self.shape)
        theta |= init_linear("u", generator, features, self.hidden)
        theta |= init_linear("v", generator, self.hidden, self.ways)
        theta |= init_linear("b1", generator, features, self.hidden)
        head = init_head(generator, self.hidden, self.ways)
        theta |= {name.replace("head", "b2"): value for name, value in head.items()}
        for name in ("d", "m"):
            theta |= init_linear(f"{name}1", generator, 2, self.generator)
            theta |= init_linear(f"{name}2", generator, self.generator, self.generator)
            theta |= init_linear(f"{name}3", generator, self.generator, 1)
            # Fast weights begin as a short step down the sign of the gradient: of either sign, so that no layer of
            # them is dead behind its relu, and small beside the slow ones.
            theta[f"{name}3.weight"] = theta[f"{name}3.weight"] / 100
            theta[f"{name}.skip"] = torch.tensor([0.0, -0.1])
        return theta, self.normalisation.initial_state()

    def adapt(self, theta: Theta, state: State, support: Examples, ways: int) -> Predictor:
        features, embed = embedding.at_test(self.normalisation, theta, state, support)
        answer = self._read_in(theta, features, support.y)
        return lambda x: answer(embed(x))

    def task_loss(self, theta: Theta, state: State, episode: Episode, ways: int, step: int) -> Outcome:
        support, query, statistics = embedding.in_training(self.normalisation, theta, state, episode)
        logits = self._read_in(theta, support, episode.support.y)(query)
        return Outcome(F.cross_entropy(logits, episode.query.y), accuracy(logits, episode.query.y), statistics)

    def _read_in(self, theta: Theta, features: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """features [n, d], y int64 [n] → (query features [m, d] → logits [m, ways])."""
        fast_u = {name: value.mean(0) for name, value in self._fast(theta, "d", SLOW_U, features, y, _u_logits).items()}
        keys = _represent(theta, fast_u, features)
        values = self._fast(theta, "m", SLOW_B, features, y, _b_logits)

        def answer(queries: Tensor) -> Tensor:
            cosine = embedding.unit(_represent(theta, fast_u, queries)) @ embedding.unit(keys).T
            attention = torch.softmax(self.sharpness * cosine, 1)
            fast = {name: torch.tensordot(attention, value, 1) for name, value in values.items()}
            h = torch.relu(linear("b1", theta, queries)) + torch.relu(_each("b1", fast, queries))
            return linear("b2", theta, h) + _each("b2", fast, h)

        return answer

    def _fast(
        self, theta: Theta, which: str, slow: tuple[str, ...], features: Tensor, y: Tensor,
        logits: Callable[[Params, Theta, Tensor], Tensor],
    ) -> Params:  # fmt: skip
        """Fast weights of every support example for the layers named, each [n, …]."""
        given = theta if self.order == 2 else {name: value.detach() for name, value in theta.items()}
        inputs = features if self.order == 2 else features.detach()
        weights = {name: given[name] for name in slow}

        def loss(weights: Params, x: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(logits(weights, given, x[None]), label[None])

        gradient = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, inputs, y)
        return {name: _generated(which, theta, value) for name, value in gradient.items()}


def _u_logits(weights: Params, theta: Theta, x: Tensor) -> Tensor:
    """What the embedding loss judges: u(Q, x) V [n, ways]."""
    return linear("v", theta, torch.relu(linear("u", weights, x)))


def _b_logits(weights: Params, theta: Theta, x: Tensor) -> Tensor:
    """b(W, x) [n, ways]."""
    return linear("b2", weights, torch.relu(linear("b1", weights, x)))


def _represent(slow: Params, fast: Params, x: Tensor) -> Tensor:
    """u(Q ⊕ Q*, x) [n, hidden]."""
    return torch.relu(linear("u", slow, x)) + torch.relu(linear("u", fast, x))


def _each(name: str, params: Params, x: Tensor) -> Tensor:
    """A linear layer with weights of its own for every row of x: weight [n, in, out], bias [n, out]."""
    return (x[:, None] @ params[f"{name}.weight"])[:, 0] + params[f"{name}.bias"]


def _generated(which: str, theta: Theta, gradient: Tensor) -> Tensor:
    """One fast weight for every derivative, of the same shape."""
    seen = preprocessed(gradient)
    x = torch.relu(linear(f"{which}1", theta, seen))
    x = torch.relu(linear(f"{which}2", theta, x))
    return linear(f"{which}3", theta, x)[..., 0] + seen @ theta[f"{which}.skip"]


def build(method: Keys, context: Context) -> MetaNet:
    """Of a config."""
    return MetaNet(
        embedding.without_head(context),
        context.shape,
        context.ways,
        method.hidden,
        method.generator,
        method.sharpness,
        method.order,
    )
