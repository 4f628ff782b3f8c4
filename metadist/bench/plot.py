"""What a suite found, as a picture: bars, and lines where something was swept."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metadist.bench.record import Row, charts

WIDE = 20
"""From such a quotient of the largest and the smallest on, an axis is logarithmic."""

COLOURS = ("#4878a8", "#d1803c", "#5b9a5b", "#a85a8a", "#8a6d4b", "#5c5c5c")


def save(path: Path, suite: str, rows: Sequence[Row]) -> None:
    """A PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    bars: dict[str, list[Row]] = {}
    for row in rows:
        if row.point is None:
            bars.setdefault(row.unit, []).append(row)
    swept = charts(rows)
    units = list(dict.fromkeys(row.unit for found in swept.values() for row in found))
    heights = [1.2 + 0.22 * max(9, *map(len, bars.values()))] if bars else []
    heights += [1 + 2.4 * len(units)] if swept else []
    figure = plt.figure(figsize=(1 + 4.5 * max(len(bars), len(swept)), 0.5 + sum(heights)), layout="constrained")
    figure.suptitle(f"metadist bench {suite}")
    parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if bars:
        panels = next(parts).subplots(1, len(bars), squeeze=False)[0]
        for panel, (unit, mine) in zip(panels, bars.items(), strict=True):
            _bars(panel, unit, mine)
    if swept:
        below, lines = next(parts), _colours(rows)
        grid = below.subplots(len(units), len(swept), sharex="col", squeeze=False)
        for column, (chart, found) in zip(grid.T, swept.items(), strict=True):
            column[0].set_title(chart, fontsize="medium")
            for panel, unit in zip(column, units, strict=True):
                _lines(panel, unit, [row for row in found if row.unit == unit], lines)
        drawn = {
            label: line for panel in grid.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        below.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(panel: Any, unit: str, rows: Sequence[Row]) -> None:
    bars = panel.barh([row.name for row in rows], [row.value for row in rows], color=COLOURS[0])
    panel.bar_label(bars, [f" {row.value:,.3g}" + (f" ({row.ratio:.2f}×)" if row.ratio else "") for row in rows])
    panel.margins(x=0.35)
    panel.invert_yaxis()
    panel.set_xlabel(unit)
    panel.spines[["top", "right"]].set_visible(False)


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """Of every line, the same in all charts."""
    lines = dict.fromkeys(row.point.line for row in rows if row.point is not None)
    return dict(zip(lines, itertools.cycle(COLOURS), strict=False))


def _lines(panel: Any, unit: str, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    """What was chosen is a ring round the line's own point."""
    points = [(row.point, row.value) for row in rows if row.point is not None]
    if not points:
        panel.set_visible(False)
        return
    for line, colour in colours.items():
        mine = [(point.x, value) for point, value in points if point.line == line and not point.chosen]
        if mine:
            panel.plot(*zip(*mine, strict=True), "o-", color=colour, markersize=3, linewidth=1.2, label=line)
    if rings := [(point.x, value) for point, value in points if point.chosen]:
        panel.plot(*zip(*rings, strict=True), "o", color="black", markersize=8, fillstyle="none", label="chosen")
    for axis, values in (("x", [point.x for point, _ in points]), ("y", [value for _, value in points])):
        shares = axis == "y" and unit.startswith("%")
        if not shares and min(values) > 0 and max(values) > WIDE * min(values):
            getattr(panel, f"set_{axis}scale")("log")
    places = sorted({point.x for point, _ in points})
    panel.set_xticks(places, [f"{x:,g}" for x in places])
    panel.set_xticks([], minor=True)
    panel.set_xlabel(points[0][0].along)
    panel.set_ylabel(unit)
    panel.spines[["top", "right"]].set_visible(False)
