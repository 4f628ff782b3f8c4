"""ANIL: only the head adapts."""

import pytest
import torch
from inner_loop_checks import configured, episodes
from plain_reference import one_of, parameters

from metadist.algorithms import for_training


@pytest.mark.parametrize("steps", [1, 4])
def test_the_body_stays_and_the_head_is_that_of_least_squares(steps):
    """With squared error w_k = w − (2α/n) FᵀF (w − w*), so (I − (2α/n) FᵀF)^K shrinks w_0 − w*; F: features and 1."""
    config = configured({"name": "anil", "inner_steps": steps, "inner_lr": 0.05}, "sinusoid")
    theta, _ = parameters(config, (1,))
    support = one_of(episodes(config, (1,)), 0).support
    found = for_training(config, (1,)).inner_loop(theta, support)
    assert all(found[name] is theta[name] for name in theta if not name.startswith("head."))
    x = torch.tanh(support.x @ theta["fc1.weight"] + theta["fc1.bias"])
    x = torch.tanh(x @ theta["fc2.weight"] + theta["fc2.bias"])
    features = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    start, ended = (torch.cat([w["head.weight"], w["head.bias"][None]]) for w in (theta, found))
    shrink = torch.eye(len(start), dtype=torch.float64) - 2 * 0.05 / len(features) * features.T @ features
    best = torch.linalg.pinv(features) @ support.y
    # What the features do not span stays where it was.
    expected = best + torch.linalg.matrix_power(shrink, steps) @ (start - best)
    assert (ended - expected).abs().max() < 1e-11 * expected.abs().max()
