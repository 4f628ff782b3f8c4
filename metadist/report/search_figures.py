"""Figures of a search, from plain rows. Colours are viridis: readable without colour vision, and in print."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metadist.durable import appearing, storage_errors
from metadist.measure import Measure
from metadist.report.importance import FEWEST, importance

Row = Mapping[str, Any]
CATEGORIES = 8
"""Different values of a key up to which each is a column of its own; more are put into as many bins."""


class Found(NamedTuple):
    """What a search knows of its trials.

    keys: searched, in the job's order; logarithmic: those drawn by magnitude; trials: rows with id, how (null while
    it trains), origin, score and a column per key; early: rows with the values that a trial began with and its score
    under them at `rung`, the first step at which trials are compared; curves: rows with trial, step and score; last:
    meta-steps of a whole trial; winner: id of the trial that was chosen, where one was.
    """

    keys: tuple[str, ...]
    logarithmic: frozenset[str]
    measure: Measure
    trials: Sequence[Row]
    early: Sequence[Row]
    curves: Sequence[Row]
    rung: int
    last: int
    winner: str | None = None

    @property
    def judged(self) -> list[Row]:
        """Trials with a finite score, the worst first."""
        known = [row for row in self.trials if row["score"] is not None and math.isfinite(row["score"])]
        return sorted(known, key=lambda row: row["score"], reverse=not self.measure.higher_is_better)

    @property
    def best(self) -> Row:
        """The winner; before there is one, the best trial that took all its steps; where none did, the best one."""
        judged = self.judged
        chosen = (row for row in judged if row["id"] == self.winner)
        finished = (row for row in reversed(judged) if row["how"] == "finished")
        return next(chosen, None) or next(finished, judged[-1])

    @property
    def unit(self) -> float:
        return 100.0 if self.measure.name == "accuracy" else 1.0

    @property
    def label(self) -> str:
        names = {"accuracy": "accuracy (%)", "mse": "mean squared error", "loss": "loss"}
        return f"validation {names[self.measure.name]}"

    def shares(self) -> dict[str, float]:
        """Importance of each key by the scores at which trials are first compared; empty with too few."""
        return importance(self.keys, self.early, "early", self.measure.higher_is_better, self.logarithmic)


def save(found: Found, folder: Path) -> dict[str, Path]:
    """PNG files by name; each replaced in one step. Those that nothing can be drawn in are left out."""
    from matplotlib.figure import Figure

    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    paths = {}
    for name, draw in DRAWN.items():
        if not found.judged:
            break
        figure = Figure(layout="constrained")
        draw(found, figure)
        paths[name] = folder / f"{name}.png"
        with appearing(paths[name]) as file:
            figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return paths


# --- score over two keys -------------------------------------------------------


def heatmap(found: Found, figure: Any) -> None:
    """Best score over two keys; over one, where only one is searched, as points."""
    if len(found.keys) == 1:
        _points(found, figure)
        return
    across, up = _pair(found)
    rows = found.judged
    columns, lines = _Axis.of(found, across, rows), _Axis.of(found, up, rows)
    best, count = np.full((lines.cells, columns.cells), np.nan), np.zeros((lines.cells, columns.cells), int)
    for row in rows:  # the worst first
        place = lines.place(row[up]), columns.place(row[across])
        best[place] = found.unit * row["score"]
        count[place] += 1
    figure.set_size_inches(max(6.0, 2.4 + 0.75 * columns.cells), max(3.4, 1.8 + 0.55 * lines.cells))
    panel = figure.subplots()
    colours = "viridis" if found.measure.higher_is_better else "viridis_r"
    image = panel.imshow(best, origin="lower", aspect="auto", cmap=colours)
    for (line, column), value in np.ndenumerate(best):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        told = f"{value:.1f}" if found.measure.name == "accuracy" else f"{value:.3g}"
        panel.text(column, line, told, ha="center", va="bottom", color=ink, fontsize=10)
        panel.text(column, line - 0.06, f"n = {count[line, column]}", ha="center", va="top", color=ink, fontsize=7)
    columns.ticks(panel.xaxis, panel.set_xticks)
    lines.ticks(panel.yaxis, panel.set_yticks)
    panel.set_xlabel(across + (" (log bins)" if columns.edges is not None and across in found.logarithmic else ""))
    panel.set_ylabel(up)
    panel.set_title(f"Best score by {_short(across)} and {_short(up)}", loc="left")
    panel.spines[:].set_visible(False)
    panel.set_facecolor("#f2f2f2")
    figure.colorbar(image, ax=panel, label=found.label)


def _pair(found: Found) -> tuple[str, str]:
    """The inner loop's rate and steps; where one of them is not searched, the two keys that matter most."""
    wanted = ("algorithm.inner_lr", "algorithm.inner_steps")
    if set(wanted) <= set(found.keys):
        return wanted
    across, up = [*found.shares(), *found.keys][:2] if found.shares() else found.keys[:2]
    return across, up


def _points(found: Found, figure: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (key,) = found.keys
    figure.set_size_inches(7.5, 4.2)
    panel = figure.subplots()
    rows = [row for row in found.judged if row[key] is not None]
    axis = _Axis.of(found, key, rows)
    numbers = all(_is_number(row[key]) for row in rows)
    for done, marker, label in ((True, "o", "all its steps"), (False, "x", "ended early")):
        some = [row for row in rows if (row["how"] == "finished") == done]
        if some:
            panel.errorbar(
                [row[key] if numbers else axis.place(row[key]) for row in some],
                [found.unit * row["score"] for row in some],
                [found.unit * (row.get("ci95") or 0.0) for row in some],
                fmt=marker, color="#31688e" if done else "#888888", elinewidth=1, label=label,
            )  # fmt: skip
    if numbers and key in found.logarithmic:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    elif not numbers:
        axis.ticks(panel.xaxis, panel.set_xticks)
    panel.set_xlabel(key)
    panel.set_ylabel(found.label)
    panel.set_title(f"Last validation by {_short(key)}, with 95 % intervals", loc="left")
    panel.legend(frameon=False)
    _plain(panel)


class _Axis(NamedTuple):
    """Values of a key in cells: one of each, or bins between edges."""

    values: list[Any]
    edges: np.ndarray | None

    @classmethod
    def of(cls, found: Found, key: str, rows: Sequence[Row]) -> "_Axis":
        values = {row[key] for row in rows}
        if len(values) <= CATEGORIES or not all(map(_is_number, values)):
            return cls(sorted(values, key=_order), None)
        space = np.geomspace if key in found.logarithmic else np.linspace
        return cls([], space(min(values), max(values), CATEGORIES + 1))

    @property
    def cells(self) -> int:
        return len(self.values) if self.edges is None else len(self.edges) - 1

    def place(self, value: Any) -> int:
        if self.edges is None:
            return self.values.index(value)
        return int(np.clip(np.searchsorted(self.edges, value, "right") - 1, 0, self.cells - 1))

    def ticks(self, axis: Any, put: Any) -> None:
        if self.edges is None:
            put(range(self.cells), [_show(value) for value in self.values])
        else:
            put(np.arange(self.cells + 1) - 0.5, [f"{edge:.2g}" for edge in self.edges])
        axis.set_tick_params(length=0 if self.edges is None else 3)


# --- validations on the way ------------------------------------------------------


def curves(found: Found, figure: Any) -> None:
    """A curve per trial, coloured by its last score."""
    figure.set_size_inches(8.5, 4.8)
    panel = figure.subplots()
    colour = _colours(found)
    best = found.best["id"]
    ends = {"stopped": ("x", "stopped early"), None: (".", "in training")}
    named: set[str] = set()
    for row in found.judged:
        points = [point for point in found.curves if point["trial"] == row["id"]]
        steps, scores = [p["step"] for p in points], [found.unit * p["score"] for p in points]
        own = colour(row["score"])
        wide = row["id"] == best or row["origin"] == "baseline"
        panel.plot(
            steps, scores, color=own, linewidth=2.6 if wide else 1.3, zorder=3 if wide else 2,
            linestyle="--" if row["origin"] == "baseline" else "-",
        )  # fmt: skip
        if row["how"] != "finished":
            marker, label = ends.get(row["how"], ("^", "failed"))
            new = label not in named
            named.add(label)
            panel.plot(steps[-1:], scores[-1:], marker, color=own, markersize=7, markeredgewidth=2, zorder=4,
                       label=label if new else None)  # fmt: skip
        elif len(steps) == 1:
            panel.plot(steps, scores, "o", color=own, markersize=5, zorder=3)
    whole = [row for row in found.judged if row["id"] == best or row["origin"] == "baseline"]
    _end_labels(panel, found, whole, best)
    if named:
        panel.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=3, borderaxespad=0)
    panel.set_xlabel("meta-steps")
    panel.set_ylabel(found.label)
    panel.set_title("Validation of every trial", loc="left")
    panel.set_xticks([tick for tick in panel.get_xticks() if 0 <= tick <= found.last])
    panel.set_xlim(right=found.last * 1.2)
    _plain(panel)
    figure.colorbar(colour.scale, ax=panel, label="last score" + (" (%)" if found.unit == 100 else ""))


def _end_labels(panel: Any, found: Found, rows: Sequence[Row], best: str) -> None:
    """Names of curves at their ends, moved apart where they would overlap."""
    ends, first = [], "winner" if found.winner else "best"
    for row in rows:
        points = [point for point in found.curves if point["trial"] == row["id"]]
        words = [
            word for word, so in ((first, row["id"] == best), ("the job's own", row["origin"] == "baseline")) if so
        ]
        ends.append((found.unit * points[-1]["score"], points[-1]["step"], f"{row['id']} {', '.join(words)}"))
    low, high = panel.get_ylim()
    at = -math.inf
    for score, step, told in sorted(ends):
        at = max(score, at + 0.045 * (high - low))
        panel.annotate(told, (step, at), (6, 0), textcoords="offset points", fontsize=8, va="center")


# --- all keys at once --------------------------------------------------------------


def parallel(found: Found, figure: Any) -> None:
    """A line per trial over an axis for each key, and one for the score."""
    best, colour = found.best["id"], _colours(found)
    rows = sorted(found.judged, key=lambda row: row["id"] == best)  # the best last, on top
    keys = list(found.keys)
    figure.set_size_inches(max(6.5, 1.6 * (len(keys) + 1) + 1.5), 4.6)
    panel = figure.subplots()
    scales = [_Scale.of([row[key] for row in rows], key in found.logarithmic) for key in keys]
    scores = _Scale.of([found.unit * row["score"] for row in rows], False)
    for row in rows:
        heights = [scale.height(row[key]) for scale, key in zip(scales, keys, strict=True)]
        heights.append(scores.height(found.unit * row["score"]))
        panel.plot(
            range(len(heights)), heights, color=colour(row["score"]), alpha=0.9,
            linestyle="-" if row["how"] == "finished" else (0, (4, 3)), linewidth=3 if row["id"] == best else 1.4,
        )  # fmt: skip
    for place, scale in enumerate([*scales, scores]):
        panel.axvline(place, color="#444444", linewidth=1, zorder=1)
        for height, told in scale.ticks:
            panel.plot([place - 0.015, place + 0.015], [height, height], color="#444444", linewidth=1)
            panel.annotate(
                told, (place, height), (-5, 0), textcoords="offset points", ha="right", va="center", fontsize=8,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}, zorder=5,
            )  # fmt: skip
    panel.set_xticks(range(len(keys) + 1), [*map(_short, keys), "score" + (" (%)" if found.unit == 100 else "")])
    panel.set_yticks([])
    panel.tick_params(axis="x", length=0, pad=8)
    panel.set_xlim(-0.35, len(keys) + 0.1)
    panel.set_ylim(-0.06, 1.06)
    panel.spines[:].set_visible(False)
    panel.set_title("Keys and score of every trial", loc="left")
    figure.colorbar(colour.scale, ax=panel, label=found.label)


class _Scale(NamedTuple):
    """Where values lie on an upright axis from 0 to 1; categories have even places."""

    values: list[Any]
    low: float
    high: float
    logarithmic: bool
    whole: tuple[int, ...] = ()

    @classmethod
    def of(cls, values: Sequence[Any], logarithmic: bool) -> "_Scale":
        different = set(values)
        if not all(map(_is_number, different)):
            return cls(sorted(different, key=_order), 0.0, 1.0, False)
        low, high = float(min(different)), float(max(different))
        few = len(different) <= CATEGORIES and all(isinstance(value, int) for value in different)
        return cls([], low, high, logarithmic and low > 0, tuple(sorted(different)) if few else ())

    def height(self, value: Any) -> float:
        if self.values:
            return self.values.index(value) / max(1, len(self.values) - 1) if len(self.values) > 1 else 0.5
        if self.low == self.high:
            return 0.5
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        if self.values:
            return [(self.height(value), _show(value)) for value in self.values]
        if self.low == self.high:
            return [(0.5, f"{self.low:.3g}")]
        if self.whole:
            return [(self.height(value), str(value)) for value in self.whole]
        from matplotlib.ticker import MaxNLocator

        if self.logarithmic:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            places = [m * 10.0**e for e in exponents for m in ((1, 2, 5) if len(exponents) < 5 else (1,))]
        else:
            places = list(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(self.low, self.high))
        return [(self.height(place), f"{place:g}") for place in places if self.low <= place <= self.high]


# --- what mattered -----------------------------------------------------------------


def important(found: Found, figure: Any) -> None:
    """A bar per key; with too few scores the figure says so."""
    shares = found.shares()
    figure.set_size_inches(7, 1.4 + 0.42 * max(2, len(shares)))
    panel = figure.subplots()
    panel.set_title(f"Importance by the scores behind {found.rung:,} meta-steps", loc="left")
    if not shares:
        known = sum(row["early"] is not None for row in found.early)
        told = (
            f"{known} of the {FEWEST} scores that are needed" if known < FEWEST else "all trials have the same values"
        )
        panel.text(0.5, 0.5, told, ha="center", va="center", transform=panel.transAxes, color="#555555")
        panel.set_axis_off()
        return
    names = list(shares)[::-1]
    bars = panel.barh(names, [100 * shares[name] for name in names], color="#31688e", height=0.6)
    panel.bar_label(bars, [f"{100 * shares[name]:.0f} %" for name in names], padding=4, fontsize=9)
    panel.set_ylim(-0.8, max(2, len(names)) - 0.2)
    panel.set_xlim(0, 112 * max(shares.values()))
    panel.set_xlabel("share of importance (%)")
    panel.grid(visible=False)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(axis="y", length=0)


DRAWN = {"heatmap": heatmap, "curves": curves, "parallel": parallel, "importance": important}


# --- what they share -----------------------------------------------------------------


class _Colours:
    """Colour of a score; the best is bright."""

    def __init__(self, scores: Sequence[float], measure: Measure, unit: float) -> None:
        import matplotlib as mpl
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, Normalize

        name = "viridis" if measure.higher_is_better else "viridis_r"
        low, high = (0.0, 0.93) if measure.higher_is_better else (0.07, 1.0)  # the brightest yellow is lost on white
        ramp = LinearSegmentedColormap.from_list("scores", mpl.colormaps[name](np.linspace(low, high, 256)))
        self.unit = unit
        self.scale: Any = ScalarMappable(Normalize(unit * min(scores), unit * max(scores)), ramp)

    def __call__(self, score: float) -> Any:
        return self.scale.cmap(self.scale.norm(self.unit * score))


def _colours(found: Found) -> _Colours:
    return _Colours([row["score"] for row in found.judged], found.measure, found.unit)


def _plain(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _order(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if _is_number(value) else (1, 0.0, str(value))


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _short(key: str) -> str:
    return key.rpartition(".")[2]
