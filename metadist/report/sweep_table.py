"""What a sweep found, as a table."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from metadist.measure import ACCURACY, MSE, Measure


def measure_of(found: Mapping[str, Any]) -> Measure:
    """Of a sweep's cells."""
    return ACCURACY if found["measure"] == "accuracy" else MSE


def show(console: Console, found: Mapping[str, Any]) -> None:
    """A row for every rate, a column for every number of steps; then the trained setting and the best cell."""
    measure = measure_of(found)
    unit = " in %" if measure is ACCURACY else ""
    console.print(f"{measure.name}{unit}, {task(found)}", style="bold", highlight=False)
    table = Table()
    table.add_column("inner rate" if found["inner_lr"] else "", justify="right")
    for steps in found["inner_steps"]:
        table.add_column(f"{steps} step{'' if steps == 1 else 's'}", justify="right")
    trained, best = ({k: found[which][k] for k in PLACE} if found[which] else None for which in ("trained", "best"))
    for rate, row, diverged in zip(found["inner_lr"] or [None], found[measure.name], found["diverged"], strict=True):
        cells = []
        for steps, value, bad in zip(found["inner_steps"], row, diverged, strict=True):
            here = {"inner_lr": rate, "inner_steps": steps}
            style = "bold green" if here == best else ""
            cells.append(Text(shown(measure, value) + ("!" if bad else "") + ("*" if here == trained else ""), style))
        table.add_row(Text("" if rate is None else f"{rate:g}"), *cells)
    console.print(table)
    for line in notes(found):
        console.print(line, highlight=False, soft_wrap=True)


PLACE = ("inner_lr", "inner_steps")


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the trained setting gets, and by how much the best cell is better."""
    measure = measure_of(found)
    lines = []
    for which in ("trained", "best"):
        if found[which] and found[which][measure.name] is not None:
            at = place(found[which])
            lines.append(f"{which}: {at}: {measure.interval(found[which][measure.name], found[which]['ci95'])}")
    best = found["best"]
    if best and best["gain"] and best["gain_ci95"] is not None:
        gain = measure.interval(best["gain"], best["gain_ci95"])
        lines[-1] += f", {gain} better on the tasks that it was chosen on"
    if any(bad for row in found["diverged"] for bad in row):
        lines.append("!: the loss of some tasks is not finite")
    return lines


def task(found: Mapping[str, Any]) -> str:
    """What the cells are judged on."""
    shots = f"{found['shots']}-shot"
    kind = f"{shots} regression" if found["measure"] == "mse" else f"{found['ways']}-way {shots}"
    return f"{kind}, {found['episodes']:,} tasks of meta-{found['split']}"


def place(cell: Mapping[str, Any]) -> str:
    """Rate and steps of a cell."""
    steps = f"{cell['inner_steps']} inner step{'' if cell['inner_steps'] == 1 else 's'}"
    return steps if cell["inner_lr"] is None else f"rate {cell['inner_lr']:g}, {steps}"


def shown(measure: Measure, value: float | None) -> str:
    """A cell's number."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if measure is ACCURACY else f"{value:.3g}" if value < 1e4 else f"{value:.0e}"
