"""What a search has found: the answer in words, `best.yaml`, `search.json`, the Pareto table, figures and a report."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from metadist import __version__
from metadist.config import resolve, to_yaml
from metadist.durable import storage_errors, write
from metadist.measure import MEASURES, Measure
from metadist.report import search_figures
from metadist.report.html import Figure, Page, Section, html
from metadist.search import rows
from metadist.search.job import SearchJob
from metadist.search.ledger import Event
from metadist.search.state import Trial


class Answer(NamedTuple):
    """What the ledger says of the end of a search; None, or empty, where it has not come so far.

    selection: the finalists' second judgement, by trial; alone: the end of a packed winner's run by itself.
    """

    winner: Trial | None
    selection: dict[str, Event]
    alone: Event | None
    fresh: Event | None
    tested: Event | None


def answer(trials: Sequence[Trial], events: Sequence[Event]) -> Answer:
    """The answer as far as it is known."""
    chosen = next((event for event in reversed(events) if event.get("event") == "selected"), None)
    judged = {event["id"]: event for event in events if event.get("event") == "judged"}
    winner = next((trial for trial in trials if chosen and trial.id == chosen["id"]), None)

    def last(name: str) -> Event | None:
        about = winner.id if winner else None
        return next((e for e in reversed(events) if e.get("event") == name and e["id"] == about), None)

    return Answer(winner, judged, last("alone"), last("fresh"), last("tested"))


def by_itself(trial: Trial) -> Trial:
    """A packed trial as a run of its own, in a folder of its own."""
    return Trial(f"{trial.id}-alone", trial.index, trial.origin, trial.values)


def run_of(trial: Trial, events: Sequence[Event]) -> str:
    """Folder in `trials/` of the run whose bits a trial is known by."""
    alone = any(e.get("event") == "alone" and e["id"] == trial.id and e["how"] == "finished" for e in events)
    return by_itself(trial).id if alone else trial.id


def pareto(found: Sequence[Mapping[str, Any]], costs: Sequence[str], measure: Measure) -> list[Mapping[str, Any]]:
    """The rows of finished trials to which no other is at least as good in score and all costs, and better in one.

    The best score first.
    """
    sign = -1.0 if measure.higher_is_better else 1.0
    known = [row for row in found if row["how"] == "finished" and all(row[k] is not None for k in ("score", *costs))]
    aims = [(sign * row["score"], *(row[cost] for cost in costs)) for row in known]
    front = [
        row
        for row, mine in zip(known, aims, strict=True)
        if not any(other != mine and all(o <= m for o, m in zip(other, mine, strict=True)) for other in aims)
    ]
    return sorted(front, key=lambda row: (sign * row["score"], row["index"]))


def write_answer(job: SearchJob, trials: Sequence[Trial], folder: Path, events: Sequence[Event]) -> None:
    """All files of a search but the tables of trials, each replaced in one step. Raises StorageError."""
    found, table = answer(trials, events), rows.found(job, trials, events)
    measure, also = table.measure, job.search.also
    front = pareto(table.trials, also, measure) if also else []
    if found.winner is not None:
        write(folder / "best.yaml", job_file(job, found.winner, folder / "best.yaml", score_words(found, measure)))
    if front:
        columns = ["id", *job.search.space, "score", "ci95", *also]
        write_front(job, trials, folder, front, columns)
    write(folder / "search.json", json.dumps(summary(job, trials, events), indent=2).encode())
    figures = search_figures.save(table, folder / "figures")
    write(folder / "report.html", report(job, trials, events, table, front, figures).encode())


def write_front(
    job: SearchJob, trials: Sequence[Trial], folder: Path, front: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> None:
    """`pareto.parquet`, and `pareto/ID.yaml`, a job file for each of its trials."""
    rows.write_parquet(folder / "pareto.parquet", pa.Table.from_pylist([{k: row[k] for k in columns} for row in front]))
    of = {trial.id: trial for trial in trials}
    with storage_errors(folder / "pareto"):
        (folder / "pareto").mkdir(exist_ok=True)
    measure = job.measure
    for row in front:
        path = folder / "pareto" / f"{row['id']}.yaml"
        costs = ", ".join(f"{cost} {row[cost]:.4g}" for cost in job.search.also)
        words = [f"validation {measure.interval(row['score'], row['ci95'])}, {costs}"]
        write(path, job_file(job, of[row["id"]], path, words))


def job_file(job: SearchJob, trial: Trial, path: Path, words: Sequence[str]) -> bytes:
    """The run of a trial as a job file: it trains to the trial's bits."""
    values = ", ".join(f"{key}={show_value(value)}" for key, value in rows.values_of(job, trial).items())
    told = [f"Trial {trial.id} of a search: {values}", *words]
    if job.base.cluster.address != "local":
        told.append(f"cluster.address is {job.base.cluster.address}; cluster.address=local runs it on one machine")
    told.append(f"metadist train {shlex.quote(path.name)}")
    header = "".join(f"# {line}\n" for line in told)
    return (header + to_yaml(resolve(job.run_of(trial)))).encode()


def score_words(found: Answer, measure: Measure) -> list[str]:
    """The winner's scores, a line each."""
    told = []
    if found.winner is not None and found.winner.id in found.selection:
        chosen = found.selection[found.winner.id]
        packed = ", packed with others" if found.alone is not None else ""
        told.append(f"chosen by {interval(measure, chosen)} on {chosen['episodes']:,} validation tasks{packed}")
    if found.alone is not None:
        told.append(f"trained again by itself, to {interval(measure, found.alone)} in its last validation")
    if found.fresh is not None:
        told.append(gain_line(found.fresh, measure))
    if found.tested is not None:
        told.append(test_line(found.tested))
    return told


def summary(job: SearchJob, trials: Sequence[Trial], events: Sequence[Event]) -> dict[str, Any]:
    """What `search.json` holds."""
    found = answer(trials, events)
    ends = [trial.end for trial in trials if trial.end]
    facts = found.winner.end.facts if found.winner and found.winner.end else {}
    if found.alone is not None:
        facts = found.alone["facts"]
    return {
        "winner": found.winner and found.winner.id,
        "run": found.winner and f"trials/{run_of(found.winner, events)}",
        "values": found.winner and rows.values_of(job, found.winner),
        "theta_sha256": facts.get("theta_sha256"),
        "selection": {name: _without(event, "event", "id") for name, event in found.selection.items()},
        "fresh": found.fresh and _without(found.fresh, "event", "id"),
        "test": found.tested and _without(found.tested, "event", "id"),
        "meta_tests": sum(event.get("event") == "tested" for event in events),
        "trials": len(trials),
        "ended": dict(Counter(end.how for end in ends)),
        "trial_seconds": sum(end.facts.get("seconds") or 0.0 for end in ends),
        "measure": job.measure.name,
        "mode": job.measure.mode,
        "versions": {"metadist": __version__},
    }


def _without(event: Event, *names: str) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in names}


# --- words -------------------------------------------------------------------


def gain_line(fresh: Event, measure: Measure) -> str:
    """What the fresh tasks say, for a person."""
    told = f"{interval(measure, fresh['winner'])} on {fresh['episodes']:,} fresh validation tasks"
    if fresh.get("baseline") is None:
        return f"{told}; there is no finished trial of the job's own values to compare with"
    if fresh["id"] == fresh["against"]:
        return f"{told}; the job's own values, nothing better was found"
    return f"{told}, the job's own values {interval(measure, fresh['baseline'])}: {gain(fresh, measure)}"


def gain(fresh: Event, measure: Measure) -> str:
    """`better by 1.8 ± 0.9 points`, of a fresh event with a baseline."""
    by, ci95 = fresh["gain"], fresh["gain_ci95"]
    unit, digits = (100.0, ".1f") if measure.name == "accuracy" else (1.0, ".3g")
    width = "–" if ci95 is None else f"{unit * ci95:{digits}}"
    return (
        f"{'better' if by >= 0 else 'worse'} by {unit * abs(by):{digits}} ± {width}"
        f"{' points' if measure.name == 'accuracy' else ''}, task by task"
    )


def interval(measure: Measure, told: dict[str, Any], digits: int = 1) -> str:
    """A score of an event with its interval."""
    return "–" if told["score"] is None else measure.interval(told["score"], told["ci95"], digits)


def test_line(tested: Event) -> str:
    """`meta-test 93.1 ± 0.5 %, untrained 40.2 ± 0.8 %`."""
    measure = next(one for one in MEASURES.values() if one.name in tested["test"])  # whatever was searched by
    told, untrained = ({"score": t[measure.name], "ci95": t["ci95"]} for t in (tested["test"], tested["untrained"]))
    return (
        f"meta-test {interval(measure, told)} on {tested['test']['episodes']:,} tasks, "
        f"untrained {interval(measure, untrained)}"
    )


def show_value(value: Any) -> str:
    """A searched value as a person reads it: four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- the report --------------------------------------------------------------

CAPTIONS = {
    "heatmap": "Best last validation in each cell, and how many trials are behind it.",
    "curves": "Validation on the way. A cross ends the curve of a trial that was stopped early, a triangle one that "
    "failed.",
    "parallel": "Each line is a trial, the thick one the winner. Dashed ones did not finish.",
    "importance": "How much of reaching the best tenth of the trials each key accounts for (PED-ANOVA, "
    "Watanabe, Bansal and Hutter 2023), by their scores at the first step at which trials are compared.",
}


def report(
    job: SearchJob,
    trials: Sequence[Trial],
    events: Sequence[Event],
    table: search_figures.Found,
    front: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Path],
) -> str:
    """The HTML page."""
    found, measure, search = answer(trials, events), table.measure, job.search
    ends = Counter(trial.end.how if trial.end else "training" for trial in trials)
    counts = ", ".join(f"{count} {how}" for how, count in ends.items())
    lines = [f"{len(trials)} trials of {job.base.outer.steps:,} meta-steps at most: {counts}."]
    lines += [f"Searcher {search.searcher}, scheduler {search.scheduler}, metric {measure.name}, seed {search.seed}."]
    if found.winner is not None:
        values = ", ".join(f"{key} = {show_value(v)}" for key, v in rows.values_of(job, found.winner).items())
        lines = [f"Winner: trial {found.winner.id} with {values}.", *_sentences(score_words(found, measure)), *lines]
    else:
        lines = ["No winner: no trial took all its meta-steps.", *lines]
    sections = []
    sign = -1.0 if measure.higher_is_better else 1.0
    judged = [row for row in table.trials if row["selection"] is not None]
    if judged:
        heading = ("trial", *(short(key, table.keys) for key in table.keys), "screening", "selection")
        body = [
            (row["id"], *(show_value(row[key]) for key in table.keys), _told(measure, row["score"], row["ci95"]),
             _told(measure, row["selection"], row["selection_ci95"]))
            for row in sorted(judged, key=lambda row: (sign * row["selection"], row["index"]))
        ]  # fmt: skip
        sections.append(Section("Finalists", f"Judged again on {search.selection:,} validation tasks.", heading, body))
    if front:
        heading = ("trial", *(short(key, table.keys) for key in table.keys), "score", *search.also)
        body = [
            (row["id"], *(show_value(row[key]) for key in table.keys), _told(measure, row["score"], row["ci95"]),
             *(f"{row[cost]:,.4g}" for cost in search.also))
            for row in front
        ]  # fmt: skip
        sections.append(Section("Pareto front", "No trial is better in one column without a loss in another.",
                                heading, body))  # fmt: skip
    heading = ("trial", "proposed by", *(short(key, table.keys) for key in table.keys), "steps", "score", "end",
               "seconds", "reason")  # fmt: skip
    body = [
        (row["id"], row["origin"], *(show_value(row[key]) for key in table.keys), f"{row['steps']:,}",
         _told(measure, row["score"], row["ci95"]), row["how"] or "training",
         "–" if row["seconds"] is None else f"{row['seconds']:,.0f}", row["reason"] or "")
        for row in table.trials
    ]  # fmt: skip
    sections.append(Section("Trials", "Scores are those of the last validation.", heading, body))
    drawn = [Figure(name, CAPTIONS[name], path.read_bytes()) for name, path in figures.items()]
    return html(Page("Search of " + ", ".join(table.keys), lines, drawn, sections))


def _sentences(lines: Sequence[str]) -> list[str]:
    return [f"{line[:1].upper()}{line[1:]}." for line in lines]


def _told(measure: Measure, score: float | None, ci95: float | None) -> str:
    return "–" if score is None else measure.interval(score, ci95)


def short(key: str, among: Sequence[str]) -> str:
    """A key without its section, where that is clear."""
    name = key.rpartition(".")[2]
    return name if sum(other.rpartition(".")[2] == name for other in among) == 1 else key
