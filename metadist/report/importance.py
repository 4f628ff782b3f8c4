"""How much each searched key matters for reaching the best trials."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

FEWEST = 8
"""Trials with a score, below which nothing is said."""


def importance(
    keys: Sequence[str],
    trials: Sequence[Mapping[str, Any]],
    score: str,
    higher_is_better: bool,
    logarithmic: Collection[str] = (),
) -> dict[str, float]:
    """Share of each key, the largest first; they sum to 1. Empty with fewer than 8 scores.

    PED-ANOVA (Watanabe, Bansal and Hutter 2023) of optuna: how much a key's distribution among the best tenth of the
    trials differs from that among all. trials: rows with a column of scores and one for each key.
    """
    from optuna import create_study, logging
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import create_trial

    logging.set_verbosity(logging.ERROR)
    known = [row for row in trials if row[score] is not None and row[score] == row[score]]
    ranges = {key: _range([row[key] for row in known if row[key] is not None], key in logarithmic) for key in keys}
    varied = {key: found for key, found in ranges.items() if found is not None}
    if len(known) < FEWEST or not varied:
        return {}
    study = create_study(direction="maximize" if higher_is_better else "minimize")
    for row in known:
        there = [key for key in varied if row[key] is not None]
        study.add_trial(
            create_trial(
                params={key: row[key] for key in there},
                distributions={key: varied[key] for key in there},
                value=row[score],
            )
        )
    shares = dict.fromkeys(keys, 0.0) | get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _range(values: Sequence[Any], logarithmic: bool) -> Any:
    """optuna's distribution of a key; None where all its values are one."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if len(set(values)) < 2:
        return None
    if any(isinstance(value, bool | str) for value in values):
        return CategoricalDistribution(sorted(set(values), key=str))
    kind = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
    return kind(min(values), max(values), log=logarithmic and min(values) > 0)
