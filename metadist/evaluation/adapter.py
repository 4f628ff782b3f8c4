"""A trained run in a person's hands: adapt to your own labelled images, classify others."""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors.torch import load_file

from metadist import algorithms
from metadist.config import Config, load
from metadist.engine.device import one_thread
from metadist.engine.engine import Blueprint
from metadist.errors import RunError
from metadist.tasks.episode import Examples


class Adapter:
    """The method of a run with its trained meta-parameters.

    theta_path: `theta.safetensors` or `best.safetensors` of the run. Images are uint8 as in
    the run's table: ink (or brightness) 255 on 0, of the run's size.
    """

    def __init__(self, config: Config, theta_path: Path) -> None:
        self.config = config.at(config.outer.steps - 1)
        self.values = load_file(theta_path)

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """From a run folder."""
        theta = run_dir / "theta.safetensors"
        if not theta.exists():
            raise RunError(f"{run_dir}: holds no theta.safetensors; a finished run does")
        return cls(load(run_dir / "config.yaml"), theta)

    def predict(self, support_images: np.ndarray, support_labels: np.ndarray, query_images: np.ndarray) -> np.ndarray:
        """Class probabilities, float32 [m, ways], of query images after adapting to the support set.

        support_images: uint8 [n, channels, height, width]; support_labels: int [n], in
        [0, ways); query_images: uint8 [m, channels, height, width].
        """
        if self.config.kind != "classification":
            raise ValueError("the run learned numbers, not classes; valid is regress")
        support, queries = self._pixels(support_images), self._pixels(query_images)
        labels = torch.from_numpy(np.asarray(support_labels, dtype=np.int64))
        if labels.shape != support.shape[:1] or labels.min() < 0:
            raise ValueError(f"support_labels: {len(support)} labels from 0 on are needed, one for each support image")
        ways = int(labels.max()) + 1
        if len(set(labels.tolist())) != ways and not self.config.algorithm.class_bound:
            raise ValueError(f"support_labels: every class from 0 to {ways - 1} needs an example")
        if self.config.algorithm.class_bound:
            if ways > self.config.task.ways:
                raise ValueError(
                    f"support_labels: the run's head has {self.config.task.ways} classes, these are {ways}"
                )
            ways = self.config.task.ways
        return torch.softmax(self._outputs(Examples(support, labels), queries, ways), -1).float().numpy()

    def regress(self, support_x: np.ndarray, support_y: np.ndarray, query_x: np.ndarray) -> np.ndarray:
        """Numbers, float32 [m, 1], at the query inputs after adapting to the support points.

        support_x, support_y: [n, 1]; query_x: [m, 1].
        """
        if self.config.kind != "regression":
            raise ValueError("the run learned classes, not numbers; valid is predict")
        dtype = getattr(torch, self.config.engine.dtype)
        x, y, queries = (torch.from_numpy(np.array(v)).to(dtype) for v in (support_x, support_y, query_x))
        shapes = [list(value.shape) for value in (x, y, queries)]
        if shapes != [[len(x), 1], [len(x), 1], [len(queries), 1]] or not len(x):
            told = ", ".join(map(str, shapes))
            raise ValueError(f"support_x, support_y, query_x: [n, 1], [n, 1] and [m, 1] are needed, these are {told}")
        return self._outputs(Examples(x, y), queries, 1).float().numpy()

    def _outputs(self, support: Examples, queries: torch.Tensor, ways: int) -> torch.Tensor:
        shape = tuple(support.x.shape[1:])
        algorithm = algorithms.for_evaluation(self.config, shape)
        state = {name: self.values[name] for name in Blueprint(self.config, shape).state}
        theta = {name: value for name, value in self.values.items() if name not in state}
        with one_thread(), torch.no_grad():
            return algorithm.adapt(theta, state, support, ways)(queries)

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        images = np.asarray(images, dtype=np.uint8)
        if images.ndim != 4:
            raise ValueError(f"images: [n, channels, height, width] is needed, this has shape {images.shape}")
        return torch.from_numpy(images.copy()).to(getattr(torch, self.config.engine.dtype)) / 255
