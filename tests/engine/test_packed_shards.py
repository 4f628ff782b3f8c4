"""A shard of several trials: in closed form the bits that each has alone, whoever is with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.algorithms.algorithm import Normalisation
from metadist.algorithms.maml import MAML
from metadist.engine.packed import one_by_one, vectorised_packed
from metadist.engine.shard import by_vmap, vectorised
from metadist.models.conv4 import Conv4
from metadist.tasks.episode import Episode, Examples

TASKS, WAYS, IMAGE = 3, 3, (1, 16, 16)
NETWORKS = {strided: Conv4(IMAGE, WAYS, width=4, strided=strided) for strided in (False, True)}

trials = st.tuples(st.floats(0, 5), st.integers(0, 99))
"""An inner rate and the seed of θ."""


def examples(n, generator, dtype):
    x = torch.randn(TASKS, n, *IMAGE, generator=generator, dtype=dtype)
    return Examples(x, torch.arange(n).remainder(WAYS).expand(TASKS, n))


def episodes(dtype):
    generator, none = torch.Generator().manual_seed(0), torch.zeros(TASKS, dtype=torch.int64)
    return Episode(examples(3, generator, dtype), examples(6, generator, dtype), none[:, None], none)


def packed_and_alone(network, keys, every, dtype, alone):
    """Sums of every trial, packed and by a function by itself."""
    methods = [MAML(Normalisation(network, "together"), rate, **keys) for rate, _ in every]
    thetas = [
        {name: value.to(dtype) for name, value in method.init(torch.Generator().manual_seed(seed))[0].items()}
        for method, (_, seed) in zip(methods, every, strict=True)
    ]
    tasks = episodes(dtype)
    assert one_by_one(methods[0], tasks)
    yield from zip(
        vectorised_packed(methods, thetas, [{}] * len(every), tasks, WAYS, 0),
        (alone(method, theta, {}, tasks, WAYS, 0) for method, theta in zip(methods, thetas, strict=True)),
        strict=True,
    )


@given(
    st.booleans(), st.sampled_from([1, 2]), st.integers(0, 2), st.lists(trials, min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
@settings(deadline=None, max_examples=30)
def test_the_bits_of_a_trial_do_not_depend_on_the_others(strided, order, steps, every, dtype):
    keys = {"inner_steps": steps, "order": order}
    for together, by_itself in packed_and_alone(NETWORKS[strided], keys, every, dtype, vectorised):
        assert together.keys() == by_itself.keys()
        for name, value in by_itself.items():
            torch.testing.assert_close(together[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("strided", [False, True])
def test_closed_form_and_vmap_agree(strided):
    every = [(0.4, 0), (0.1, 1), (1.0, 0)]
    keys = {"inner_steps": 2, "order": 2, "support_loss_weight": 0.3}
    for together, by_itself in packed_and_alone(NETWORKS[strided], keys, every, torch.float64, by_vmap):
        assert together.keys() == by_itself.keys()
        for name, value in by_itself.items():
            torch.testing.assert_close(together[name], value, rtol=1e-9, atol=1e-11)


def test_what_has_no_closed_form_is_computed_at_once():
    layer_norm = Conv4(IMAGE, WAYS, width=4, norm="layer")
    tasks = episodes(torch.float32)
    assert not one_by_one(MAML(Normalisation(layer_norm, "together"), 0.4, 1), tasks)
    assert not one_by_one(MAML(Normalisation(NETWORKS[True], "support"), 0.4, 1), tasks)
