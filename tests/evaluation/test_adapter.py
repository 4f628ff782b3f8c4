"""A trained run in a person's hands gives what evaluation computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from metadist import algorithms
from metadist.config import Config
from metadist.engine.engine import Blueprint
from metadist.errors import RunError
from metadist.evaluation.adapter import Adapter
from metadist.methods import every_method
from metadist.tasks.episode import Examples

IMAGE, CLASSES = (1, 16, 16), 7


def config_of(name: str) -> Config:
    task = {"ways": 3, "within_group": name == "task-conditioned"}
    return Config.model_validate({"task": task, "model": {"name": "mlp", "width": 8}, "algorithm": {"name": name}})


def saved(config: Config, folder: Path) -> Path:
    blueprint = Blueprint(config, IMAGE, CLASSES)
    path = folder / "theta.safetensors"
    save_file(blueprint.theta | blueprint.state, path)
    return path


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *IMAGE), dtype=np.uint8)


@pytest.mark.parametrize("name", [method.method_name() for method in every_method()])
def test_probabilities_are_the_methods_own(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    support, labels, queries = images(6, 0), np.array([0, 1, 2, 0, 1, 2]), images(4, 1)
    found = Adapter(config, saved(config, tmp_path)).predict(support, labels, queries)
    assert found.shape == (4, 3)
    assert found.dtype == np.float32
    assert np.allclose(found.sum(1), 1, atol=1e-6)
    blueprint = Blueprint(config, IMAGE, CLASSES)
    method = algorithms.for_evaluation(config, IMAGE, CLASSES)
    examples = Examples(torch.from_numpy(support) / 255, torch.from_numpy(labels))
    logits = method.adapt(blueprint.theta, blueprint.state, examples, 3)(torch.from_numpy(queries) / 255)
    assert np.allclose(found, torch.softmax(logits, -1).detach().numpy(), atol=1e-6)
    assert found.std() > 0


def regression(name: str, folder: Path) -> Adapter:
    config = Config.model_validate({
        "data": {"name": "sinusoid"}, "model": {"name": "mlp", "width": 8}, "algorithm": {"name": name},
    })  # fmt: skip
    blueprint = Blueprint(config, (1,))
    save_file(blueprint.theta | blueprint.state, folder / "theta.safetensors")
    return Adapter(config, folder / "theta.safetensors")


def points(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-5, 5, (count, 1))


@pytest.mark.parametrize("name", ["maml", "reptile"])
def test_numbers_are_the_methods_own(name: str, tmp_path: Path) -> None:
    adapter = regression(name, tmp_path)
    x, queries = points(6, 0), points(4, 1)
    found = adapter.regress(x, np.sin(x), queries)
    assert (found.shape, found.dtype) == ((4, 1), np.float32)
    blueprint = Blueprint(adapter.config, (1,))
    method = algorithms.for_evaluation(adapter.config, (1,))
    support = Examples(torch.from_numpy(x).float(), torch.from_numpy(np.sin(x)).float())
    expected = method.adapt(blueprint.theta, blueprint.state, support, 1)(torch.from_numpy(queries).float())
    assert np.allclose(found, expected.detach().numpy(), atol=1e-6)
    assert not np.allclose(found, adapter.regress(x, 2 * np.sin(x), queries), atol=1e-6), "it adapts"


def test_what_is_no_regression_is_told(tmp_path: Path) -> None:
    adapter = regression("maml", tmp_path)
    x, queries = points(6, 0), points(4, 1)
    for wrong in ((x[:, 0], x, queries), (x, x[:5], queries), (x, x, queries[:, 0]), (x[:0], x[:0], queries)):
        with pytest.raises(ValueError, match=r"\[n, 1\], \[n, 1\] and \[m, 1\] are needed, these are"):
            adapter.regress(*wrong)
    two = np.concatenate([x, x], 1)
    with pytest.raises(ValueError, match=r"these are \[6, 2\], \[6, 2\], \[4, 2\]"):
        adapter.regress(two, two, np.concatenate([queries, queries], 1))
    with pytest.raises(ValueError, match="valid is regress"):
        adapter.predict(images(3, 0), np.arange(3), images(1, 1))
    with pytest.raises(ValueError, match="valid is predict"):
        Adapter(config_of("maml"), saved(config_of("maml"), tmp_path)).regress(x, x, queries)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    adapter = Adapter(config_of("maml"), saved(config_of("maml"), tmp_path))
    with pytest.raises(ValueError, match="head has 3 classes, these are 4"):
        adapter.predict(images(4, 0), np.arange(4), images(1, 1))
    with pytest.raises(ValueError, match="one for each support image"):
        adapter.predict(images(4, 0), np.arange(3), images(1, 1))
    with pytest.raises(ValueError, match="has shape"):
        adapter.predict(images(3, 0)[0], np.arange(1), images(1, 1))
    with pytest.raises(RunError, match=r"no theta\.safetensors"):
        Adapter.load(tmp_path / "nothing")
