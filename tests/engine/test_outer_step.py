"""The outer step against torch.optim, its memory, the schedules, clipping."""

import itertools
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metadist.config import Outer
from metadist.engine.layout import BLOCK
from metadist.engine.outer import STATE_MOMENTUM, OuterStep, learning_rate, moved_state

OPTIMIZERS = {
    "adam": ({"optimizer": "adam", "weight_decay": 0.01}, lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.01)),
    "adamw": ({"optimizer": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1)),
    "sgd": ({"optimizer": "sgd"}, lambda p: torch.optim.SGD(p, 0.05)),
    "momentum": ({"optimizer": "sgd", "momentum": 0.9}, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)),
    "nesterov": (
        {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "rmsprop": ({"optimizer": "rmsprop"}, lambda p: torch.optim.RMSprop(p, 0.05)),
    "rmsprop-momentum": (
        {"optimizer": "rmsprop", "momentum": 0.5}, lambda p: torch.optim.RMSprop(p, 0.05, momentum=0.5)
    ),
}  # fmt: skip


def start(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"w.b": (3, 2), "a": (4,), "w": (), "rate.a": (4,)}  # one name ends with another
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def gradient(step):
    generator = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in start().items()}


def outer(**changes):
    return Outer(lr=0.05, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_equals_torch_optim(name, dtype):
    settings, make = OPTIMIZERS[name]
    ours = OuterStep(outer(**settings), start(dtype))
    plain = {n: v.clone().requires_grad_() for n, v in start(dtype).items()}
    optimizer = make(list(plain.values()))
    for step in range(10):
        ours.step(gradient(step), step)
        for n, g in gradient(step).items():
            plain[n].grad = g.to(dtype)
        optimizer.step()
    for n in plain:
        assert torch.allclose(ours.theta[n], plain[n], rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)
        assert ours.theta[n].dtype == dtype
        assert not torch.equal(ours.theta[n], start(dtype)[n])


def test_the_given_theta_is_left_alone():
    theta = start()
    OuterStep(outer(), theta).step(gradient(0), 0)
    assert all(torch.equal(theta[n], v) for n, v in start().items())


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_its_memory_continues_to_the_bit(name):
    settings, _ = OPTIMIZERS[name]
    settings = {**settings, "schedule": "cosine", "steps": 12, "warmup": 3, "clip": 1.0}
    through = OuterStep(outer(**settings), start(torch.float32))
    for step in range(5):
        through.step(gradient(step), step)
    memory = through.memory()
    assert all(isinstance(value, torch.Tensor) for value in memory.values())
    kept = {n: v.detach().clone() for n, v in memory.items()}
    resumed = OuterStep(outer(**settings), {n: v.detach() for n, v in through.theta.items()})
    resumed.remember(memory)
    for step in range(5, 10):
        assert through.step(gradient(step), step) == resumed.step(gradient(step), step)
    assert all(torch.equal(through.theta[n], resumed.theta[n]) for n in through.theta)
    assert all(torch.equal(v, resumed.memory()[n]) for n, v in through.memory().items())
    assert all(torch.equal(kept[n], memory[n]) for n in memory)  # copies both ways
    if name == "adam":
        assert set(memory) == {"step"} | {f"{key}.{n}" for key in ("exp_avg", "exp_avg_sq") for n in start()}
    if name == "sgd":
        assert memory == {}


@pytest.mark.parametrize("name", ["adam", "momentum", "rmsprop"])
def test_forgetting_would_show(name):
    settings, _ = OPTIMIZERS[name]
    through = OuterStep(outer(**settings), start())
    for step in range(5):
        through.step(gradient(step), step)
    forgetful = OuterStep(outer(**settings), {n: v.detach() for n, v in through.theta.items()})
    through.step(gradient(5), 5)
    forgetful.step(gradient(5), 5)
    assert not torch.equal(through.theta["a"], forgetful.theta["a"])


def test_clipping_scales_the_whole_gradient():
    free, clipped = OuterStep(outer(optimizer="sgd"), start()), OuterStep(outer(optimizer="sgd", clip=0.5), start())
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradient(0).values()))
    assert norm > 0.5
    assert free.step(gradient(0), 0) == pytest.approx(norm, rel=1e-14)
    assert clipped.step(gradient(0), 0) == pytest.approx(norm, rel=1e-14)  # of the gradient before clipping
    for n, g in gradient(0).items():
        assert torch.allclose(start()[n] - free.theta[n], 0.05 * g, rtol=1e-12)
        assert torch.allclose(start()[n] - clipped.theta[n], 0.05 * g * 0.5 / norm, rtol=1e-12)
    unclipped = OuterStep(outer(optimizer="sgd", clip=norm * 1.01), start())
    unclipped.step(gradient(0), 0)
    assert all(torch.equal(unclipped.theta[n], free.theta[n]) for n in free.theta)


def test_clipping_a_zero_gradient():
    still = OuterStep(outer(optimizer="sgd", clip=1.0), start())
    assert still.step({n: torch.zeros_like(v) for n, v in start().items()}, 0) == 0
    assert all(torch.equal(still.theta[n], v) for n, v in start().items())


# --- blocks --------------------------------------------------------------------

shapes = st.lists(
    st.sampled_from([(), (0,), (1,), (3, 2), (31,), (64,), (5, 13), (127,), (2, 64), (3, 43), (1000,)]),
    min_size=1, max_size=6,
)  # fmt: skip


def drawn(shapes, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    each = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return {f"w{number}": value.to(dtype) for number, value in enumerate(each)}


def squares(gradient, stretch):
    """Every tensor's, in stretches."""
    parts = {name: torch.split(value.reshape(-1).square(), stretch) for name, value in sorted(gradient.items())}
    return [math.fsum(float(part.sum()) for part in each) for each in parts.values()]


class Plain:
    """The outer step on one flat tensor, every pass over all of it; padded, so that it is all whole vectors."""

    def __init__(self, settings, make, theta, stretch):
        self.outer, self.names, self.stretch = outer(**settings), sorted(theta), stretch
        self.size = sum(value.numel() for value in theta.values())
        self.padded = self.flatten(theta).requires_grad_()
        self.optimizer = make([self.padded])
        (group,) = self.optimizer.param_groups
        group |= {"foreach": False} | ({"fused": True} if "fused" in group else {})

    @property
    def flat(self):
        return self.padded.detach()[: self.size]

    def flatten(self, tensors):
        flat = torch.cat([tensors[name].reshape(-1) for name in self.names])
        return torch.nn.functional.pad(flat, (0, -len(flat) % 64))

    def step(self, gradient, step):
        norm = math.sqrt(sum(squares(gradient, self.stretch)))
        factor = self.outer.clip / norm if self.outer.clip is not None and norm > self.outer.clip else 1.0
        self.padded.grad = self.flatten({n: (g * factor).to(self.padded.dtype) for n, g in gradient.items()})
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = learning_rate(self.outer, step), self.outer.weight_decay
        self.optimizer.step()
        return norm

    def memory(self, shapes):
        """As a checkpoint has it."""
        found = {}
        for key, value in self.optimizer.state_dict()["state"].get(0, {}).items():
            if value is not None and value.shape == self.padded.shape:
                parts = torch.split(value[: self.size], [math.prod(shape) for shape in shapes])
                found |= {f"{key}.{n}": p.reshape(s) for n, p, s in zip(self.names, parts, shapes, strict=True)}
            elif value is not None:
                found[key] = value
        return found


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].numpy().tobytes() == value.detach().numpy().tobytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
@given(shapes, st.integers(0, 1000), st.sampled_from([None, 0.1, 1e9]))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_change_no_bit(small_blocks, name, dtype, shapes, seed, clip):
    """Of θ, norm and memory against the same optimizer on one flat tensor, whose memory continues in blocks."""
    chosen, make = OPTIMIZERS[name]
    chosen = {**chosen, "schedule": "cosine", "steps": 9, "warmup": 2, "clip": clip}
    theta = drawn(shapes, seed, dtype)
    plain, blocked = Plain(chosen, make, theta, 64), OuterStep(outer(**chosen), theta)
    resumed = None
    for step in range(6):
        gradient = drawn(shapes, 7 * seed + step)
        expected = plain.step(gradient, step)
        for one in (blocked, *([resumed] if resumed else [])):
            assert one.step(gradient, step) == expected
            assert one.flat.numpy().tobytes() == plain.flat.detach().numpy().tobytes()
            same(one.memory(), plain.memory(shapes))
        if step == 2:
            resumed = OuterStep(outer(**chosen), blocked.theta)
            resumed.remember(plain.memory(shapes))


def test_blocks_as_large_as_they_are_change_no_bit():
    chosen, make = OPTIMIZERS["adam"]
    shapes = [(3, 7), (BLOCK + 1,), (2, BLOCK // 2), (BLOCK * 2 + 77,), (), (5,)]
    theta = drawn(shapes, 0, torch.float32)
    plain, blocked = Plain(chosen, make, theta, BLOCK), OuterStep(outer(**chosen), theta)
    for step in range(3):
        gradient = drawn(shapes, 1 + step)
        assert blocked.step(gradient, step) == plain.step(gradient, step)
        assert blocked.flat.numpy().tobytes() == plain.flat.detach().numpy().tobytes()
        same(blocked.memory(), plain.memory(shapes))


@given(shapes, st.integers(0, 1000))
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_squares_are_those_of_every_tensor(small_blocks, shapes, seed):
    gradient, moving = drawn(shapes, seed), OuterStep(outer(), drawn(shapes, 0))
    flat = moving.layout.flatten(gradient)
    scratch = threading.local()  # each block overwrites the one before, of the same thread

    def block_of(run, block):
        scratch.array = scratch.__dict__.get("array", np.full(flat.numel(), np.nan))
        scratch.array[: block.stop - block.start] = flat[block].numpy()
        return torch.from_numpy(scratch.array)[: block.stop - block.start]

    found = moving.take(block_of)
    assert found == squares(gradient, 64)
    assert found == pytest.approx([float(gradient[name].square().sum()) for name in moving.layout.names], rel=1e-14)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@given(st.integers(1, 700), st.integers(0, 1000), st.data())
@settings(deadline=None, max_examples=10)
def test_no_bit_depends_on_where_an_element_lies(name, size, seed, data):
    """θ in pieces, as several aggregators have it: a fused kernel rounds what is no whole vector otherwise."""
    chosen, _ = OPTIMIZERS[name]
    cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=4)) | {0, size})
    theta = drawn([(size,)], seed, torch.float32)["w0"]
    parts = [slice(*ends) for ends in itertools.pairwise(cuts)]
    whole = OuterStep(outer(**chosen), {"w": theta})
    pieces = [OuterStep(outer(**chosen), {"w": theta[at]}) for at in parts]
    for step in range(4):
        gradient = drawn([(size,)], seed + step + 1)["w0"] * 10.0 ** -(step % 3)
        whole.step({"w": gradient}, step)
        for at, piece in zip(parts, pieces, strict=True):
            piece.step({"w": gradient[at]}, step)
        assert torch.equal(whole.flat, torch.cat([piece.flat for piece in pieces]))


# --- schedules -----------------------------------------------------------------


def rates(steps=10, **changes):
    return [learning_rate(Outer(lr=0.2, steps=steps, **changes), step) for step in range(steps + 1)]


def test_constant():
    assert rates() == [0.2] * 11


def test_cosine_is_torchs():
    found = rates(schedule="cosine", final_lr=0.02)
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.02)
    for step in range(11):
        assert found[step] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()
    assert found[0] == pytest.approx(0.2)
    assert found[5] == pytest.approx(0.11)
    assert found[10] == pytest.approx(0.02)


def test_linear():
    assert rates(schedule="linear") == pytest.approx([0.2 * (1 - step / 10) for step in range(11)])
    assert rates(schedule="linear", final_lr=0.1) == pytest.approx([0.2 - 0.01 * step for step in range(11)])


def test_halving():
    assert rates(schedule="halving", halve_every=3) == pytest.approx(
        [0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025]
    )


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warmup_rises_linearly_and_hands_over(schedule):
    found = rates(schedule=schedule, warmup=4)
    assert found[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert found[4] == pytest.approx(0.2)
    rest = rates(steps=6, schedule=schedule)
    assert found[4:] == pytest.approx(rest)


@pytest.mark.parametrize("warmup", [10, 20])
def test_a_warmup_as_long_as_the_run(warmup):
    found = rates(schedule="cosine", warmup=warmup)
    assert all(0 < rate <= 0.2 for rate in found)


def test_the_step_uses_its_rate():
    moving = OuterStep(Outer(lr=0.2, optimizer="sgd", schedule="linear", steps=4), start())
    before = start()
    for step, rate in enumerate([0.2, 0.15, 0.1, 0.05]):
        moving.step(gradient(step), step)
        for n, g in gradient(step).items():
            assert torch.allclose(before[n] - moving.theta[n], rate * g, rtol=1e-10)
        before = {n: v.detach().clone() for n, v in moving.theta.items()}


def test_running_statistics_are_those_of_torchs_batch_norm():
    """torch's momentum is the weight of the new; its running variance is unbiased, ours is what training divides by."""
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = torch.nn.BatchNorm1d(3, momentum=STATE_MOMENTUM, dtype=torch.float64)
    layer(x)
    layer(x + 1)
    state = {"mean": torch.zeros(3).double()}
    for shift in (0, 1):
        state = moved_state(state, {"mean": (x + shift).mean(0)})
    assert torch.allclose(state["mean"], layer.running_mean, rtol=1e-13)
    narrow = moved_state({"mean": torch.ones(3)}, {"mean": torch.zeros(3).double()})
    assert narrow["mean"].dtype == torch.float32
    assert narrow["mean"].tolist() == [torch.tensor(0.9).item()] * 3
