"""A problem that is learned in seconds: classes are Gaussian clusters, hidden among inputs that say nothing."""

from typing import NamedTuple

import torch
from plain_reference import Named

from metadist.algorithms import for_evaluation, for_training
from metadist.algorithms.objective import CLASSIFICATION
from metadist.config import Config
from metadist.engine.engine import Blueprint
from metadist.engine.shard import judge_vectorised, vectorised
from metadist.tasks.episode import Episode, Examples

CLASSES = 40


class Clusters(NamedTuple):
    """told: inputs in which the classes differ; untold: others; noise: of the told ones."""

    told: int = 3
    untold: int = 5
    noise: float = 0.35

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 1, self.told + self.untold

    def episodes(self, config: Config, tasks: int, seed: int, test: bool = False) -> Episode:
        """Of 40 classes, or at test of 40 others."""
        task, generator = config.task, torch.Generator().manual_seed(2 * seed + test)
        centres = torch.randn(2, CLASSES, self.told, generator=torch.Generator().manual_seed(99))[int(test)]
        classes = torch.stack([torch.randperm(CLASSES, generator=generator)[: task.ways] for _ in range(tasks)])

        def examples(each: int) -> Examples:
            y = torch.arange(task.ways).repeat(each).expand(tasks, -1)
            told = centres[classes.gather(1, y)] + self.noise * torch.randn(*y.shape, self.told, generator=generator)
            untold = 2 * torch.randn(*y.shape, self.untold, generator=generator)
            x = torch.cat([told, untold], -1)[:, :, None, None]
            return Examples(x.to(getattr(torch, config.engine.dtype)), y)

        return Episode(examples(task.shots), examples(task.queries), classes, torch.arange(tasks))

    def initial(self, config: Config) -> tuple[Named, Named]:
        blueprint = Blueprint(config, self.shape, CLASSES)
        return blueprint.theta, blueprint.state

    def trained(self, config: Config, steps: int, rate: float, tasks: int) -> tuple[Named, Named]:
        """θ after so many steps of Adam, and the state."""
        algorithm = for_training(config, self.shape, CLASSES)
        theta, state = self.initial(config)
        optimizer = torch.optim.Adam(list(theta.values()), rate)
        for step in range(steps):
            episodes = self.episodes(config, tasks, step)
            found = vectorised(algorithm, theta, state, episodes, config.task.ways, step)
            for name, value in theta.items():
                value.grad = found[f"gradient.{name}"] / tasks
            optimizer.step()
            state = {name: 0.9 * value + 0.1 * found[f"statistics.{name}"] / tasks for name, value in state.items()}
        return theta, state

    def accuracy(self, config: Config, theta: Named, state: Named, tasks: int = 100) -> float:
        """Mean over tasks of classes never trained on."""
        algorithm = for_evaluation(config, self.shape, CLASSES)
        episodes = self.episodes(config, tasks, 10**6, test=True)
        judged = judge_vectorised(algorithm, CLASSIFICATION, theta, state, episodes, config.task.ways)
        return float(judged["score"].mean())
