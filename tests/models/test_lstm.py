"""The LSTM cell against torch's own."""

import pytest
import torch
from torch.func import vmap

from metadist.models.lstm import Memory, blank, init_lstm, lstm

INPUTS, HIDDEN = 3, 4


def problem(rows, tasks=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = {name: draw(*value.shape) for name, value in init_lstm("a", generator, INPUTS, HIDDEN).items()}
    lead = () if tasks is None else (tasks,)
    return params, draw(*lead, rows, INPUTS), draw(*lead, rows, HIDDEN), draw(*lead, rows, HIDDEN)


def reference(params, x, h, c):
    return torch.lstm_cell(x, (h, c), params["a.input"].T, params["a.recurrent"].T, params["a.bias"])


def gradients(step, params, x, h, c):
    """Of a sum that weighs every output differently, towards everything."""
    leaves = [value.clone().requires_grad_() for value in (*params.values(), x, h, c)]
    out = step(dict(zip(params, leaves, strict=False)), *leaves[-3:])
    weights = [torch.randn(v.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) for v in out]
    total = sum((w * v * v).sum() for w, v in zip(weights, out, strict=True))
    return [*(v.detach() for v in out), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("rows", [1, 7])
def test_values_and_gradients(rows):
    given = problem(rows)
    found = gradients(lambda p, x, h, c: lstm("a", p, x, Memory(h, c)), *given)
    for one, expected in zip(found, gradients(reference, *given), strict=True):
        assert (one - expected).abs().max() < 1e-12 * expected.abs().max()


def test_with_a_task_axis():
    """Tasks share the weights; their gradients are summed."""
    given = problem(6, tasks=3)

    def at_once(params, x, h, c):
        return vmap(lambda x, h, c: lstm("a", params, x, Memory(h, c)))(x, h, c)

    def one_by_one(params, x, h, c):
        each = [reference(params, *one) for one in zip(x, h, c, strict=True)]
        return [torch.stack(values) for values in zip(*each, strict=True)]

    for one, expected in zip(gradients(at_once, *given), gradients(one_by_one, *given), strict=True):
        assert (one - expected).abs().max() < 1e-12 * expected.abs().max()


def test_a_fresh_cell_remembers_and_a_blank_memory_is_empty():
    params = init_lstm("a", torch.Generator().manual_seed(0), INPUTS, HIDDEN)
    bias = params["a.bias"].view(4, HIDDEN)
    assert torch.equal(bias[1], torch.ones(HIDDEN)) and not bias[[0, 2, 3]].any()
    empty = blank("a", params, torch.ones(5, INPUTS))
    assert empty.hidden.shape == empty.cell.shape == (5, HIDDEN)
    assert not empty.hidden.any() and not empty.cell.any()
