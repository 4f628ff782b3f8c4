"""One set of meta-parameters under a grid of inner rates and steps: how much they matter to it.

All cells see the same tasks, so that differences between them are paired. What `--sweep` says:

    algorithm.inner_lr=0.1:5:log:8        8 rates from 0.1 to 5, in equal ratios; `lin`: in equal steps
    algorithm.inner_steps=0,1,2,3,5,10    these; rates can be listed too
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metadist.config import Config, validate
from metadist.engine.sweep import Grid
from metadist.errors import ConfigError
from metadist.evaluation.protocol import Judge, described, score
from metadist.measure import MEASURES
from metadist.methods import InnerLoop

RATE, STEPS, JUDGED_STEPS = "algorithm.inner_lr", "algorithm.inner_steps", "eval.inner_steps"
FORMS = f"valid: {RATE}=0.1:5:log:8, =0.1:1:lin:4 or =0.1,0.5,2, and {STEPS}=0,1,2,3"
MOST = 64
"""Values of one axis."""


def read_grid(words: Sequence[str], config: Config, overridden: Mapping[str, Any]) -> Grid:
    """The grid of some `--sweep` words around a run's judged config. Raises ConfigError, one line.

    overridden: keys that the evaluation's overrides set.
    """
    method = config.algorithm
    if not isinstance(method, InnerLoop):
        raise ConfigError(f"--sweep: {method.name} has no inner loop; valid for methods with one, such as maml")
    axes: dict[str, tuple[float, ...]] = {}
    for word in words:
        key, _, text = word.partition("=")
        key = STEPS if key.strip() == JUDGED_STEPS else key.strip()
        if key not in (RATE, STEPS):
            raise ConfigError(f"--sweep {word}: {key or 'nothing'} is not swept; {FORMS}")
        if key in axes:
            raise ConfigError(f"--sweep {word}: {key} is swept twice; each key goes once")
        if key == RATE and not method.adapts_at_inner_lr:
            raise ConfigError(
                f"--sweep {word}: {method.name} has learned its rates, inner_lr is where they began; valid is {STEPS}"
            )
        same = RATE if key == RATE else JUDGED_STEPS
        if same in overridden:
            raise ConfigError(f"--sweep {word}: {same} is overridden as well; leave one of them out")
        axes[key] = _values(word, key, text)
    own = method.inner_steps if config.eval.inner_steps is None else config.eval.inner_steps
    grid = Grid(config, axes.get(RATE, ()), tuple(int(k) for k in axes.get(STEPS, (own,))))
    for rate in grid.rates:
        _valid(config, f"--sweep {RATE}={rate:g}", algorithm={"inner_lr": rate})
    for steps in grid.steps:
        _valid(config, f"--sweep {STEPS}={steps}", eval={"inner_steps": steps})
    return grid


def swept(judge: Judge, grid: Grid, trained: Config, values: np.ndarray, split: str) -> dict[str, Any]:
    """Score, interval and loss of every cell, [rates][steps] each; None where a cell's mean is not finite.

    trained: the run's own config, whose rate and steps are judged on the same tasks, beside the grid where they are
    not in it. `diverged` counts the tasks whose loss is not finite. `best`: the best cell, and by how much it is better
    than the trained setting, in the mean over tasks of the difference; it was chosen on these tasks, so that on others
    it is less.
    """
    method, measure = trained.algorithm, MEASURES[trained.kind]
    assert isinstance(method, InnerLoop)
    episodes = grid.judged.eval.episodes
    found = judge.judge(values, grid, split, episodes)
    scores, losses = found["score"], found["loss"]
    cells = [[_cell(measure.name, scores[:, r, k]) for k in range(scores.shape[2])] for r in range(scores.shape[1])]
    rates: tuple[float | None, ...] = grid.rates or (None,)
    rate, steps = method.inner_lr if grid.rates else None, method.inner_steps
    if rate in rates and steps in grid.steps:
        own = scores[:, rates.index(rate), grid.steps.index(steps)]
    else:
        alone = Grid(grid.judged, (method.inner_lr,) if grid.rates else (), (steps,))
        own = judge.judge(values, alone, split, episodes)["score"][:, 0, 0]
    told = described(grid.judged)
    told.pop("inner_steps")
    return {
        "measure": measure.name,
        **told,
        "inner_lr": list(grid.rates) or None,
        "inner_steps": list(grid.steps),
        **{key: [[cell[key] for cell in row] for row in cells] for key in (measure.name, "ci95")},
        "loss": [[_finite(float(value)) for value in row] for row in losses.mean(0)],
        "diverged": (~np.isfinite(losses)).sum(0).tolist(),
        "trained": {"inner_lr": rate, "inner_steps": steps, **_cell(measure.name, own)},
        "best": _best(grid, cells, scores, own, trained),
    }


def _best(
    grid: Grid, cells: list[list[dict[str, float | None]]], scores: np.ndarray, own: np.ndarray, trained: Config
) -> dict[str, Any] | None:
    measure = MEASURES[trained.kind]
    places = [(r, k) for r, row in enumerate(cells) for k, cell in enumerate(row) if cell[measure.name] is not None]
    if not places:
        return None
    sign = -1 if measure.higher_is_better else 1
    r, k = min(places, key=lambda place: sign * float(cells[place[0]][place[1]][measure.name] or 0.0))
    gain = _cell("gain", -sign * (scores[:, r, k] - own))
    return {
        "inner_lr": grid.rates[r] if grid.rates else None,
        "inner_steps": grid.steps[k],
        **cells[r][k],
        "gain": gain["gain"],
        "gain_ci95": gain["ci95"],
    }


def _cell(name: str, scores: np.ndarray) -> dict[str, float | None]:
    with np.errstate(all="ignore"):  # a diverged cell's scores may be infinite
        found = score(scores)
    return {name: _finite(found.mean), "ci95": _finite(found.ci95)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _valid(config: Config, origin: str, **sections: dict[str, Any]) -> None:
    raw = config.model_dump()
    for section, values in sections.items():
        raw[section].update(values)
    validate(raw, origin)


def _values(word: str, key: str, text: str) -> tuple[float, ...]:
    """Ascending, without doubles."""
    try:
        found = _spaced(text) if ":" in text else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--sweep {word}: {text or 'nothing'} is no list and no range of numbers; {FORMS}") from None
    if key == STEPS and (":" in text or any(value != int(value) for value in found if math.isfinite(value))):
        raise ConfigError(f"--sweep {word}: steps are whole numbers, in a list; {FORMS}")
    least = 0 if key == STEPS else np.nextafter(0.0, 1.0)
    bad = next((value for value in found if not math.isfinite(value) or value < least), None)
    if bad is not None:
        raise ConfigError(f"--sweep {word}: {bad:g} is no {'number of steps' if key == STEPS else 'rate'}; {FORMS}")
    unique = tuple(sorted(set(found)))
    if len(unique) > MOST:
        raise ConfigError(f"--sweep {word}: {len(unique)} values; at most {MOST} are valid")
    return unique


def _spaced(text: str) -> list[float]:
    """Of LOW:HIGH:log:N or LOW:HIGH:lin:N; four digits, so that a person can type them. Raises ValueError."""
    low, high, how, count = text.split(":")
    first, last, n = float(low), float(high), int(count)
    if how not in ("log", "lin") or not 0 < first < last < math.inf or not 2 <= n <= MOST:
        raise ValueError
    between = np.geomspace(first, last, n) if how == "log" else np.linspace(first, last, n)
    rounded = [float(f"{value:.4g}") for value in between[1:-1]]
    return [first, *(value for value in rounded if first < value < last), last]
