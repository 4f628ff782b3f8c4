"""The convolution against F.conv2d, to any order of differentiation, alone and under vmap."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from metadist.models import convolution
from metadist.models.convolution import convolve

SIZES = [(1, 1), (2, 3), (5, 4), (7, 7), (8, 5)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def torchs(x, weight, stride):
    return F.conv2d(x.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), stride=stride, padding=1).permute(0, 2, 3, 1)


def derivatives(convolution, x, weight, stride):
    inputs = [value.clone().requires_grad_() for value in (x, weight)]
    out = convolution(*inputs, stride)
    first = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), inputs, create_graph=True)
    return [out, *first, *second, *torch.autograd.grad(sum(g.sin().sum() for g in second), inputs)]


def close(found, expected, bound=1e-12):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= bound * other.abs().max()


@pytest.fixture(params=[1, 10**9], ids=["by oneDNN", "by products"], autouse=True)
def many_rows(request, monkeypatch):
    monkeypatch.setattr(convolution, "MANY_ROWS", request.param)
    monkeypatch.setattr(convolution, "MANY_POSITIONS", request.param)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [(1, 3), (3, 2)])
def test_equals_conv2d_to_the_third_derivative(channels, size, stride):
    x, weight = random(3, *size, channels[0]), random(3, 3, *channels, seed=1)
    close(derivatives(convolve, x, weight, stride), derivatives(torchs, x, weight, stride))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(3, 4), (4, 5)])
def test_gradients_by_finite_differences(size, stride):
    inputs = (random(2, *size, 2).requires_grad_(), random(3, 3, 2, 2, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: convolve(x, w, stride), inputs)
    assert torch.autograd.gradgradcheck(lambda x, w: convolve(x, w, stride), inputs)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("x_axis", "weight_axis"), [(0, 0), (0, None), (None, 0), (1, 0), (2, 3)])
def test_under_vmap(x_axis, weight_axis, stride):
    """Each, both or neither of images and weights batched, along any axis, differentiated twice."""
    tasks = 3
    x = random(2, 5, 4, 2) if x_axis is None else random(tasks, 2, 5, 4, 2).movedim(0, x_axis).contiguous()
    w = random(3, 3, 2, 3, seed=1)
    if weight_axis is not None:
        w = random(tasks, 3, 3, 2, 3, seed=1).movedim(0, weight_axis).contiguous()

    def batched(x, w, stride):
        return vmap(lambda x, w: convolve(x, w, stride), in_dims=(x_axis, weight_axis))(x, w)

    def plain(x, w, stride):
        xs = [x] * tasks if x_axis is None else x.unbind(x_axis)
        ws = [w] * tasks if weight_axis is None else w.unbind(weight_axis)
        return torch.stack([torchs(a, b, stride) for a, b in zip(xs, ws, strict=True)])

    close(derivatives(batched, x, w, stride), derivatives(plain, x, w, stride))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_gradient_inside_vmap_differentiated_outside(stride):
    """The engine's shape: functorch's grad inside of vmap, autograd's outside of it."""
    x, w = random(3, 2, 5, 4, 2), random(3, 3, 2, 3, seed=1)

    def step(convolution, x, w, grad):
        return w - 0.1 * grad(lambda w: convolution(x, w, stride).tanh().sum(), w)

    def outer(convolution, x, w, grad):
        return (convolution(x, step(convolution, x, w, grad), stride) ** 2).sin().sum()

    def functional(f, w):
        return torch.func.grad(f)(w)

    def autograd(f, w):
        return torch.autograd.grad(f(w), w, create_graph=True)[0]

    leaf = w.clone().requires_grad_()
    found = torch.autograd.grad(vmap(lambda x: outer(convolve, x, leaf, functional))(x).sum(), leaf)
    expected = torch.autograd.grad(sum(outer(torchs, one, leaf, autograd) for one in x), leaf)
    close(found, expected)


@pytest.mark.parametrize(("outside", "inside"), [(2, 3), (1, 2), (2, 1)])
def test_nested_vmap(outside, inside):
    x, w = random(outside, inside, 2, 5, 5, 1), random(outside, inside, 3, 3, 1, 2, seed=1)
    found = vmap(vmap(lambda x, w: convolve(x, w, 2)))(x, w)
    expected = torch.stack(
        [torch.stack([torchs(a, b, 2) for a, b in zip(*both, strict=True)]) for both in zip(x, w, strict=True)]
    )
    close([found], [expected])
