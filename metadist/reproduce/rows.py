"""One row of a reproduced table: a `metadist train` of its own process, and what came of it."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metadist.config import load, refuse_changed_mathematics, resolve
from metadist.errors import ConfigError
from metadist.reproduce.published import Line, PublishedTable
from metadist.runtime.journal import read_metrics


@dataclass(frozen=True)
class Outcome:
    """Our side of a row.

    value, ci95: in the table's unit; curve: (meta-step, validation) on the way there; problem: why there is none.
    """

    line: Line
    command: str
    value: float | None = None
    ci95: float | None = None
    untrained: float | None = None
    steps: int = 0
    seconds: float = 0.0
    transductive: bool | None = None
    hardware: str = ""
    curve: tuple[tuple[int, float], ...] = ()
    problem: str = ""

    @property
    def difference(self) -> float | None:
        """Ours − published."""
        if self.value is None or self.line.published is None or self.line.variant:
            return None
        return self.value - self.line.published.value

    def misses_its_aim(self, higher_is_better: bool) -> bool:
        """Whether ours is worse than what the short budget is expected to reach."""
        if self.value is None or self.line.aim is None:
            return False
        return self.value < self.line.aim if higher_is_better else self.value > self.line.aim

    def falls_short(self, higher_is_better: bool) -> bool:
        """Whether ours is worse than the published figure by more than our interval."""
        difference = self.difference
        if difference is None:
            return False
        return (-difference if higher_is_better else difference) > (self.ci95 or 0.0)


def overrides_of(table: PublishedTable, line: Line, budget: str, further: Sequence[str]) -> list[str]:
    """The overrides of a row's job: those of its recipe, those of the budget, then the person's."""
    cut = (*table.short, *(line.short or ())) if budget == "short" else ()
    return [*line.recipe, *cut, *further]


def check(table: PublishedTable, line: Line, budget: str, further: Sequence[str], folder: Path) -> None:
    """Refuse, before anything runs, a row that is no valid config, or whose folder holds another one's run."""
    wanted = resolve(load(line.job, overrides_of(table, line, budget, further)))
    if not (folder / "config.yaml").is_file():
        return
    there = load(folder / "config.yaml")
    try:
        refuse_changed_mathematics(there, wanted)
    except ConfigError as error:
        key = str(error).partition(":")[0]
        raise ConfigError(f"{folder}: holds a run with another {key}; name another --out, or remove it") from error
    if there.eval != wanted.eval:
        raise ConfigError(f"{folder}: holds a run with another eval section; name another --out, or remove it")


def run_row(
    table: PublishedTable, line: Line, budget: str, further: Sequence[str], folder: Path, say: Callable[[str], None]
) -> Outcome:
    """Train and judge a row in `folder`, or go on with it, or read what is finished there already."""
    overrides = overrides_of(table, line, budget, further)
    if not (folder / "result.json").is_file():
        begun = (folder / "config.yaml").is_file()
        words = ["--resume", str(folder)] if begun else [line.job, *overrides, "--run-dir", str(folder)]
        config = resolve(load(line.job, overrides))
        where = f"on {config.engine.device}, {config.cluster.most or 'no'} workers"
        say(f"{line.name}: {'going on' if begun else 'training'} in {folder} ({where})")
        if config.engine.device == "cpu" and torch.cuda.is_available():
            say(f"{line.name}: a GPU is here; engine.device=cuda would use it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        with log.open("a") as file:
            done = subprocess.run(
                [sys.executable, "-c", "from metadist.cli import main; main()", "train", *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            lines = [text for text in log.read_text(errors="replace").splitlines() if text.strip()]
            return Outcome(line, command_of(line, overrides), problem=(lines or ["no output"])[-1][:200])
    return finished_row(table, line, budget, further, folder)


def finished_row(table: PublishedTable, line: Line, budget: str, further: Sequence[str], folder: Path) -> Outcome:
    """What came of a row that has run to its end in `folder`."""
    result = json.loads((folder / "result.json").read_text())
    command = command_of(line, overrides_of(table, line, budget, further))
    return _outcome(table, line, command, result, _curve(table, folder / "metrics.parquet"))


def command_of(line: Line, overrides: Sequence[str]) -> str:
    """What a person types to run the row alone."""
    return f"metadist train {line.job} {shlex.join(overrides)}".strip()


def _curve(table: PublishedTable, path: Path) -> tuple[tuple[int, float], ...]:
    column, unit = f"val_{table.measure}", 100.0 if table.measure == "accuracy" else 1.0
    return tuple((row["step"], unit * row[column]) for row in read_metrics(path) if column in row)


def _outcome(
    table: PublishedTable, line: Line, command: str, result: dict[str, Any], curve: tuple[tuple[int, float], ...]
) -> Outcome:
    test, unit = result.get("test"), 100.0 if table.measure == "accuracy" else 1.0
    if not test or table.measure not in test:
        return Outcome(line, command, problem=f"its result has no {table.measure} (eval.test is off?)")
    return Outcome(
        line,
        command,
        value=unit * test[table.measure],
        ci95=unit * test["ci95"],
        untrained=unit * result["untrained"][table.measure],
        steps=result["meta_steps"],
        seconds=result["wall_seconds"],
        transductive=test["transductive"],
        hardware=_hardware(result),
        curve=curve,
    )


def _hardware(result: dict[str, Any]) -> str:
    """What ran the row, as its result says."""
    there, workers = result.get("hardware"), result["workers"]
    if there is None:
        return "unknown, of a version that did not record it"
    who = f"{workers} workers" if workers > 1 else "1 worker" if workers else "one process"
    if result["device"] == "cuda":
        return f"{who} on {result['gpus'] or 1:g} × {there['gpu']}"
    return f"{who} on {there['cpu']} with {there['cores']} cores, {there['instructions']}"
