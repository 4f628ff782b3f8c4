"""What is sent of a gradient: how large, how near, and that with error feedback nothing is lost."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.config import Outer
from metadist.engine.compression import Compression
from metadist.engine.layout import Layout

SHAPES = {"a.weight": (4, 5), "b": (7,), "c": (), "d.weight": (3, 1, 2)}
ELEMENTS = sum(math.prod(shape) for shape in SHAPES.values())


def sums_layout(dtype=torch.float64):
    tensors = {f"gradient.{name}": torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    scalar = torch.zeros((), dtype=dtype)
    return Layout.of(tensors | {"statistics.mean": torch.zeros(2), "metric.loss": scalar, "metric.score": scalar})


def compression(kind, dtype=torch.float64, **keys):
    return Compression(Outer(compression=kind, **keys), sums_layout(dtype), dtype)


def sums(seed, dtype=torch.float64):
    """Of float32 numbers, as workers have them."""
    generator = torch.Generator().manual_seed(seed)
    layout = sums_layout()
    scale = {name: 10.0 ** (index - 2) for index, name in enumerate(layout.names)}
    named = zip(layout.names, layout.shapes, strict=True)
    return {n: (torch.randn(shape, generator=generator) * scale[n]).to(dtype) for n, shape in named}


def gradients(found):
    return {name.removeprefix("gradient."): v for name, v in found.items() if name.startswith("gradient.")}


KINDS = {
    "bf16": ({}, 2 * ELEMENTS),
    "int8": ({}, ELEMENTS + 4 * len(SHAPES)),
    "topk": ({"topk": 0.1}, (2 + 1 + 1 + 1) * (4 + 8)),
}
"""Keys, and bytes of the gradient's part."""


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_that_of_the_shapes(kind):
    keys, size = KINDS[kind]
    for seed in range(3):
        payload, _ = compression(kind, **keys).compress(sums(seed), {})
        assert payload.dtype == np.uint8
        assert len(payload) == sum(compression(kind, **keys).sizes) == size + 8 * (2 + 2)
    half = compression(kind, torch.float32, **keys).compress(sums(0, torch.float32), {})[0]
    assert len(half) == (size if kind != "topk" else 5 * (4 + 4)) + 4 * (2 + 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_and_metrics_travel_as_they_are(kind, dtype):
    compressed, given = compression(kind, dtype, **KINDS[kind][0]), sums(4, dtype)
    found = compressed.decompress(compressed.compress(given, {})[0])
    assert found.keys() == given.keys()
    for name, value in found.items():
        assert (value.dtype, value.shape) == (torch.float64, given[name].shape)
        same = torch.equal(value, given[name].double())
        # Of a scalar topk sends the largest element, too.
        assert same is (not name.startswith("gradient.") or (name == "gradient.c" and kind == "topk")), name


def test_bf16_is_torchs_and_keeps_nothing():
    payload, left = compression("bf16").compress(sums(1), {"b": torch.ones(7)})
    assert left == {}
    for name, value in gradients(compression("bf16").decompress(payload)).items():
        assert torch.equal(value, sums(1)[f"gradient.{name}"].bfloat16().double())


floats = st.floats(-1e6, 1e6, width=32)


@given(st.lists(floats, min_size=7, max_size=7))
def test_int8_is_half_a_step_off_at_most(values):
    given = sums(2) | {"gradient.b": torch.tensor(values, dtype=torch.float64)}
    payload, left = compression("int8").compress(given, {})
    found = gradients(compression("int8").decompress(payload))
    for name, value in gradients(given).items():
        step = float(value.abs().max()) / 127
        # The scale is a float32: at the ends 127 of its roundings, near its smallest number all of it.
        assert float((found[name] - value).abs().max()) <= step / 2 * (1 + 1e-5) + 127 * 2.0**-149
        assert torch.equal(left[name], value - found[name])


@given(st.lists(floats, min_size=7, max_size=7), st.sampled_from([0.01, 0.3, 0.5, 1.0]))
def test_topk_keeps_the_largest_and_of_equal_ones_the_first(values, fraction):
    given = sums(3) | {"gradient.b": torch.tensor(values, dtype=torch.float64)}
    compressed = compression("topk", topk=fraction)
    payload, left = compressed.compress(given, {})
    for name, value in gradients(compressed.decompress(payload)).items():
        flat, kept = gradients(given)[name].reshape(-1), math.ceil(fraction * value.numel())
        order = sorted(range(len(flat)), key=lambda i: (-abs(float(flat[i])), i))[:kept]
        expected = torch.zeros_like(flat)
        expected[order] = flat[order]
        assert torch.equal(value.reshape(-1), expected)
        assert torch.equal(left[name].reshape(-1), flat - expected)


def exact(tensor):
    return [Fraction(value) for value in tensor.reshape(-1).tolist()]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["int8", "topk"]), st.lists(st.integers(0, 10**6), min_size=1, max_size=8))
def test_nothing_is_lost(kind, seeds):
    """Over all steps: what arrived and the last residual are what was computed, to the last bit, in float64."""
    compressed, residual = compression(kind, **KINDS[kind][0]), {}
    arrived = {name: [Fraction(0)] * math.prod(shape) for name, shape in SHAPES.items()}
    computed = {name: list(value) for name, value in arrived.items()}
    for seed in seeds:
        given = {n: torch.round(v * 2**20) / 2**20 if v.ndim else v for n, v in sums(seed).items()}
        payload, residual = compressed.compress(given, residual)
        came = gradients(compressed.decompress(payload))
        for name, value in gradients(given).items():
            arrived[name] = [a + b for a, b in zip(arrived[name], exact(came[name]), strict=True)]
            computed[name] = [a + b for a, b in zip(computed[name], exact(value), strict=True)]
    for name in SHAPES:
        found = [a + b for a, b in zip(arrived[name], exact(residual[name]), strict=True)]
        assert found == computed[name], name


@pytest.mark.parametrize("kind", ["int8", "topk"])
def test_forgetting_the_residual_would_show(kind):
    """A constant gradient whose small elements are never sent by themselves."""
    small = sums(0) | {"gradient.b": torch.tensor([1000.0, 1, 1, 1, 1, 1, 1], dtype=torch.float64)}
    compressed = compression(kind, **KINDS[kind][0])
    fed_back, forgot, residual = torch.zeros(7).double(), torch.zeros(7).double(), {}
    for _ in range(2000):
        payload, residual = compressed.compress(small, residual)
        fed_back += compressed.decompress(payload)["gradient.b"]
        forgot += compressed.decompress(compressed.compress(small, {})[0])["gradient.b"]
    assert fed_back[1:].min() > 900, "topk lets each of them wait until it is the largest"
    assert torch.allclose(fed_back + residual["b"], 2000 * small["gradient.b"], rtol=1e-12)
    assert forgot[1:].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 3e38])
def test_extremes(kind, value):
    """Nothing, float32's smallest number, its largest ones: finite, and lost nowhere but in the residual."""
    given = sums(0, torch.float32) | {"gradient.b": torch.full((7,), value)}
    compressed = compression(kind, torch.float32, **KINDS[kind][0])
    payload, left = compressed.compress(given, {})
    found = compressed.decompress(payload)["gradient.b"]
    assert bool(found.isfinite().all())
    if left:
        assert torch.allclose(left["b"].double() + found, given["gradient.b"].double(), rtol=1e-6, atol=0)


def test_the_default_fraction():
    assert compression("topk").sizes == compression("topk", topk=0.01).sizes
