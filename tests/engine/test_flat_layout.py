"""Named tensors as one buffer, and the hash that a run is known by."""

import hashlib

import numpy as np
import pytest
import torch

from metadist.engine.layout import Layout, sha256


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


TENSORS = {"b.weight": random(2, 3), "a": random(), "b": random(4, seed=1), "a.z": random(0, 2), "B": random(1, seed=2)}


def test_name_order_is_that_of_the_characters():
    layout = Layout.of(TENSORS)
    assert layout.names == ("B", "a", "a.z", "b", "b.weight")
    assert layout.shapes == ((1,), (), (0, 2), (4,), (2, 3))
    assert layout.sizes == (1, 1, 0, 4, 6)
    assert layout.total == 12


def test_flatten_and_back():
    layout = Layout.of(TENSORS)
    flat = layout.flatten(TENSORS)
    expected = np.concatenate([TENSORS[n].numpy().reshape(-1) for n in ("B", "a", "a.z", "b", "b.weight")])
    assert np.array_equal(flat.numpy(), expected)
    for back in (layout.split(flat), layout.unflatten(flat)):
        assert back.keys() == TENSORS.keys()
        assert all(torch.equal(back[name], value) for name, value in TENSORS.items())
    assert torch.equal(layout.flatten({"b.weight": TENSORS["b.weight"].T.contiguous().T, **TENSORS}), flat)


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        ([], []),
        ([0], []),
        ([64], [(0,)]),
        ([65], [(0,)]),
        ([1, 2, 3], [(0, 1, 2)]),
        ([60, 4, 1, 63, 1], [(0, 1), (2, 3), (4,)]),
        ([0, 65, 0, 1, 200, 63, 0, 1, 0], [(1,), (3,), (4,), (5, 7)]),
    ],
)
def test_runs_are_small_tensors_of_one_block_or_a_single_large_one(small_blocks, sizes, runs):
    layout = Layout(tuple(f"{number}" for number in range(len(sizes))), tuple((size,) for size in sizes))
    assert [run.tensors for run in layout.runs] == runs
    ends = np.cumsum(sizes)
    parts = [(run.at.start + part.start, run.at.start + part.stop) for run in layout.runs for part in run.parts]
    assert parts == [(end - size, end) for end, size in zip(ends, sizes, strict=True) if size]
    assert all(run.starts == tuple(part.start for part in run.parts) for run in layout.runs)
    every = [index for run in layout.runs for block in run.blocks() for index in range(block.start, block.stop)]
    assert every == list(range(layout.total))


def test_split_is_views_and_unflatten_is_copies():
    layout = Layout.of(TENSORS)
    flat = layout.flatten(TENSORS)
    before = flat.clone()
    for value in layout.unflatten(flat).values():
        value += 1
    assert torch.equal(flat, before)
    layout.split(flat)["b"] += 1
    assert not torch.equal(flat, before)
    assert all(value.storage_offset() == 0 for value in layout.unflatten(flat).values())


def test_layouts_compare_by_what_they_say():
    assert Layout.of(TENSORS) == Layout.of(dict(reversed(TENSORS.items())))
    assert hash(Layout.of(TENSORS)) == hash(Layout.of(TENSORS))
    assert Layout.of(TENSORS) != Layout.of({**TENSORS, "a": random(1)})


def by_hand(arrays):
    """Little-endian float32 bytes of all tensors in name order."""
    return hashlib.sha256(b"".join(np.asarray(arrays[n]).astype("<f4").tobytes() for n in sorted(arrays))).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_sha256(dtype):
    tensors = {name: value.to(dtype) for name, value in TENSORS.items()}
    assert sha256(tensors) == by_hand({name: value.numpy() for name, value in tensors.items()})


def test_sha256_of_known_bytes():
    assert sha256({"x": torch.tensor([1.0, -2.0])}) == hashlib.sha256(bytes.fromhex("0000803f000000c0")).hexdigest()
    assert sha256({}) == hashlib.sha256().hexdigest()


def test_sha256_sees_values_and_order_but_not_memory():
    base = sha256(TENSORS)
    assert sha256(dict(reversed(TENSORS.items()))) == base
    strided = {**TENSORS, "b.weight": TENSORS["b.weight"].T.contiguous().T.requires_grad_()}
    assert sha256(strided) == base
    one_bit = TENSORS["b"].clone()
    one_bit.view(torch.int32)[2] ^= 1
    assert sha256({**TENSORS, "b": one_bit}) != base
    assert sha256({"x": torch.tensor([0.0])}) != sha256({"x": torch.tensor([-0.0])})
