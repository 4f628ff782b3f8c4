"""Behind which steps a run is judged and kept: functions of the config, so that everybody knows them beforehand."""

from metadist.config import Config


def validates(config: Config, done: int) -> bool:
    """Whether the state after `done` steps is judged on meta-validation."""
    every = config.eval.every
    return bool(every) and (done % every == 0 or done == config.outer.steps)


def saves(config: Config, done: int) -> bool:
    """Whether it becomes a checkpoint, whatever the validation says."""
    return done % config.checkpoint.every == 0 or done == config.outer.steps


def next_stop(config: Config, first: int) -> int:
    """Steps done at the first stop behind step `first`."""
    return next(d for d in range(first + 1, config.outer.steps + 1) if validates(config, d) or saves(config, d))
