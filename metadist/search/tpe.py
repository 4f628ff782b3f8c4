"""Points by Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), as a pure function of the history.

No sampler lives from trial to trial: each proposal makes one from the search's seed and the trial's index, tells it
the trials so far and throws it away. So there is nothing to save, and a replayed history gives the same proposal.
"""

import math
import warnings
from collections.abc import Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from metadist.search.draw import ATTEMPTS, MODELS, had, random_point
from metadist.search.job import SearchJob
from metadist.search.space import Domain, LogUniform, Point, RandInt, Uniform, Value
from metadist.search.state import Trial
from metadist.tasks.counter import key

ASKED = ATTEMPTS // 10
"""Proposals that conditions may refuse before a point is drawn at random."""


def tpe_point(job: SearchJob, index: int, trials: Sequence[Trial]) -> Point:
    """A point for trial `index`; those that run are taken to be bad, so that they are not proposed again.

    Raises ConfigError where the conditions allow no point.
    """
    past = [told for trial in trials if (told := _told(job, trial)) is not None]
    if not any(trial.state.is_finished() for trial in past):
        return random_point(job, index)
    study = _study(job, index)
    study.add_trials(past)
    for _ in range(ASKED):
        asked = study.ask()
        point = _ask(job, asked)
        if job.allows(point):
            return point
        study.tell(asked, state=TrialState.PRUNED)
    return random_point(job, index)


def _study(job: SearchJob, index: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = int(key(job.search.seed, MODELS, index)) & 0x7FFFFFFF
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, constant_liar=True)
    score = StudyDirection.MAXIMIZE if job.measure.higher_is_better else StudyDirection.MINIMIZE
    return optuna.create_study(sampler=sampler, directions=[score, *[StudyDirection.MINIMIZE] * len(job.search.also)])


def _ask(job: SearchJob, asked: optuna.Trial) -> Point:
    """Key by key, the method first: what it does not have is not asked for."""
    point: Point = {}
    space = job.search.space
    for name in sorted(space, key=lambda name: name != "algorithm.name"):
        if name in had({**point, name: None}):
            point[name] = _suggest(asked, name, space[name])
    return {name: point[name] for name in space if name in point}


def _suggest(asked: optuna.Trial, name: str, domain: Domain) -> Value:
    match _distribution(domain):
        case FloatDistribution(low=low, high=high, log=log):
            return asked.suggest_float(name, low, high, log=log)
        case IntDistribution(low=low, high=high):
            return asked.suggest_int(name, low, high)
        case _:
            values = domain.witnesses
            return values[int(asked.suggest_categorical(name, range(len(values))))]


def _distribution(domain: Domain) -> BaseDistribution:
    """Of values one after the other, their numbers: to optuna 1, 1.0 and true are one value."""
    match domain:
        case Uniform(uniform=(low, high)):
            return FloatDistribution(low, high)
        case LogUniform(loguniform=(low, high)):
            return FloatDistribution(low, high, log=True)
        case RandInt(randint=(low, high)):
            return IntDistribution(low, high)
    return CategoricalDistribution(range(len(domain.witnesses)))


def _told(job: SearchJob, trial: Trial) -> FrozenTrial | None:
    """What the estimator is told of a trial; None of one that says nothing about its values.

    Stopped trials rank behind finished ones by the step they came to, then by score; those that diverged, ran out of
    memory or were refused rank last.
    """
    if trial.end is not None and trial.end.how in ("crashed", "failed"):
        return None
    space = job.search.space
    params = {name: place for name, value in trial.values.items() if (place := _place(space[name], value)) is not None}
    values, reached = _values(job, trial), {}
    if trial.end is None:
        state = TrialState.RUNNING
    elif values is not None:
        state = TrialState.COMPLETE
    else:
        state = TrialState.PRUNED
        if trial.end.how == "stopped" and not job.search.also:
            reached = {report.step: report.values["score"] for report in trial.reports[-1:]}
    return create_trial(
        state=state,
        values=values,
        params=params,
        distributions={name: _distribution(space[name]) for name in params},
        intermediate_values={step: score for step, score in reached.items() if math.isfinite(score)},
    )


def _values(job: SearchJob, trial: Trial) -> list[float] | None:
    """Score and costs of a finished trial; None where one of them is missing or no number."""
    if trial.end is None or trial.end.how != "finished" or not trial.reports:
        return None
    values = [trial.reports[-1].values["score"], *(trial.end.facts.get(name) for name in job.search.also)]
    numbers = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return numbers if len(numbers) == len(values) else None


def _place(domain: Domain, value: Value) -> float | int | None:
    """As optuna has the value; None where the domain does not: the job's own values may lie outside."""
    match domain:
        case Uniform(uniform=(low, high)) | LogUniform(loguniform=(low, high)):
            return value if isinstance(value, int | float) and low <= value <= high else None
        case RandInt(randint=(low, high)):
            return value if isinstance(value, int) and low <= value <= high else None
    same = (at for at, one in enumerate(domain.witnesses) if one == value and (one is True) == (value is True))
    return next(same, None)
