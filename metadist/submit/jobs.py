"""Submitting, once: the same thing again is followed, shown, or gone on with."""

from collections.abc import Callable

from metadist.config import STORAGE
from metadist.errors import ClusterError, RunError
from metadist.submit.client import Attempt, Server
from metadist.submit.submission import Submission, outlives_a_host

Say = Callable[[str], None]


def stored_where(server: Server, job: Submission) -> str | None:
    """The storage of the run that an evaluation judges, where the cluster knows another one than the job says."""
    if job.verb != "evaluate" or job.config.storage != STORAGE:
        return None
    known = [one.storage for one in server.attempts(job.run)]
    return known[-1] if known and known[-1] != STORAGE else None


def send(server: Server, job: Submission, say: Say) -> tuple[Attempt, bool]:
    """The attempt that does a job, and whether it is a new one. Raises RunError and ClusterError.

    What has ended otherwise than well is submitted again under an id of its own, as Ray takes none twice; it goes on
    with the stored run.
    """
    every = server.attempts()
    known = [one for one in every if one.job == job.id]
    if known:
        last = known[-1]
        if last.identity != job.identity:
            raise RunError(f"{job.id}: is submitted with another config or other code; choose another --id")
        if not last.over:
            say(f"{job.id} exists, and is {last.state.lower()}: following it")
            return last, False
        if last.state == "SUCCEEDED":
            say(f"{job.id} exists, and has finished")
            return last, False
        say(f"{job.id} exists, and {last.state.lower()}: going on with it")
    waiting = [one.submission for one in every if not one.over]
    if len(waiting) >= job.config.jobs.queue:
        raise ClusterError(
            f"jobs.queue: {len(waiting)} jobs wait or run at {server.address}, {job.config.jobs.queue} may: wait for "
            f"one, stop one (`metadist jobs stop {waiting[0]}`), or a larger jobs.queue"
        )
    name = server.submit(job, known[-1].number + 1 if known else 1)
    say(f"submitted {name}")
    lasts = outlives_a_host(job.config.storage)
    where = "" if lasts else " on the disk of the cluster's head; storage=s3://… outlives it"
    say(f"results: {job.config.storage}/{job.run}{where}")
    return server.last(name), True
