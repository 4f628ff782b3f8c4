"""What a person sees of a search: `metadist search show`, and the table while it runs."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from metadist.errors import RunError
from metadist.search.show import show, trials_of
from metadist.search.state import End, Report, Trial
from metadist.search.table import MOST_ROWS, Table, best_first, drawn


def printed(folder: Path, width: int = 150) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(folder, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def report(step: int, score: float, decision: str = "go") -> Report:
    told = {"step": step, "values": {"score": score, "ci95": 0.02}, "decision": decision, "why": ""}
    return Report(**{name: told[name] for name in Report._fields})


def test_a_finished_search(concluded_once: Any) -> None:
    text = printed(concluded_once.folder)
    assert "5 of 5 trials" in text and "winner" in text and "fresh validation tasks" in text and "points" in text
    assert "meta-test" in text and "not known with so few trials" in text
    assert f"metadist train {concluded_once.folder / 'best.yaml'}" in "".join(text.split("\n"))
    rows = [line for line in text.splitlines() if "8/8" in line or "4/8" in line or "1/8" in line]
    assert len(rows) == 5 and "diverged" in rows[-1], "what has no score is at the end"


def test_a_search_that_goes_on(searched: Any) -> None:
    ledger = searched.folder / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # the first validation, and half a line
    before = ledger.read_bytes()
    text = printed(searched.folder)
    assert "0 of 5 trials" in text and "best so far" in text and "4/8" in text and "training" in text
    assert ledger.read_bytes() == before, "looking changes nothing"


def test_a_search_that_has_only_begun(searched: Any) -> None:
    (searched.folder / "ledger.jsonl").write_bytes(b"")
    assert "0 of 5 trials" in printed(searched.folder)


def test_no_search_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no search folder"):
        printed(tmp_path)


def test_the_ledger_tells_of_the_trials(trained_once: Any) -> None:
    ledger = trained_once.ledger()
    ledger.close()
    assert trials_of(ledger.events) == trained_once.trials


def many(count: int) -> list[Trial]:
    values = {"algorithm.inner_lr": 0.1, "algorithm.inner_steps": 1}
    trials = [Trial(f"{n:03}", n, "random", values, reports=[report(4, n / 100)]) for n in range(count)]
    for trial in trials[:-1]:
        trial.end = End("stopped", 4, "", {})
    trials[-1].reports[0].values["score"] = -1.0  # the worst, but in training
    return trials


def test_the_live_table_has_room_for_those_in_training(trained_once: Any) -> None:
    table = drawn(trained_once.job, many(30), Console(width=80), MOST_ROWS)
    ids = list(table.columns[0].cells)
    assert len(ids) == MOST_ROWS and ids[0] == "028" and ids[-1] == "029" and table.caption == "and 10 more"


def test_a_trial_is_a_line_however_narrow_the_console(trained_once: Any) -> None:
    for width, intervals in ((80, True), (48, False)):
        console = Console(file=io.StringIO(), width=width)
        console.print(drawn(trained_once.job, many(9), console))
        assert isinstance(console.file, io.StringIO)
        lines = console.file.getvalue().splitlines()
        assert len([line for line in lines if line.lstrip()[:3].isdigit()]) == 9
        assert all(len(line) <= width and "…" not in line for line in lines)
        assert any("±" in line for line in lines) == intervals


def test_best_first(trained_once: Any) -> None:
    rows = [{"score": s, "index": n} for n, s in enumerate([0.2, None, float("nan"), 0.9, 0.2])]
    assert [row["index"] for row in best_first(trained_once.job, rows)] == [3, 0, 4, 1, 2]


def test_lines_where_there_is_no_terminal(trained_once: Any) -> None:
    now = [0.0]
    console = Console(file=io.StringIO(), width=40)
    table = Table(trained_once.job, console, lambda: now[0])
    values = {"algorithm.inner_lr": 0.125, "algorithm.inner_steps": 1}
    one, other = Trial("000", 0, "baseline", values), Trial("001", 1, "random", values)
    table.show([one])
    one.reports.append(report(4, 0.5))
    table.show([one, other])
    other.reports.append(report(4, 0.3))
    table.show([one, other])  # neither begun, nor ended, nor the best
    other.end = End("stopped", 4, "worse than half", {})
    table.show([one, other])
    table.show([one, other])
    now[0] += 11
    one.reports.append(report(8, 0.4))
    table.show([one, other])
    table.close()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "trial 000  inner_lr=0.125  inner_steps=1  0/8  training",
        "trial 000  inner_lr=0.125  inner_steps=1  4/8  50.0 ± 2.0 %  training  best so far",
        "trial 001  inner_lr=0.125  inner_steps=1  0/8  training",
        "trial 001  inner_lr=0.125  inner_steps=1  4/8  30.0 ± 2.0 %  stopped  worse than half",
        "trial 000  inner_lr=0.125  inner_steps=1  8/8  40.0 ± 2.0 %  training",
    ]


def test_a_terminal_gets_a_live_table(trained_once: Any) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=40)
    table = Table(trained_once.job, console)
    table.show(trained_once.trials)
    table.close()
    assert isinstance(console.file, io.StringIO)
    assert "5 of 5 trials" in console.file.getvalue() and "stopped" in console.file.getvalue()


def test_a_moved_folder_is_shown_as_well(concluded_once: Any, tmp_path: Path) -> None:
    there = Path(shutil.copytree(concluded_once.folder, tmp_path / "moved"))
    assert str(there) in "".join(printed(there, 400).split())
