"""Gradients and Hessian-vector products in closed form against autograd's, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from metadist.models import convolution
from metadist.models.closed_form import CACHE, closed_form
from metadist.models.conv4 import Conv4

TASKS, N, WAYS = 3, 4, 3
IMAGES = [(1, 16, 17), (3, 19, 16), (1, 28, 28)]


def networks(image):
    return [Conv4(image, WAYS, width=4, strided=strided) for strided in (False, True)]


def drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(network, image, own):
    """Parameters, of all tasks or their own, a direction, images and labels."""
    theta = network.init(torch.Generator().manual_seed(0))
    axis = (TASKS,) if own else ()
    params = {n: v.double() + 0.2 * drawn((*axis, *v.shape), k) for k, (n, v) in enumerate(theta.items())}
    direction = {n: drawn((TASKS, *v.shape), 50 + k) for k, (n, v) in enumerate(theta.items())}
    x = drawn((TASKS, N, *image), 99)
    return params, direction, x, torch.arange(N).remainder(WAYS).expand(TASKS, N)


def by_autograd(network, params, direction, x, y, own):
    def loss(params, x, y):
        logits, used = network(params, x)
        return F.cross_entropy(logits, y), (F.cross_entropy(logits, y), used)

    def one(params, v, x, y):
        def slope(params):
            return grad(loss, has_aux=True)(params, x, y)[0]

        return slope(params), grad(lambda p: sum((g * v[name]).sum() for name, g in slope(p).items()))(params)

    axes = (0 if own else None, 0, 0, 0)
    slope, product = vmap(one, axes)(params, direction, x, y)
    return slope, product, vmap(loss, (axes[0], 0, 0))(params, x, y)[1]


def close(found, expected):
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert float((found[name] - value).abs().max()) < 1e-12 * largest, name


@pytest.fixture(params=[1, 10**9], ids=["by oneDNN", "by products"])
def many_rows(request, monkeypatch):
    monkeypatch.setattr(convolution, "MANY_ROWS", request.param)
    monkeypatch.setattr(convolution, "MANY_POSITIONS", request.param)


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("image", IMAGES)
def test_equals_autograd(image, own):
    for network in networks(image):
        params, direction, x, y = problem(network, image, own)
        slope, product, (loss, used) = by_autograd(network, params, direction, x, y, own)
        form = closed_form(network)
        images = form.images(x)
        for at in (params, form.laid_out(params) if not own else params):
            found = form.gradient(at, images, y)
            close(found.gradient, slope)
            close(found.statistics, used)
            torch.testing.assert_close(found.loss, loss, rtol=1e-12, atol=0)
            close(form.hessian_product(found.record, direction), product)
            close(form.hessian_product(found.record, direction, together=True), summed(product))
            close(form.gradient(at, images, y, together=True).gradient, summed(slope))


def summed(values):
    return {name: value.sum(0) for name, value in values.items()}


def test_of_equal_pixels_one_passes():
    """Blank images: every window ties; what reaches the parameters does not depend on who passed."""
    network = Conv4((1, 16, 16), WAYS, width=4)
    params, direction, x, y = problem(network, (1, 16, 16), own=False)
    x[:, :, :, :, 5:] = 0
    slope, _, _ = by_autograd(network, params, direction, x, y, own=False)
    form = closed_form(network)
    assert all(value.isfinite().all() for value in form.gradient(params, form.images(x), y).gradient.values())
    close(form.gradient(params, form.images(x), y).gradient, slope)


@pytest.mark.parametrize("keys", [
    {"norm": "layer"}, {"norm": "none"}, {"activation": "tanh"}, {"pooling": "avg"}, {"hidden": 5}, {"outputs": None},
    {"maps": True}, {"pools": 2}, {"image": (4, 16, 16)},
], ids=str)  # fmt: skip
def test_other_networks_have_none(keys):
    assert closed_form(Conv4(**{"image": (1, 16, 16), "outputs": WAYS, **keys})) is None


def test_as_many_tasks_at_once_as_a_cache_holds():
    form = closed_form(Conv4((1, 28, 28), 5))
    of_an_image = 28 * 28 * 64 * 4
    few = CACHE // of_an_image // 3
    assert form.at_once(torch.zeros(8, 5, 1, 28, 28)) == 8
    assert form.at_once(torch.zeros(8, few, 1, 28, 28)) == 3
    assert form.at_once(torch.zeros(2, 4 * few, 1, 28, 28)) == 1
    assert closed_form(Conv4((1, 28, 28), 5, strided=True)).at_once(torch.zeros(99, few, 1, 28, 28)) == 12
