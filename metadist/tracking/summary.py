"""What a person sees at the end of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from metadist.measure import ACCURACY, MSE, NORMALISATION, Measure
from metadist.tracking.profile import table
from metadist.tracking.progress import duration


def print_tests(console: Console, found: Mapping[str, Any]) -> None:
    """The table of meta-tests alone."""
    tests = _tests(found)
    if tests is not None:
        console.print(tests)


def print_result(console: Console, result: Mapping[str, Any], run_dir: Path) -> None:
    """The accuracies in percent, what was computed how fast, and where the files are."""
    print_tests(console, result)
    if "profile" in result:
        console.print(table(result["profile"]))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for name, value in _facts(result, run_dir):
        facts.add_row(name, Text(value))
    console.print(facts)


def _tests(result: Mapping[str, Any]) -> Table | None:
    """A row per meta-test, the untrained initialisation first to compare with."""
    test = result.get("test")
    if not test:
        return None
    table = Table(title="meta-test", title_justify="left", title_style="bold")
    table.add_column("")
    for name in (_measure(test).name, "task", "queries", "normalisation", "episodes"):
        table.add_column(name, justify="left" if name in ("task", "normalisation") else "right")
    untrained = result.get("untrained")
    if untrained:
        table.add_row("untrained", *_row({**test, **untrained}), style="dim")
    table.add_row("trained", *_row(test), style="bold")
    for further in result.get("also") or []:
        table.add_row("also", *_row({**test, **further}))
    return table


def _row(test: Mapping[str, Any]) -> list[str]:
    return [
        _interval(test),
        f"{test['ways']}-way {test['shots']}-shot" if "accuracy" in test else f"{test['shots']}-shot regression",
        str(test["queries"]),
        NORMALISATION[test["transductive"]],
        f"{test['episodes']:,}",
    ]


def _facts(result: Mapping[str, Any], run_dir: Path) -> list[tuple[str, str]]:
    steps = f"{result['meta_steps']:,}"
    if result.get("steps_recomputed"):
        steps += f", {result['steps_recomputed']:,} recomputed"
    workers = f"{result['workers']} × {result['device']}" if result["workers"] else f"in process on {result['device']}"
    facts = [
        ("meta-steps", steps),
        ("workers", workers),
        ("speed", f"{result['tasks_per_second']:,.1f} tasks/s"),
        ("time", f"{duration(result['wall_seconds'])} ({result['wall_seconds']:,.0f} s)"),
        ("θ", f"{result['theta_sha256'][:12]}{'' if result.get('reproducible', True) else ' (not reproducible)'}"),
        ("files", str(run_dir)),
    ]
    best = result.get("best")
    if best:
        facts.insert(1, ("best validation", f"{_interval(best)} at meta-step {best['step']:,}"))
    return facts


def _measure(measured: Mapping[str, Any]) -> Measure:
    return ACCURACY if "accuracy" in measured else MSE


def _interval(measured: Mapping[str, Any]) -> str:
    measure = _measure(measured)
    return measure.interval(measured[measure.name], measured.get("ci95"), digits=2)
