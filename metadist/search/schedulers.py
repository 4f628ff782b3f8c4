"""Who is stopped early: pure functions of what all trials have reported so far.

Each answers why a trial stops behind `step` meta-steps with a validation's `score`, which is not among its reports yet;
an empty answer lets it go on. A score that is not finite is worse than any other.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from metadist.measure import Measure
from metadist.search.job import SearchJob
from metadist.search.state import Trial

Scheduler = Callable[[SearchJob, Sequence[Trial], Trial, int, float], str]


def fifo(job: SearchJob, trials: Sequence[Trial], trial: Trial, step: int, score: float) -> str:
    """Nobody."""
    return ""


def asha(job: SearchJob, trials: Sequence[Trial], trial: Trial, step: int, score: float) -> str:
    """At a rung, whoever is not among the best 1/reduction of those that came there before.

    Asynchronous successive halving in its stopping form, with one bracket (Li et al. 2020, "A System for Massively
    Parallel Hyperparameter Tuning"; the percentile is that of Ray's AsyncHyperBandScheduler).
    """
    last = trial.reports[-1].step if trial.reports else 0
    reached = [rung for rung in rungs(job) if last < rung <= step]
    if not reached:
        return ""
    sign = 1 if job.measure.higher_is_better else -1
    there = [other.score_at(reached[-1]) for other in trials if other is not trial]
    known = [sign * value for value in there if value is not None and math.isfinite(value)]
    if not known:
        return ""
    cutoff = float(np.percentile(known, 100 * (1 - 1 / job.search.reduction)))
    if math.isfinite(score) and sign * score >= cutoff:
        return ""
    mine, limit = _apart(job.measure, score, sign * cutoff)
    return (
        f"{mine} at step {step} is not among the best 1/{job.search.reduction} of {len(known) + 1} trials, "
        f"from {limit} on"
    )


def _apart(measure: Measure, one: float, other: float) -> tuple[str, str]:
    """Both as a person reads them, with more digits where they would look alike."""
    both = [(measure.show(one, digits), measure.show(other, digits)) for digits in (1, 2, 3, 4)]
    return next((pair for pair in both if pair[0] != pair[1]), both[0])


def rungs(job: SearchJob) -> list[int]:
    """Meta-steps behind which asha decides: the first rung, times the reduction, again and again."""
    found, rung = [], job.search.first_rung(job.base)
    while rung < job.base.outer.steps:
        found.append(rung)
        rung *= job.search.reduction
    return found


def median(job: SearchJob, trials: Sequence[Trial], trial: Trial, step: int, score: float) -> str:
    """Whoever's best score is worse than the median of the others' mean scores, from the first rung up to this step.

    Others are those that have come as far (Golovin et al. 2017, "Google Vizier", section 3.2.2).
    """
    first = job.search.first_rung(job.base)
    if step < first:
        return ""
    others = [other for other in trials if other is not trial and other.reports and other.reports[-1].step >= step]
    means = [_mean(other, first, step) for other in others]
    known = [mean for mean in means if math.isfinite(mean)]
    if len(known) < job.search.samples:
        return ""
    middle = float(np.median(known))
    own = [value for value in (*(report.values["score"] for report in trial.reports), score) if math.isfinite(value)]
    measure = job.measure
    best = (max if measure.higher_is_better else min)(own, default=math.nan)
    if math.isfinite(best) and not measure.better(middle, best):
        return ""
    return (
        f"{measure.show(best)} at best up to step {step} is worse than {measure.show(middle)}, "
        f"the median of {len(known)} others"
    )


def _mean(trial: Trial, first: int, last: int) -> float:
    """Of the scores behind `first` to `last` meta-steps; NaN where there is none."""
    scores = [report.values["score"] for report in trial.reports if first <= report.step <= last]
    return float(np.mean(scores)) if scores else math.nan


SCHEDULERS: dict[str, Scheduler] = {"fifo": fifo, "asha": asha, "median": median, "pbt": fifo}
