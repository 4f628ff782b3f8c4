"""What a network's parameters are, and what a config can ask for."""

import pytest
import torch

from metadist.config import Model
from metadist.errors import ConfigError
from metadist.models import build
from metadist.models.layers import glorot, init_head, pool

IMAGE = (1, 28, 28)


def counted(outputs, **model):
    network = build(Model(**model), IMAGE, outputs)
    params = network.init(torch.Generator().manual_seed(0))
    return network, params, sum(value.numel() for value in params.values())


def test_parameters_of_the_papers_networks():
    """Finn's Omniglot network: 4 × 64 filters of stride 2, mean over space; Snell's: 64 features."""
    _, _, stride2 = counted(5)
    assert stride2 == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64 + 64 * 5 + 5
    network, params, conv4 = counted(None, name="conv4")
    assert conv4 == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64
    assert network(params, torch.rand(2, *IMAGE))[0].shape == (2, 64)
    _, params, _ = counted(5, name="conv4-fc", hidden=30)
    assert params["fc1.weight"].shape == (64, 30)
    assert params["head.weight"].shape == (30, 5)
    network, params, _ = counted(None, name="conv4-fc", hidden=30)
    assert network(params, torch.rand(2, *IMAGE))[0].shape == (2, 30)
    _, _, mlp = counted(5, name="mlp", width=40, norm="none")
    assert mlp == 784 * 40 + 40 + 40 * 40 + 40 + 40 * 5 + 5


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("name", ["stride2", "conv4", "conv4-fc", "resnet12", "mlp"])
def test_statistics_used_have_the_names_and_shapes_of_the_state(name, norm):
    network, params, _ = counted(5, name=name, width=6, norm=norm)
    outputs, used = network(params, torch.rand(3, *IMAGE))
    state = network.statistics()
    assert outputs.shape == (3, 5)
    assert {n: v.shape for n, v in used.items()} == {n: v.shape for n, v in state.items()}
    assert bool(state) == (norm == "batch")
    assert all((value == (0 if name.endswith("mean") else 1)).all() for name, value in state.items())
    again, same = network(params, torch.rand(3, *IMAGE), used)
    assert again.shape == (3, 5)
    assert all(torch.equal(same[n], v) for n, v in used.items())


def test_the_same_generator_gives_the_same_parameters():
    _, one, _ = counted(5)
    _, two, _ = counted(5)
    network, _, _ = counted(5)
    other = network.init(torch.Generator().manual_seed(1))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_initial_scales():
    generator = torch.Generator().manual_seed(0)
    weight = glorot(generator, 3, 3, 16, 32)
    limit = (6 / (9 * (16 + 32))) ** 0.5
    assert 0.99 * limit < weight.abs().max() <= limit
    assert weight.std() == pytest.approx(limit / 3**0.5, rel=0.05)
    head = init_head(generator, 64, 5)
    assert head["head.weight"].abs().max() <= 0.02
    assert not head["head.bias"].any()


@pytest.mark.parametrize("size", [(4, 6), (5, 4), (7, 3)])
def test_pooling_drops_an_odd_last_row_or_column(size):
    x = torch.randn(2, *size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind, torchs in [("max", torch.nn.functional.max_pool2d), ("avg", torch.nn.functional.avg_pool2d)]:
        expected = torchs(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        assert torch.allclose(pool(kind, x), expected, rtol=1e-15, atol=1e-16)


@pytest.mark.parametrize("name", ["conv4", "conv4-fc", "resnet12"])
def test_images_too_small_for_four_poolings_are_refused(name):
    with pytest.raises(ConfigError, match=rf"model\.name: {name} .*16 pixels"):
        build(Model(name=name), (1, 28, 15), 5)
    build(Model(name="stride2"), (1, 5, 5), 5)


def torchs_resnet12(params, x, widths):
    """ResNet-12 from torch's own layers, channels first, batch statistics; parameters by our names."""
    F = torch.nn.functional
    for number in range(1, 5):

        def layer(part, x, number=number):
            name = f"block{number}.{part}"
            weight = params[f"{name}.weight"].permute(3, 2, 0, 1)
            x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
            scale, shift = params[f"{name}.norm.scale"], params[f"{name}.norm.shift"]
            return F.batch_norm(x, None, None, scale, shift, training=True)

        inner = x
        for part in ("conv1", "conv2"):
            inner = F.leaky_relu(layer(part, inner), 0.1)
        x = F.max_pool2d(F.leaky_relu(layer("conv3", inner) + layer("around", x), 0.1), 2)
        assert x.shape[1] == widths[number - 1]
    return F.linear(x.mean((2, 3)), params["head.weight"].T, params["head.bias"])


def test_resnet12_is_that_of_the_literature():
    """MetaOptNet's: 64, 160, 320, 640 channels, 12.4 million parameters, 50 MB, maps of 84, 42, 21, 10 pixels."""
    network = build(Model(name="resnet12", activation="leaky-relu"), (3, 84, 84), None)
    params = network.init(torch.Generator().manual_seed(0))
    widths = [64, 160, 320, 640]
    inputs = [3, *widths[:-1]]
    weights = sum(9 * i * w + 2 * 9 * w * w + i * w for i, w in zip(inputs, widths, strict=True))
    assert sum(value.numel() for value in params.values()) == weights + sum(8 * w for w in widths)
    assert 12.4e6 < weights < 12.5e6
    network = build(Model(name="resnet12", width=4, activation="leaky-relu"), (3, 37, 34), 5)
    generator = torch.Generator().manual_seed(0)
    params = {
        n: v.double() + 0.1 * torch.rand(v.shape, generator=generator) for n, v in network.init(generator).items()
    }
    x = torch.rand(3, 3, 37, 34, generator=generator, dtype=torch.float64)
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    found, expected = network(leaves, x)[0], torchs_resnet12(leaves, x, [4, 10, 20, 40])
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    # And so are its first and second derivatives.
    directions = [torch.rand(v.shape, generator=generator, dtype=torch.float64) for v in leaves.values()]
    each = []
    for outputs in (found, expected):
        gradient = torch.autograd.grad(outputs.square().sum(), list(leaves.values()), create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(gradient, directions, strict=True))
        each.append((gradient, torch.autograd.grad(slope, list(leaves.values()))))
    for one, other in zip(*each, strict=True):
        largest = max(float(value.detach().abs().max()) for value in other)
        assert max(float((a - b).detach().abs().max()) for a, b in zip(one, other, strict=True)) < 1e-10 * largest
