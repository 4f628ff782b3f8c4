"""`metadist search show DIR`: what a search has found so far, from its ledger and its job alone."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from metadist.search import rows
from metadist.search.answer import answer, pareto, score_words, short, show_value
from metadist.search.events import trials_of
from metadist.search.job import load_search
from metadist.search.ledger import read_ledger
from metadist.search.table import best_first, drawn


def show(folder: Path, console: Console) -> None:
    """Print the trials, the best one, what mattered, and the gain with its interval. Changes nothing.

    Raises RunError where the folder is none of a search, or its ledger is damaged.
    """
    events = read_ledger(folder / "ledger.jsonl")
    job = load_search(folder / "search.yaml")
    trials = trials_of(events)
    table = rows.found(job, trials, events)
    found, measure, keys = answer(trials, events), job.measure, tuple(job.search.space)
    console.print(drawn(job, trials, console))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    ranked = [row for row in best_first(job, table.trials) if row["score"] is not None]
    if found.winner is not None:
        values = ", ".join(f"{key}={show_value(v)}" for key, v in rows.values_of(job, found.winner).items())
        facts.add_row("winner", f"trial {found.winner.id}: {values}")
        for line in score_words(found, measure):
            facts.add_row("", line)
    elif ranked:
        best = next((row for row in ranked if row["how"] == "finished"), ranked[0])
        values = ", ".join(f"{key}={show_value(best[key])}" for key in keys)
        score = measure.interval(best["score"], best["ci95"])
        facts.add_row("best so far", f"trial {best['id']}: {values}, {score} behind {best['steps']:,} meta-steps")
    shares = table.shares()
    told = ", ".join(f"{short(key, keys)} {100 * share:.0f} %" for key, share in shares.items())
    facts.add_row("what mattered", told or "not known with so few trials")
    if job.search.also:
        for row in pareto(table.trials, job.search.also, measure):
            costs = ", ".join(f"{cost} {row[cost]:,.4g}" for cost in job.search.also)
            facts.add_row("Pareto", f"trial {row['id']}: {measure.interval(row['score'], row['ci95'])}, {costs}")
    for name in ("best.yaml", "report.html"):
        if found.winner is not None and (folder / name).is_file():
            facts.add_row("train it" if name == "best.yaml" else "report",
                          f"metadist train {folder / name}" if name == "best.yaml" else str(folder / name))  # fmt: skip
    console.print(facts, highlight=False)
