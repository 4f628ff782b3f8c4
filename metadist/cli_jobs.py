"""The verbs for a cluster that others started: `metadist submit`, `metadist jobs …`."""

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metadist.told import told_in_one_line

if TYPE_CHECKING:
    from metadist.submit.client import Attempt, Server

app = typer.Typer(help="Jobs on a cluster: what `metadist submit` has sent there.", no_args_is_help=True)

Address = Annotated[str | None, typer.Option(help="of the cluster's dashboard, http://HOST:8265; else RAY_ADDRESS")]
Id = Annotated[str, typer.Argument(metavar="ID", help="of the job, or of one of its attempts")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object a line, as it is kept")]

TAIL = 24
"""Lines of a finished job that its result is in."""


def submit(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[VERB] JOB [KEY=VALUE]...",
            help="VERB: train, search, evaluate (JOB: a run's id) or reproduce (JOB: a table); else by the job file",
        ),
    ],
    address: Address = None,
    id: Annotated[str | None, typer.Option(help="of the job; without it derived from config and code")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="show its log until it ends; exit as it does")] = False,
    best: Annotated[bool, typer.Option("--best", help="of evaluate")] = False,
    split: Annotated[str, typer.Option(help="of evaluate")] = "test",
    methods: Annotated[str | None, typer.Option(help="of reproduce")] = None,
    settings: Annotated[str | None, typer.Option(help="of reproduce")] = None,
    budget: Annotated[str, typer.Option(help="of reproduce")] = "short",
) -> None:
    """Run a job on a cluster that is there, whatever becomes of this terminal.

    The same thing again is not run twice: it is followed, its result is shown, or what was stopped or died goes on.
    Folders are those of the cluster: data.root=/DIR has to be there on every host.
    Examples: `metadist submit omniglot-maml-5w1s data.root=/DIR --address http://HOST:8265 --follow`,
    `metadist submit search-inner-loop`, `metadist submit evaluate ID eval.shots=5`,
    `metadist submit reproduce omniglot --methods maml,protonet`.
    """
    with told_in_one_line():
        from metadist.submit.jobs import send, stored_where
        from metadist.submit.submission import Options, submission

        options = Options(best, split, methods, settings, budget)
        job = submission(words, options, id)  # everything that can be refused here, is
        from metadist.submit.client import connect

        server = connect(address)
        if elsewhere := stored_where(server, job):
            job = submission([*words, f"storage={elsewhere}"], options, id)
        attempt, new = send(server, job, lambda line: print(line, flush=True))
        if attempt.over:
            _show_end(server, attempt)
        elif follow or not new:
            _follow(server, attempt, as_json=False)
        else:
            print(f"follow it: metadist jobs logs {attempt.job} --follow --address {server.address}")


@app.command("list")
def list_jobs(address: Address = None) -> None:
    """Name every job, and how it stands."""
    with told_in_one_line():
        from metadist.submit.client import connect

        newest = {one.job: one for one in connect(address).attempts()}
        width = max(map(len, newest), default=0)
        line = f"{{:{width}}}  {{:9}}  {{:19}}  {{:>8}}  {{:>8}}  {{}}"
        print(line.format("job", "verb", "submitted", "seconds", "attempts", "state"))
        for job, one in newest.items():
            print(line.format(job, one.verb, _clock(one.began), f"{_seconds(one):.0f}", one.number, _state(one)))


@app.command()
def status(id: Id, address: Address = None) -> None:
    """Tell how a job stands, where its results are, and what it said last."""
    with told_in_one_line():
        from metadist.submit.client import connect
        from metadist.submit.shown import messages

        server = connect(address)
        one = server.last(id)
        print(f"{one.submission}: {_state(one)}, {one.verb}, submitted {_clock(one.began)}, {_seconds(one):.0f} s")
        print(f"results: {one.storage}/{one.run}")
        for line in messages(server.printed(one.submission))[-TAIL:] or ([one.message] if one.message else []):
            print(f"  {line}")


@app.command()
def logs(
    id: Id,
    follow: Annotated[bool, typer.Option("--follow", help="until the job ends; exit as it does")] = False,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """Show what a job says."""
    with told_in_one_line():
        from metadist.submit.client import connect
        from metadist.submit.shown import messages

        server = connect(address)
        one = server.last(id)
        if follow:
            _follow(server, one, as_json)
            return
        for line in messages(server.printed(one.submission), as_json):
            print(line)


@app.command()
def stop(id: Id, address: Address = None) -> None:
    """End a job behind a checkpoint; the same submit goes on with it."""
    with told_in_one_line():
        from metadist.submit.client import connect
        from metadist.submit.shown import messages
        from metadist.submit.storage import RUN

        server = connect(address)
        one = server.last(id)
        if one.over:
            print(f"{one.job} is over: {_state(one)}")
            return
        server.stop(one.submission)
        while not (one := server.last(one.submission)).over:
            time.sleep(0.5)
        kept = [
            line
            for line in messages(server.printed(one.submission))
            if "SIGTERM" in line or line.startswith("results: ")
        ]
        for line in kept:
            print(line.removeprefix("error: "))
        if one.state == "SUCCEEDED":  # it was quicker
            print(f"{one.job} {_state(one)}")
            return
        kept_there = "" if one.verb == "evaluate" else f", from {one.storage}/{one.run}/{RUN}"
        print(f"{one.job} {_state(one)}; the same submit goes on with it{kept_there}")


@app.command()
def fetch(
    id: Id,
    to: Annotated[Path, typer.Option(metavar="DIR", help="new folder")],
    storage: Annotated[
        str | None, typer.Option(help="of a job that the cluster does not know any more; a bucket's needs no cluster")
    ] = None,
    address: Address = None,
) -> None:
    """Bring the run folder of a job back."""
    with told_in_one_line():
        from metadist.submit.client import connect
        from metadist.submit.fetch import fetch as bring
        from metadist.submit.submission import outlives_a_host

        if storage is None:
            server = connect(address)
            one = server.last(id)
            size = bring(server, one.run, one.storage, to)
        else:
            size = bring(None if outlives_a_host(storage) else connect(address), id, storage, to)
        print(f"fetched {to}: {size / 1e6:.1f} MB")


def _follow(server: "Server", attempt: "Attempt", as_json: bool) -> None:
    """Show the log to its end, and leave as the job does."""
    from metadist.submit.shown import follow

    try:
        follow(server, attempt.submission, lambda line: print(line, flush=True), as_json)
    except KeyboardInterrupt:
        print(f"\n{attempt.job} goes on; `metadist jobs stop {attempt.job}` ends it behind a checkpoint")
        raise typer.Exit(130) from None
    ended = server.last(attempt.submission)
    if ended.code is None and ended.state == "FAILED":
        print(f"{ended.submission}: {ended.message.strip().splitlines()[0] if ended.message else 'failed'}")
    if ended.exit_code:
        raise typer.Exit(ended.exit_code)


def _show_end(server: "Server", attempt: "Attempt") -> None:
    from metadist.submit.shown import messages

    for line in messages(server.printed(attempt.submission))[-TAIL:]:
        print(line)


def _state(attempt: "Attempt") -> str:
    return attempt.state.lower() + (f" with code {attempt.code}" if attempt.code else "")


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def _seconds(attempt: "Attempt") -> float:
    return (attempt.ended or time.time()) - attempt.began
