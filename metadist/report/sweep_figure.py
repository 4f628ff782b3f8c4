"""What a sweep found, as a heat map of rates and steps with the trained setting marked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metadist.durable import storage_errors
from metadist.measure import ACCURACY, Measure
from metadist.report.sweep_table import measure_of, place, shown, task

WORST = 4
"""Times the best squared error from which on all are drawn alike."""


def save(found: Mapping[str, Any], path: Path) -> Path:
    """The PNG of `evaluate.sweep`'s findings; bright is good."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    measure = measure_of(found)
    values = np.array(found[measure.name], dtype=float)  # None becomes nan, which is drawn as nothing
    rates, steps = found["inner_lr"] or [None], found["inner_steps"]
    finite = values[np.isfinite(values)]
    norm: Normalize
    if measure is ACCURACY:
        low, high = 1 / found["ways"], max(finite.max(initial=0), 1 / found["ways"] + 0.01)
        norm, colours = Normalize(low, high), plt.get_cmap("viridis")
    else:
        low = max(float(finite.min()) if finite.size else 1.0, 1e-12)
        norm = LogNorm(low, max(min(float(finite.max(initial=low)), WORST * low), 1.01 * low))
        colours = plt.get_cmap("viridis_r")
    colours = colours.with_extremes(bad="#d9d9d9")
    figure, panel = plt.subplots(figsize=(2.6 + 0.85 * len(steps), 2.0 + 0.48 * len(rates)), layout="constrained")
    image = panel.imshow(np.ma.masked_invalid(values), norm=norm, cmap=colours, aspect="auto", origin="lower")
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        number = shown(measure, float(value) if np.isfinite(value) else None)
        shade = colours(norm(value)) if np.isfinite(value) else (0.85, 0.85, 0.85, 1)
        dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.5
        panel.text(
            column, row, number, ha="center", va="center", fontsize=8.5, color="white" if dark else "black", zorder=5
        )
    panel.set_xticks(range(len(steps)), [str(k) for k in steps])
    panel.set_xlabel("inner steps")
    if found["inner_lr"]:
        panel.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        panel.set_ylabel("inner rate")
    else:
        panel.set_yticks([])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    _mark(panel, found["trained"], rates, steps)
    trained, best = found["trained"], found["best"]
    told = f"◯ trained: {place(trained)}" + _value(measure, trained)
    if best is not None:
        at = steps.index(best["inner_steps"]) - 0.5, rates.index(best["inner_lr"]) - 0.5
        panel.add_patch(Rectangle(at, 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False, zorder=4))
        told += f"\n☐ best: {place(best)}" + _value(measure, best)
    bar = figure.colorbar(image, ax=panel, extend="neither" if measure is ACCURACY else "max", pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(measure.name)
    if measure is ACCURACY:
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    else:
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        bar.ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    figure.suptitle(f"{found['run']}: {task(found)}", fontsize=10, x=0.02, ha="left")
    panel.set_title(told, fontsize=8.5, loc="left")
    with storage_errors(path):
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _value(measure: Measure, cell: Mapping[str, Any]) -> str:
    return "" if cell[measure.name] is None else f", {measure.interval(cell[measure.name], cell['ci95'])}"


def _mark(panel: Any, trained: Mapping[str, Any], rates: Sequence[float | None], steps: Sequence[int]) -> None:
    """A ring where the run was trained: in its cell, between two, or at the edge where it lies beyond."""
    x = _between([float(k) for k in steps], float(trained["inner_steps"]))
    y = 0.0
    if trained["inner_lr"] is not None:
        y = _between([float(np.log(rate)) for rate in rates if rate is not None], float(np.log(trained["inner_lr"])))
    for width, colour in ((3.5, "black"), (1.8, "white")):
        panel.plot(
            [x], [y], "o", markersize=25, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width,
            clip_on=False,
        )  # fmt: skip


def _between(values: Sequence[float], value: float) -> float:
    """Where among the cells a value lies, which are drawn one unit apart."""
    if value < values[0]:
        return -0.5
    if value > values[-1]:
        return len(values) - 0.5
    return float(np.interp(value, values, np.arange(len(values))))
