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
        self.config = config
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
        support, queries = self._pixels(support_images), self._pixels(query_images)
        labels = torch.from_numpy(np.asarray(support_labels, dtype=np.int64))
        if labels.shape != support.shape[:1] or labels.min() < 0:
            raise ValueError(f"support_labels: {len(support)} labels from 0 on are needed, one for each support image")
        ways = int(labels.max()) + 1
        if len(set(labels.tolist())) != ways and not algorithms.class_bound(self.config):
            raise ValueError(f"support_labels: every class from 0 to {ways - 1} needs an example")
        if algorithms.class_bound(self.config):
            if ways > self.config.task.ways:
                raise ValueError(
                    f"support_labels: the run's head has {self.config.task.ways} classes, these are {ways}"
                )
            ways = self.config.task.ways
        image = (support.shape[1], support.shape[2], support.shape[3])
        algorithm = algorithms.for_evaluation(self.config, image)
        blueprint = Blueprint(self.config, image)
        theta = {name: self.values[name] for name in blueprint.theta}
        state = {name: self.values[name] for name in blueprint.state}
        with one_thread(), torch.no_grad():
            logits = algorithm.adapt(theta, state, Examples(support, labels), ways)(queries)
        return torch.softmax(logits, -1).float().numpy()

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        images = np.asarray(images, dtype=np.uint8)
        if images.ndim != 4:
            raise ValueError(f"images: [n, channels, height, width] is needed, this has shape {images.shape}")
        return torch.from_numpy(images.copy()).to(getattr(torch, self.config.engine.dtype)) / 255
