"""Run a published table's rows, some at once, and write the table after each of them."""

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from metadist.durable import lock, storage_errors
from metadist.errors import ConfigError, RunError
from metadist.reproduce.published import Line, PublishedTable, chosen, read_table
from metadist.reproduce.report import save
from metadist.reproduce.rows import Outcome, check, finished_row, run_row


def reproduce(
    name: str,
    *,
    budget: str,
    methods: str | None = None,
    settings: str | None = None,
    overrides: Sequence[str],
    out: Path,
    at_once: int,
    say: Callable[[str], None],
) -> tuple[PublishedTable, list[Outcome]]:
    """The table and our rows, in its order.

    Rows that are finished in `out` are not run again; those not asked for stay in the table.
    """
    table = read_table(name)
    lines = chosen(table, budget, methods, settings)
    folder = out / budget
    folders = [folder / line.folder for line in lines]
    for line, place in zip(lines, folders, strict=True):
        check(table, line, budget, overrides, place)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    others = _finished(table, [line for line in chosen(table, budget) if line not in lines], budget, overrides, folder)
    done: dict[int, Outcome] = {}
    with lock(folder / ".lock", wait=False) as ours, ThreadPoolExecutor(max_workers=at_once) as pool:
        if not ours:
            raise RunError(f"{folder}: another process is reproducing this table there")
        running = {
            pool.submit(run_row, table, line, budget, overrides, place, say): number
            for number, (line, place) in enumerate(zip(lines, folders, strict=True))
        }
        for future in as_completed(running):
            done[running[future]] = future.result()
            known = {row.line: row for row in (*others, *done.values())}
            save(folder, table, budget, [known[line] for line in table.rows if line in known])
            row = done[running[future]]
            say(f"{row.line.name}: {row.problem or f'{row.value:.4g} ± {row.ci95:.2g}'}")
    return table, [done[number] for number in sorted(done)]


def _finished(
    table: PublishedTable, lines: Sequence[Line], budget: str, overrides: Sequence[str], folder: Path
) -> list[Outcome]:
    """Rows that earlier calls have run in a folder, as far as they are runs of the table as it is now."""
    found = []
    for line in lines:
        place = folder / line.folder
        if (place / "result.json").is_file():
            with contextlib.suppress(ConfigError):
                check(table, line, budget, overrides, place)
                found.append(finished_row(table, line, budget, overrides, place))
    return found
