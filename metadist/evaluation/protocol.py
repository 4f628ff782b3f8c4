"""The meta-test protocol: mean accuracy or squared error over N episodes with its 95 % interval."""

import math
from typing import Any, NamedTuple, Protocol

import numpy as np

from metadist import algorithms
from metadist.config import Config, validate
from metadist.engine.sweep import Setting
from metadist.measure import MEASURES
from metadist.tasks.samplers import evaluation_tasks, training_tasks


class Judge(Protocol):
    """Whatever computes evaluation tasks: score and loss, float64 [episodes] each."""

    def judge(self, values: np.ndarray | None, judged: Setting, split: str, episodes: int) -> dict[str, np.ndarray]: ...


class Score(NamedTuple):
    """Mean over episodes and the half-width of its 95 % interval, 1.96 · s / √N."""

    mean: float
    ci95: float


def score(scores: np.ndarray) -> Score:
    """scores: float64 [episodes]; s is the sample's standard deviation (N − 1)."""
    n = len(scores)
    spread = float(np.std(scores, ddof=1)) if n > 1 else float("nan")
    return Score(float(np.mean(scores)), 1.96 * spread / math.sqrt(n))


def settings(config: Config, done: int | None = None) -> list[Config]:
    """The config of the meta-test, then one for each entry of `eval.also`.

    done: meta-steps of the state that is judged, all of them without it: its keys are those of the last one.
    """
    raw = config.at((config.outer.steps if done is None else done) - 1).model_dump()
    also, raw["eval"]["also"] = raw["eval"]["also"], []
    return [
        validate({**raw, "eval": {**raw["eval"], **changes}}, f"eval.also.{number - 1}" if number else "eval")
        for number, changes in enumerate([{}, *also])
    ]


def check(config: Config, tables: list[Any]) -> None:
    """Refuse in one line, before anything runs, episodes that some evaluation of this config could not fill."""
    wanted = (["val"] if config.eval.every else []) + (["test"] if config.eval.test else [])
    for setting in settings(config):
        for split in wanted:
            sampler = evaluation_tasks(setting, tables, split, "cpu")
            algorithms.for_evaluation(setting, sampler.shape, training_tasks(setting, tables, "cpu").classes)


def validation_settings(config: Config, done: int) -> Config:
    """What runs behind `done` meta-steps."""
    return settings(config, done)[0].with_values(eval={"draw": 0})  # the same for all runs, whatever they are judged on


def meta_test(judge: Judge, setting: Config, values: np.ndarray | None, split: str = "test") -> dict[str, Any]:
    """One line of a result: the score and what it is a score of."""
    found = score(judge.judge(values, setting, split, setting.eval.episodes)["score"])
    return {MEASURES[setting.kind].name: found.mean, "ci95": found.ci95, **described(setting)}


def described(setting: Config) -> dict[str, Any]:
    """What an evaluation was of; a key that `eval` leaves open is the task's or the method's."""
    judged, task = setting.eval, setting.task
    told: dict[str, Any] = {
        "episodes": judged.episodes,
        "ways": 1 if setting.kind == "regression" else judged.ways or task.ways,
        "shots": judged.shots or task.shots,
        "queries": judged.queries or task.queries,
        "transductive": _transductive(setting),
    }
    steps = judged.inner_steps
    if steps is None:
        steps = getattr(setting.algorithm, "inner_steps", None)
    return told | ({"finetune_steps": judged.finetune_steps} if steps is None else {"inner_steps": steps})


def _transductive(setting: Config) -> bool | None:
    """Whether a task's queries are normalised together; None where nothing depends on other examples."""
    if setting.model.norm != "batch":
        return None
    return setting.task.transductive if setting.eval.transductive is None else setting.eval.transductive
