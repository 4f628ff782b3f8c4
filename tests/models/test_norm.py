"""The norms against torch.nn.functional: values, gradients, gradients of gradients, and under vmap."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from metadist.models.norm import EPSILON, batch_norm, layer_norm, own_batch_norm

SHAPES = [(6, 5, 4, 3), (7, 3), (2, 1, 1, 2)]
"""Channels last."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(channels):
    return 1 + 0.3 * random(channels, seed=1), 0.3 * random(channels, seed=2)


def ours_batch(x, scale, shift):
    return own_batch_norm(x, scale, shift)[0]


def handed_on(x, scale, shift):
    """The way of the support set's statistics: through the returned mean and variance."""
    return batch_norm(x, *own_batch_norm(x, scale, shift)[1:], scale, shift)


def torchs_batch(x, scale, shift):
    return F.batch_norm(x.movedim(-1, 1), None, None, scale, shift, training=True, eps=EPSILON).movedim(1, -1)


def torchs_layer(x, scale, shift):
    return F.layer_norm(x, x.shape[1:], eps=EPSILON) * scale + shift


PAIRS = [
    pytest.param(ours_batch, torchs_batch, id="batch"),
    pytest.param(handed_on, torchs_batch, id="batch-by-statistics"),
    pytest.param(layer_norm, torchs_layer, id="layer"),
]


def derivatives(norm, x, scale, shift):
    """Output, first derivatives of a nonlinear loss, and second derivatives through them."""
    inputs = [value.clone().requires_grad_() for value in (x, scale, shift)]
    out = norm(*inputs)
    first = torch.autograd.grad((out * random(*x.shape, seed=3)).tanh().sum(), inputs, create_graph=True)
    probe = sum((g * random(*g.shape, seed=4)).sum() for g in first)
    return [out, *first, *torch.autograd.grad(probe, inputs)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_equals_torch_to_the_second_derivative(ours, torchs, shape):
    arguments = (3 + 2 * random(*shape), *affine(shape[-1]))
    for found, expected in zip(derivatives(ours, *arguments), derivatives(torchs, *arguments), strict=True):
        assert (found - expected).abs().max() <= 1e-11 * (1 + expected.abs().max())


@pytest.mark.parametrize("norm", [ours_batch, handed_on, layer_norm])
def test_gradients_by_finite_differences(norm):
    arguments = [value.requires_grad_() for value in (random(4, 2, 2, 3), *affine(3))]
    assert torch.autograd.gradcheck(norm, arguments)
    assert torch.autograd.gradgradcheck(norm, arguments)


@pytest.mark.parametrize("batched_affine", [True, False])
@pytest.mark.parametrize("norm", [ours_batch, handed_on, layer_norm])
def test_second_order_under_vmap(norm, batched_affine):
    """grad(vmap(task)) is where torch's own batch norm is silently wrong (functorch issue 534)."""
    x = random(3, 6, 4, 2)
    scale, shift = affine(2)
    if batched_affine:
        scale, shift = scale * torch.tensor([[1.0], [2.0], [0.5]]).double(), shift.expand(3, 2).clone()
    ins = (0, 0, 0) if batched_affine else (0, None, None)

    def task(x, scale, shift):
        out = norm(x, scale, shift).tanh().sum()
        inner = torch.func.grad(lambda s: (norm(x, s, shift) ** 3).tanh().sum())(scale)
        return out + (norm(x, scale - 0.4 * inner, shift) ** 3).sin().sum()

    def gradient(batched):
        leaves = [value.clone().requires_grad_() for value in (x, scale, shift)]
        if batched:
            total = vmap(task, in_dims=ins)(*leaves).sum()
        else:
            rows = [[v[i] if d == 0 else v for v, d in zip(leaves, ins, strict=True)] for i in range(3)]
            total = torch.stack([task(*row) for row in rows]).sum()
        return torch.autograd.grad(total, leaves)

    for found, expected in zip(gradient(True), gradient(False), strict=True):
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_given_statistics_are_those_of_torchs_evaluation_mode():
    x, (scale, shift) = random(5, 4, 3, 2), affine(2)
    mean, variance = random(2, seed=5), random(2, seed=6).abs()
    expected = F.batch_norm(x.movedim(-1, 1), mean, variance, scale, shift, training=False, eps=EPSILON).movedim(1, -1)
    assert (batch_norm(x, mean, variance, scale, shift) - expected).abs().max() < 1e-13


def test_statistics_are_mean_and_biased_variance_and_differentiable():
    x = 100 + random(5, 4, 3, 2)

    def plain(x, scale, shift):
        flat = x.reshape(-1, 2)
        return flat.mean(0), flat.var(0, correction=0)

    def ours(x, scale, shift):
        return own_batch_norm(x, scale, shift)[1:]

    def both(statistics):
        leaf = x.clone().requires_grad_()
        mean, variance = statistics(leaf, *affine(2))
        (first,) = torch.autograd.grad((mean * variance).sin().sum(), leaf, create_graph=True)
        return [mean, variance, first, *torch.autograd.grad(first.sin().sum(), leaf)]

    for found, expected in zip(both(ours), both(plain), strict=True):
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("outside", [1, 2])
def test_nested_vmap(outside):
    x, (scale, shift) = random(outside, 3, 6, 4, 2), affine(2)
    scale = scale * (1 + torch.arange(outside * 3).view(outside, 3, 1))
    found = vmap(vmap(ours_batch, (0, 0, None)), (0, 0, None))(x, scale, shift)
    for i in range(outside):
        for j in range(3):
            assert (found[i, j] - torchs_batch(x[i, j], scale[i, j], shift)).abs().max() < 1e-12


def test_a_constant_channel_stays_finite():
    x = torch.full((4, 2, 2, 1), 0.3, dtype=torch.float64)
    values = derivatives(ours_batch, x, torch.ones(1).double(), torch.zeros(1).double())
    assert all(value.isfinite().all() for value in values)
    assert values[0].abs().max() < 1e-10
