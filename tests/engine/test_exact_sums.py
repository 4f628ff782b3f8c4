"""Sums that do not depend on their order, and what is checked before adding."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metadist.engine.cores import on_cores
from metadist.engine.exact import (
    COARSER_BITS,
    FINER_BITS,
    FINEST,
    FIRST_EXPONENT,
    HEADROOM_BITS,
    HIGHEST,
    LOWEST,
    SMALL,
    TARGET_BITS,
    Adding,
    Means,
    coarser,
    first_exponents,
    next_exponents,
    quantise,
    scales,
    seal_of,
    seal_of_all,
    tensor_of_each,
)
from metadist.engine.layout import BLOCK, Layout, blocks


def tensors_of(values):
    """Two named tensors from a flat list of six numbers."""
    flat = torch.tensor(values, dtype=torch.float64)
    return {"a": flat[:2], "b": flat[2:].view(2, 2)}


LAYOUT = Layout.of(tensors_of([0.0] * 6))


def parts_of(rows, exponents=None):
    exponents = first_exponents(LAYOUT) if exponents is None else exponents
    return [quantise(LAYOUT, tensors_of(row), exponents, len(rows)) for row in rows]


def exponents_after(layout, total, exponents):
    means = Means(layout)
    means.whole(total, exponents, 1)
    return next_exponents(layout, exponents, means.largest)


def mean_of(layout, total, exponents, parts=1):
    return Means(layout).whole(total, exponents, parts)


def tree(values, rng):
    """A random binary tree of additions over the values in random order."""
    values = [values[i] for i in rng.permutation(len(values))]
    while len(values) > 1:
        i = int(rng.integers(len(values) - 1))
        values[i : i + 2] = [values[i] + values[i + 1]]
    return values[0]


moderate = st.floats(-1e3, 1e3)
rows = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(moderate, min_size=6, max_size=6), min_size=n, max_size=n)
)


@given(rows, st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_any_order_and_any_grouping_give_the_same_integers(values, seed):
    parts = parts_of(values)
    assert all(part.finite and part.fits for part in parts)
    expected = [sum(int(part.q[i]) for part in parts) for i in range(6)]  # Python's integers cannot overflow
    rng = np.random.default_rng(seed)
    for _ in range(3):
        total = tree([part.q for part in parts], rng)
        assert total.dtype == np.int64
        assert total.tolist() == expected


def test_float_sums_would_not_pass_that_test():
    """Why integers: the same trees over floats end in different bits, in 32 and in 64 of them."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((12, 1000)) * np.exp(rng.standard_normal((12, 1)))
    for dtype in (np.float32, np.float64):
        sums = {tree(list(values.astype(dtype)), rng).tobytes() for _ in range(20)}
        assert len(sums) > 1
    layout = Layout(("a",), ((1000,),))
    exponents = first_exponents(layout)
    integers = [quantise(layout, {"a": torch.from_numpy(row)}, exponents, 12).q for row in values]
    assert len({tree(integers, rng).tobytes() for _ in range(20)}) == 1


@given(rows, st.integers(-60, 60))
@settings(deadline=None, max_examples=60)
def test_the_sum_is_accurate(values, magnitude):
    """Half a quantum per part, and a quantum is at most 2^-44 of a tensor's largest sum once exponents have settled.

    For two parts that is 2^-44 of the largest.
    """
    values = [[math.ldexp(x, magnitude) for x in row] for row in values]
    exact = [math.fsum(column) for column in zip(*values, strict=True)]
    exponents = first_exponents(LAYOUT)
    for _ in range(20):  # a run's first steps
        parts = parts_of(values, exponents)
        if not all(part.fits for part in parts):
            exponents = coarser(exponents, {index for part in parts for index in part.exceeding})
            continue
        total = sum(part.q for part in parts)
        settled, exponents = exponents, exponents_after(LAYOUT, total, exponents)
        if np.array_equal(settled, exponents):
            break
    found = LAYOUT.split(mean_of(LAYOUT, total, settled))
    starts = {"a": slice(0, 2), "b": slice(2, 6)}
    for name, cut in starts.items():
        largest = max(abs(x) for x in exact[cut])
        quantum = math.ldexp(1.0, -int(settled[LAYOUT.names.index(name)]))
        errors = [abs(x - y) for x, y in zip(found[name].flatten().tolist(), exact[cut], strict=True)]
        assert max(errors) <= len(values) / 2 * quantum + 2.0**-52 * largest
        biggest_part = max(abs(x) for row in values for x in row)
        # Else the parts nearly cancel, or the first exponent sees nothing of them.
        if largest > max(2.0**-10 * biggest_part, len(values) * 2.0**-FIRST_EXPONENT):
            assert max(errors) <= max(1, len(values) / 2) * 2.0**-44 * largest


def test_a_tensor_too_small_for_its_first_exponent_is_resolved_in_the_end():
    """A sum that rounds to zero says nothing about how small it is; keeping the exponent would lose it for ever."""
    exponents = first_exponents(LAYOUT)
    for _ in range(10):
        (part,) = parts_of([[1.0, 1.0] + [2.0**-50] * 4], exponents)
        exponents = exponents_after(LAYOUT, part.q, exponents)
    assert part.q.all()


def test_accuracy_of_a_gradient_like_sum():
    rng = np.random.default_rng(1)
    layout = Layout(("w",), ((500,),))
    values = [torch.from_numpy(1e-3 * (1 + rng.random(500))) for _ in range(2)]
    exponents = first_exponents(layout)
    for _ in range(2):
        total = sum(quantise(layout, {"w": v}, exponents, 2).q for v in values)
        settled, exponents = exponents, exponents_after(layout, total, exponents)
    expected = values[0] + values[1]
    assert (layout.split(mean_of(layout, total, settled))["w"] - expected).abs().max() <= 2.0**-44 * expected.max()


@given(st.lists(st.floats(-1e9, 1e9), min_size=6, max_size=6), st.integers(-300, 300))
@settings(deadline=None, max_examples=50)
def test_one_part_is_pythons_round(values, exponent):
    values = [math.ldexp(x, -exponent) for x in values]
    part = quantise(LAYOUT, tensors_of(values), np.full(2, exponent), 1)
    expected = [round(x * 2.0**exponent) for x in values]  # to even, as torch
    assert part.fits == (max(map(abs, expected)) <= 2**62)
    if part.fits:
        assert part.q.tolist() == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 3, 5])
def test_what_is_not_finite_is_flagged(value, position):
    row = [1.0] * 6
    row[position] = value
    (part,) = parts_of([row])
    assert (part.finite, part.fits) == (False, False)
    assert not part.q.any()


@pytest.mark.parametrize("value", [1e30, -1e30, 3e38, 2.0**62])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_too_large_is_flagged_and_not_cast(value, dtype):
    row = torch.tensor([0.0, value], dtype=dtype)
    part = quantise(LAYOUT, {"a": row, "b": torch.zeros(2, 2, dtype=dtype)}, np.full(2, 40), 1)
    assert (part.finite, part.fits) == (True, False)
    assert not part.q.any()


@pytest.mark.parametrize("exponent", [FIRST_EXPONENT, HIGHEST])
def test_a_finite_value_whose_scaled_one_is_not_needs_coarser_exponents_and_is_no_divergence(exponent):
    part = quantise(LAYOUT, tensors_of([1e300] * 6), np.full(2, exponent), 1)
    assert (part.finite, part.fits) == (True, False)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 1000])
def test_the_bound_is_two_to_the_62_over_the_number_of_parts(parts):
    """So that no partial sum of any grouping can overflow."""
    bound = 2.0**HEADROOM_BITS / parts
    exponents = np.zeros(2, dtype=np.int64)
    for sign in (1, -1):
        part = quantise(LAYOUT, tensors_of([sign * float(math.floor(bound))] + [0.0] * 5), exponents, parts)
        assert part.fits
        assert abs(int(part.q[0])) * parts <= 2**62 * (1 + 2**-52) < 2**63
        part = quantise(
            LAYOUT, tensors_of([sign * (math.nextafter(bound, math.inf) + 1)] + [0.0] * 5), exponents, parts
        )
        assert part.finite
        assert not part.fits


def test_exponents_of_the_first_step_and_of_a_step_done_again():
    exponents = first_exponents(LAYOUT)
    assert exponents.dtype == np.int64
    assert exponents.tolist() == [FIRST_EXPONENT] * 2
    assert coarser(exponents, [0, 1]).tolist() == [FIRST_EXPONENT - COARSER_BITS] * 2
    assert coarser(exponents, [1]).tolist() == [FIRST_EXPONENT, FIRST_EXPONENT - COARSER_BITS]
    assert exponents.tolist() == [FIRST_EXPONENT] * 2, "the old ones stay"
    assert coarser(np.array([LOWEST, LOWEST + 3]), [0, 1]).tolist() == [LOWEST, LOWEST]


def test_only_the_tensor_that_exceeds_its_bound_is_named():
    exponents = first_exponents(LAYOUT)
    rows = [[1.0] * 6, [1e30] + [1.0] * 5, [1.0] * 5 + [1e30]]
    assert [part.exceeding for part in parts_of(rows)] == [(), (0,), (1,)]
    assert quantise(LAYOUT, tensors_of([1e30] * 6), exponents, 1).exceeding == (0, 1)


def test_a_part_that_is_too_large_fits_after_a_few_coarser_tries():
    exponents = first_exponents(LAYOUT)
    tries = 0
    while not quantise(LAYOUT, tensors_of([1e30] * 6), exponents, 16).fits:
        exponents, tries = coarser(exponents, [0, 1]), tries + 1
    assert tries == math.ceil((math.log2(1e30) + FIRST_EXPONENT - (HEADROOM_BITS - 4)) / COARSER_BITS)


@given(st.integers(-(2**62), 2**62), st.integers(-(2**62), 2**62), st.integers(-800, 800))
@settings(deadline=None, max_examples=100)
def test_next_exponents_bring_the_largest_element_to_its_target(x, y, exponent):
    total = np.array([x, y, 0, 0, 0, 0], dtype=np.int64)
    found = exponents_after(LAYOUT, total, np.full(2, exponent))
    largest = max(abs(x), abs(y))
    finer = max(exponent, min(exponent + FINER_BITS, FINEST))
    assert found[1] == finer  # a tensor whose sum is zero was perhaps too small
    if largest:
        moved = largest * 2.0 ** (int(found[0]) - exponent)
        assert 2.0 ** (TARGET_BITS - 1) <= moved < 2.0**TARGET_BITS * (1 + 2**-50)
    else:
        assert found[0] == finer


def test_exponents_stay_within_what_float64_can_scale():
    one = np.array([1, 0, 2**60, 0, 0, 0], dtype=np.int64)
    assert exponents_after(LAYOUT, one, np.array([HIGHEST, LOWEST])).tolist() == [HIGHEST, LOWEST]
    assert scales(np.array([HIGHEST, LOWEST])).isfinite().all()


def test_the_most_negative_integer_has_a_magnitude():
    total = np.array([-(2**63), 0, 0, 0, 0, 0], dtype=np.int64)
    assert exponents_after(LAYOUT, total, np.full(2, 10))[0] == 10 + TARGET_BITS - 64


def test_zero_tensors():
    parts = parts_of([[0.0] * 6] * 3)
    total = sum(part.q for part in parts)
    assert all(part.finite and part.fits for part in parts)
    assert exponents_after(LAYOUT, total, first_exponents(LAYOUT)).tolist() == [FIRST_EXPONENT + FINER_BITS] * 2
    assert not mean_of(LAYOUT, total, first_exponents(LAYOUT)).any()


def test_each_tensor_has_its_own_scale():
    exponents = np.array([3, -2])
    assert scales(exponents)[tensor_of_each(LAYOUT)].tolist() == [8.0, 8.0, 0.25, 0.25, 0.25, 0.25]
    q = quantise(LAYOUT, tensors_of([1.0, 2.0, 4.0, 8.0, 12.0, 16.0]), exponents, 1).q
    assert q.tolist() == [8, 16, 1, 2, 3, 4]
    back = LAYOUT.split(mean_of(LAYOUT, q, np.array([3, -2])))
    assert back["b"].tolist() == [[4.0, 8.0], [12.0, 16.0]]


def test_quantising_leaves_its_input_alone():
    given_tensors = tensors_of([0.1] * 6)
    quantise(LAYOUT, given_tensors, first_exponents(LAYOUT), 1)
    assert all((value == 0.1).all() for value in given_tensors.values())
    single = Layout(("a",), ((3,),))
    tensor = torch.full((3,), 0.1, dtype=torch.float64)
    quantise(single, {"a": tensor}, np.zeros(1, dtype=np.int64), 1)
    assert (tensor == 0.1).all()


def test_dequantising_block_by_block_is_dequantising_at_once():
    """In pieces that fit into the cache, and the mean with it: the same bits."""
    layout = Layout(("large", "none", "small"), ((3, BLOCK // 2 + 5), (0,), ()))
    total = np.random.default_rng(0).integers(-(2**62), 2**62, layout.total)
    exponents = np.array([130, 5, -40])
    at_once = torch.from_numpy(total.astype(np.float64)) / scales(exponents)[tensor_of_each(layout)]
    assert torch.equal(mean_of(layout, total, exponents), at_once)
    assert torch.equal(mean_of(layout, total, exponents, 12), at_once / 12)


def layout_of(sizes):
    return Layout(tuple(f"{number:03}" for number in range(len(sizes))), tuple((size,) for size in sizes))


def spread_out(layout, seed, least, most):
    """Random numbers of every magnitude in between, some of them halfway between two integers, and zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(layout.total) * np.exp2(rng.uniform(least, most, layout.total))
    values[rng.random(layout.total) < 0.2] = 0.0
    halfway = rng.random(layout.total) < 0.2
    values[halfway] = np.rint(values[halfway]) + 0.5
    return torch.from_numpy(values)


several_sizes = st.lists(st.sampled_from([0, 1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 200]), min_size=1, max_size=8)


@given(several_sizes, st.integers(0, 1000), st.sampled_from([30, 45, 48, 50, 56]), st.booleans())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_quantising_block_by_block_is_quantising_at_once(small_blocks, sizes, seed, most, narrow):
    layout, rng = layout_of(sizes), np.random.default_rng(seed)
    exponents = rng.integers(-3, 4, len(sizes))
    tensors = layout.split(spread_out(layout, seed, most - 60, most))
    if narrow:
        tensors = {name: value.float() for name, value in tensors.items()}
    at_once = (layout.flatten(tensors).double() * scales(exponents)[tensor_of_each(layout)]).round().long().numpy()
    part = quantise(layout, tensors, exponents, 1)
    assert part.fits
    assert part.q.tobytes() == at_once.tobytes()
    there = np.full(layout.total, -1)
    assert quantise(layout, tensors, exponents, 1, there).q is there
    assert there.tobytes() == at_once.tobytes()


@pytest.mark.parametrize("value", [SMALL, SMALL - 0.5, SMALL - 1.5, SMALL + 1, 0.5, 1.5, 2.5, 0.0, 2.0**61])
def test_the_ends_of_what_is_rounded_by_an_addition(value):
    for sign in (1, -1):
        tensors = tensors_of([sign * value, 0.25, -0.5, 0.5, -1.5, -0.0])
        expected = torch.cat([tensor.reshape(-1) for tensor in tensors.values()]).round().long().tolist()
        assert quantise(LAYOUT, tensors, np.zeros(2, dtype=np.int64), 1).q.tolist() == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_what_does_not_fit_is_zero_in_given_memory_too(small_blocks, value):
    layout = layout_of([200, 3])
    for position in (0, 70, 199, 202):
        flat = torch.ones(203).double()
        flat[position] = value
        there = np.full(203, -1)
        part = quantise(layout, layout.split(flat), np.full(2, 40), 1, there)
        assert (part.fits, part.finite) == (False, value == 1e300)
        assert part.exceeding == ((position // 200,) if math.isfinite(value) else part.exceeding)
        assert part.q is there
        assert not there.any()


@given(several_sizes, st.integers(0, 1000), st.sampled_from([1, 2, 3, 4, 7, 12, 32, 1000]), st.integers(1, 63))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_means_and_magnitudes_block_by_block_are_those_at_once(small_blocks, sizes, seed, parts, bits):
    layout, rng = layout_of(sizes), np.random.default_rng(seed)
    total = rng.integers(-(2**bits), 2**bits, layout.total) >> rng.integers(0, 63, layout.total)
    exponents = rng.integers(LOWEST, HIGHEST + 1, len(sizes))
    means = Means(layout)
    found = means.whole(total, exponents, parts)
    plain = total.astype(np.float64) * np.repeat(np.ldexp(1.0, -exponents.astype(np.int32)), sizes) / parts
    assert found.numpy().tobytes() == plain.tobytes()
    each = np.split(total, np.cumsum(sizes)[:-1])
    assert means.largest == [max(map(abs, one.tolist()), default=0) for one in each]


wide = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.lists(wide, min_size=3, max_size=3), min_size=1, max_size=5))
def test_the_seal_of_a_sum_is_that_of_its_parts(rows):
    arrays = [np.array(row, dtype=np.int64) for row in rows]
    with np.errstate(over="ignore"):
        total = np.add.reduce(arrays)
    assert seal_of(total) == seal_of_all(map(seal_of, arrays))


@given(st.sampled_from([1, 63, 64, 65, 200, 1000]), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_adding_block_by_block_on_several_cores_is_adding_at_once(small_blocks, size, count, fresh, kept, seed):
    rng = np.random.default_rng(seed)
    before, *sums = rng.integers(-(2**63), 2**63 - 1, (count + 1, size))
    total, copies = before.copy(), [q.copy() for q in sums]
    adding = Adding(total, sums, fresh)
    found = np.concatenate(on_cores(lambda at: adding.block(at, kept).copy(), blocks(size)))
    expected = np.add.reduce(sums) + (0 if fresh else before)
    assert np.array_equal(found, expected)
    assert adding.seals == [seal_of(q) for q in sums]
    assert np.array_equal(total, expected if kept else before)
    assert all(np.array_equal(one, copy) for one, copy in zip(sums, copies, strict=True)), "what is added is only read"


@given(several_sizes, st.integers(0, 1000), st.booleans())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_part_has_the_seal_of_its_integers(small_blocks, sizes, seed, narrow):
    layout = layout_of(sizes)
    flat = torch.from_numpy(np.random.default_rng(seed).normal(size=layout.total)) * (1 if narrow else 2.0**15)
    part = quantise(layout, layout.split(flat), np.full(len(sizes), 40), 1)
    assert part.fits
    assert part.seal == seal_of(part.q)
