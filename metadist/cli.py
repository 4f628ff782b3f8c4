"""The verbs a person types."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metadist import cli_cluster, cli_jobs
from metadist.errors import ConfigError
from metadist.told import told_in_one_line

if TYPE_CHECKING:
    from metadist.data.table import Table

app = typer.Typer(
    name="metadist",
    help="Distributed meta-training: the same bits for any number of workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="The data sets that episodes are drawn from.", no_args_is_help=True)
track_app = typer.Typer(help="The copy of a run in MLflow.", no_args_is_help=True)
app.command()(cli_jobs.submit)
app.add_typer(cli_jobs.app, name="jobs")
app.add_typer(cli_cluster.app, name="cluster")
app.add_typer(data_app, name="data")
app.add_typer(track_app, name="track")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[JOB] [KEY=VALUE]...", help="a job file or a packaged job's name, then overrides"),
]


def process_started() -> float:
    """Unix time at which this process began."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(float(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if "btime" in line)
        return boot + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, StopIteration, ValueError):  # no /proc here
        return time.time() - time.process_time()


def _job_and_overrides(words: list[str] | None, searches: bool = False) -> tuple[str, list[str]]:
    named = [word for word in words or [] if "=" not in word]
    overrides = [word for word in words or [] if "=" in word]
    if len(named) > 1:
        raise ConfigError(f"one job at a time: {' and '.join(named)} are two; an override is written key=value")
    if not named:
        from metadist.config import packaged_files, packaged_jobs

        jobs = packaged_files().keys() - packaged_jobs().keys() if searches else packaged_jobs().keys()
        raise ConfigError(f"no job is named; packaged jobs: {', '.join(sorted(jobs))}, or a file's path")
    return named[0], overrides


@app.command()
def train(
    words: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="new run folder; runs/JOB-DATE-TIME without it")] = None,
    resume: Annotated[Path | None, typer.Option(help="run folder to go on with")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved config and run nothing")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="tell where the time went, and write it as a Chrome trace: profile.json")
    ] = False,
) -> None:
    """Meta-train a job, evaluate it and write a run folder.

    Examples: `metadist train quickstart`, `metadist train jobs/omniglot-maml-5w1s.yaml data.root=DIR
    cluster.workers=2 --run-dir runs/a`, `metadist train --resume runs/a`.
    """
    started = process_started()
    words = [*(words or []), "tracking.profile=true"] if profile else words
    with told_in_one_line():
        if resume is not None:
            _resume(resume, words or [], run_dir, dry_run, started)
            return
        from metadist.config import load, resolve, to_yaml

        job, overrides = _job_and_overrides(words)
        config = load(job, overrides)
        if dry_run:
            from metadist.data.sources import check
            from metadist.runtime.run_folder import fresh_name, refuse_existing
            from metadist.tracking.destination import check_uri, resolve_uri

            for source in config.data.sources:
                check(source)
            check_uri(config.tracking.uri)
            if run_dir is not None:
                refuse_existing(run_dir)
            resolved, folder = resolve(config), run_dir or fresh_name(job)
            uri = resolve_uri(config.tracking.uri, folder) or "off"
            print(to_yaml(resolved.with_values(tracking={"uri": uri})), end="")
            return
        from metadist.run import train as run

        _show(run(config, job, run_dir, started))


def _resume(folder: Path, overrides: list[str], run_dir: Path | None, dry_run: bool, started: float) -> None:
    if run_dir is not None or dry_run:
        raise ConfigError("--resume goes with overrides only; the run folder is the resumed one")
    jobs = [word for word in overrides if "=" not in word]
    if jobs:
        raise ConfigError(f"--resume takes its job from {folder}/config.yaml; leave out {jobs[0]}")
    from metadist.run import resume

    _show(resume(folder, overrides, started))


def _show(finished: object) -> None:
    from rich.console import Console

    from metadist.run import Finished
    from metadist.tracking.summary import print_result

    assert isinstance(finished, Finished)
    console = Console()
    print_result(console, finished.result, finished.folder)
    for note in finished.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


@app.command()
def search(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[JOB] [KEY=VALUE]... | show DIR", help="as of train; show: what a search has found"),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="new search folder; searches/JOB-DATE-TIME without it")] = None,
    resume: Annotated[Path | None, typer.Option(help="search folder to go on with")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved job and run nothing")] = False,
) -> None:
    """Search keys of the config, each trial a whole meta-training, and write a search folder.

    Examples: `metadist search search-inner-loop`, `metadist search JOB search.trials=64 search.concurrent=8
    cluster.address=auto --run-dir searches/a`, `metadist search --resume searches/a`,
    `metadist search show searches/a`.
    """
    with told_in_one_line():
        if words and words[0] == "show":
            from rich.console import Console

            from metadist.search.show import show

            if len(words) != 2 or run_dir is not None or resume is not None or dry_run:
                raise ConfigError("one search folder at a time: `metadist search show DIR`")
            show(Path(words[1]), Console())
            return
        from metadist.search.job import load_search, to_yaml
        from metadist.search.run import fresh_name, refuse, size, tried
        from metadist.search.run import resume as go_on
        from metadist.search.run import search as run

        if resume is not None:
            if run_dir is not None or dry_run:
                raise ConfigError("--resume goes with overrides only; the search folder is the resumed one")
            jobs = [word for word in words or [] if "=" not in word]
            if jobs:
                raise ConfigError(f"--resume takes its job from {resume}/search.yaml; leave out {jobs[0]}")
            go_on(resume, words or [])
            return
        name, overrides = _job_and_overrides(words, searches=True)
        if dry_run:
            job = load_search(name, overrides)
            refuse(job, run_dir or fresh_name(name))
            print(to_yaml(job), end="")
            print(f"# space: {size(job)}")
            if job.search.searcher == "grid":
                print(f"# {tried(job)}")
            return
        run(name, overrides, run_dir)


@app.command()
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="folder of a finished run")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as eval.shots=5")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="the best state on validation instead of the last")] = False,
    split: Annotated[str | None, typer.Option(help="test or val; without it test, with --sweep val")] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUES", help="algorithm.inner_lr=0.1:5:log:8, algorithm.inner_steps=0,1,2,3"),
    ] = None,
) -> None:
    """Meta-test a run's meta-parameters with other episodes than it was trained with.

    With --sweep, once for each key, under a grid of inner rates and steps in one pass; a heat map shows how much they
    matter. Examples: `metadist evaluate runs/a eval.episodes=1000 eval.shots=5`,
    `metadist evaluate runs/a --sweep algorithm.inner_lr=0.1:5:log:8 --sweep algorithm.inner_steps=0,1,2,3,5,10`.
    """
    with told_in_one_line():
        if sweep:
            _sweep(run_dir, overrides or [], sweep, best, split or "val")
            return
        from rich.console import Console

        from metadist.evaluate import evaluate as run
        from metadist.tracking.summary import print_tests

        found, path = run(run_dir, overrides or [], best=best, split=split or "test")
        print_tests(Console(), found)
        print(f"written to {path}")


def _sweep(run_dir: Path, overrides: list[str], words: list[str], best: bool, split: str) -> None:
    from rich.console import Console

    from metadist.evaluate import sweep as run
    from metadist.report.sweep_figure import save
    from metadist.report.sweep_table import show

    found, path = run(run_dir, overrides, words, best=best, split=split)
    show(Console(), found)
    print(f"written to {path} and {save(found, path.with_suffix('.png'))}")


@app.command()
def replay(run_dir: Annotated[Path, typer.Argument(help="folder of a run with cluster.strategy=async")]) -> None:
    """Compute an asynchronous run again from its ledger, in this process, and compare the meta-parameters.

    Exit code 1 where they differ.
    """
    with told_in_one_line():
        from metadist.replay import replay as run

        found = run(run_dir, lambda line: print(line, file=sys.stderr, flush=True))
        print(found.line(run_dir))
        if not found.equal:
            raise typer.Exit(1)


@app.command()
def embed(
    run_dir: Annotated[Path, typer.Argument(help="folder of a finished run of task-conditioned")],
    out: Annotated[Path | None, typer.Option(help="folder for the files; RUN/embeddings without it")] = None,
    tasks: Annotated[int | None, typer.Option(min=3, help="how many of them; eval.episodes without it")] = None,
    split: Annotated[str, typer.Option(help="test or val")] = "test",
) -> None:
    """Export the embedding of every task of the meta-test, with its family, as Parquet and as a plot."""
    with told_in_one_line():
        from metadist.evaluate import trained
        from metadist.evaluation.embeddings import embeddings, nearest_is_family
        from metadist.report.embeddings import save

        config, tables, values = trained(run_dir, split)
        rows = embeddings(config, tables, values, split, tasks or config.eval.episodes)
        share = nearest_is_family(rows)
        print(f"{len(rows)} tasks; the nearest other task is of the same family for {100 * share:.1f} % of them")
        for path in save(rows, out or run_dir / "embeddings"):
            print(f"wrote {path}")


@app.command()
def methods() -> None:
    """List the methods: what `algorithm.name` can be."""
    from rich.console import Console

    from metadist.config import load
    from metadist.methods import every_method

    console = Console(highlight=False)
    line = "{:18} {:24} {:9} {:5} {:7} {}"  # 80 columns
    console.print(line.format("algorithm.name", "paper", "orders", "ways", "numbers", "transductive"), style="bold")
    family = ""
    for method in every_method():
        if method.family != family:
            family = method.family
            console.print(f"\n{family}", style="bold")
        name = method.method_name()
        told = (
            f"  {name}",
            method.short_paper(),
            method.orders,
            "fixed" if method.class_bound else "any",
            "yes" if method.regression else "",
            "yes" if load(f"omniglot-{name}-5w1s").task.transductive else "",
        )
        console.print(line.format(*told).rstrip())
    console.print(
        "\norders: of differentiation in meta-training. ways: fixed, judged on as many classes as trained on. numbers: "
        "learns regression too. transductive: whether the packaged Omniglot recipe normalises a task's queries "
        "together; task.transductive and eval.transductive change it, and every result says which it was.",
        style="dim",
    )


@app.command()
def reproduce(
    words: Annotated[list[str], typer.Argument(metavar="TABLE [KEY=VALUE]...", help="omniglot or sinusoid")],
    methods: Annotated[str | None, typer.Option(help="rows of these methods only, such as maml,anil")] = None,
    settings: Annotated[str | None, typer.Option(help="rows of these settings only, such as 5w1s,20w1s")] = None,
    budget: Annotated[str, typer.Option(help="short: minutes on two cores; paper: the papers' recipes")] = "short",
    out: Annotated[Path | None, typer.Option(help="folder of table and runs; reproduced/TABLE without it")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="rows that run at the same time, on a cluster")] = 1,
) -> None:
    """Run a published table's job files and write our figures beside the papers'.

    Stopped in between, the same command goes on where it stopped. Example:
    `metadist reproduce omniglot --methods maml,protonet data.root=DIR`.
    """
    with told_in_one_line():
        from rich.console import Console

        from metadist.reproduce.report import show
        from metadist.reproduce.run import reproduce as run

        names, overrides = [w for w in words if "=" not in w], [w for w in words if "=" in w]
        if len(names) != 1:
            raise ConfigError(f"one table at a time, not {len(names)}: `metadist reproduce omniglot`")
        folder = out or Path("reproduced") / names[0]
        table, rows = run(
            names[0],
            budget=budget,
            methods=methods,
            settings=settings,
            overrides=overrides,
            out=folder,
            at_once=at_once,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        show(Console(), table, budget, rows)
        print(f"written to {folder / budget}/table.md")
        if any(row.problem for row in rows):
            raise typer.Exit(1)


@data_app.command("list")
def data_list() -> None:
    """Name every data set."""
    from rich.console import Console
    from rich.table import Table

    from metadist.config import GENERATED
    from metadist.data.sources import NAMES

    table = Table("name", "what", "splits", "needs")
    for name, entry in NAMES.items():
        needs = "data.root=FOLDER, or a download" if entry.downloads else "nothing"
        table.add_row(name, entry.description, ", ".join(entry.splits), needs)
    for name, description in GENERATED.items():
        table.add_row(name, description, "", "nothing")
    Console().print(table)


def _prepared(words: list[str]) -> "Table":
    """The table of `NAME [data.root=DIR] [data.split=SPLIT]`, built or opened."""
    from metadist.config import GENERATED, Source, apply_overrides, validate
    from metadist.data.sources import prepare

    names = [word for word in words if "=" not in word]
    if len(names) != 1:
        raise ConfigError(f"one data set at a time, not {len(names)}; `metadist data list` names them")
    if names[0] in GENERATED:
        raise ConfigError(f"{names[0]}: its tasks come from a formula; there are no images to prepare or to show")
    raw = apply_overrides({"data": {"name": names[0]}}, [word for word in words if "=" in word])
    if set(raw) != {"data"}:
        raise ConfigError("a data set has the keys data.root and data.split only")
    source: Source = validate(raw, "override").data.sources[0]
    return prepare(source, lambda line: print(line, file=sys.stderr))


DataWords = Annotated[list[str], typer.Argument(metavar="NAME [data.root=DIR] [data.split=SPLIT]")]


@data_app.command("prepare")
def data_prepare(words: DataWords) -> None:
    """Build a data set's table into the cache.

    Example: `metadist data prepare omniglot data.root=DIR`.
    """
    with told_in_one_line():
        table = _prepared(words)
        classes = ", ".join(f"{len(part.start)} meta-{which}" for which, part in table.splits.items())
        shape = "×".join(map(str, table.images.shape[1:]))
        print(f"{table.name}: {len(table.images):,} images {shape}, {classes} classes")
        print(f"table {table.path}, fingerprint {table.fingerprint[:16]}")


@data_app.command("show")
def data_show(
    words: DataWords,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("sheet.png"),
    part: Annotated[str, typer.Option(help="train, val or test classes")] = "train",
) -> None:
    """Draw a sheet of examples, a row per class."""
    with told_in_one_line():
        from metadist.data.sheet import save_sheet

        if part not in ("train", "val", "test"):
            raise ConfigError(f"--part: {part!r} is no part; valid: train, val, test")
        save_sheet(_prepared(words), out, split=part)
        print(f"wrote {out}")


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="engine, peers, workers, memory, scale or search")],
    out: Annotated[Path | None, typer.Option(help="folder for bench.json, bench.parquet and bench.png")] = None,
) -> None:
    """Measure speed: tables, and with --out their figures as files."""
    with told_in_one_line():
        from rich.console import Console

        from metadist.bench.files import save
        from metadist.bench.suites import run
        from metadist.bench.table import show

        rows = run(suite, lambda line: print(line, file=sys.stderr, flush=True))
        show(Console(), suite, rows)
        for path in save(out, suite, rows) if out is not None else []:
            print(f"wrote {path}")


@track_app.command("sync")
def track_sync(run_dir: Annotated[Path, typer.Argument(help="run folder, or that of a search")]) -> None:
    """Deliver what a tracking server that was away has not got yet."""
    with told_in_one_line():
        from metadist.errors import RunError
        from metadist.tracking.search_copy import is_search, sync_folder

        search = is_search(run_dir)
        if not search and not (run_dir / "config.yaml").is_file():
            raise RunError(f"{run_dir}: is no run folder, it has no config.yaml")
        report = sync_folder(run_dir, final=(run_dir / ("search.json" if search else "result.json")).exists())
        print(report.line(run_dir))
        if report.problem:
            raise typer.Exit(4)


def main() -> None:
    """Entry point of the console script."""
    app()
