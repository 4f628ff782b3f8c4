"""BOIL: only the body adapts."""

import pytest
from inner_loop_checks import SHAPES, configured, episodes
from plain_reference import one_of, parameters

from metadist.algorithms import for_training


@pytest.mark.parametrize("what", ["stride2", "sinusoid"])
def test_the_head_stays_and_everything_else_moves(what):
    config = configured({"name": "boil", "inner_steps": 1, "inner_lr": 0.4}, what)
    theta, _ = parameters(config, SHAPES[what])
    adapted = for_training(config, SHAPES[what]).inner_loop(theta, one_of(episodes(config, SHAPES[what]), 0).support)
    for name, value in theta.items():
        moved = (adapted[name] - value).abs().max()
        assert moved == 0 if name.startswith("head.") else moved > 1e-6, name
