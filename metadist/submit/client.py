"""Ray's job server, as a person who submits meets it: every refusal in one line.

The only file of this room that imports Ray.
"""

import contextlib
import http.client
import json
import logging
import os
import platform
import shlex
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from metadist.errors import ClusterError, RunError
from metadist.runtime.cluster import say_whether_there_is_a_token
from metadist.submit.package import stage
from metadist.submit.submission import Submission

TIMEOUT = 10.0
"""Seconds in which a job server says that it is one."""

YOUNG = 60.0
"""Seconds that a head may take from its first answer to the first job that it starts."""

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
TOKEN = "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH names it"  # noqa: S105, no token


class Attempt(NamedTuple):
    """One submission of a job: the first has the job's id, later ones `ID-2`, `ID-3`, …

    state: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; began, ended: Unix seconds; code: of the entry point.
    """

    submission: str
    job: str
    number: int
    verb: str
    run: str
    storage: str
    identity: str
    state: str
    began: float
    ended: float | None
    code: int | None
    message: str

    @property
    def over(self) -> bool:
        """Whether it has ended, however."""
        return self.state in ENDED

    @property
    def exit_code(self) -> int:
        """As of a command that had run here."""
        if self.state == "SUCCEEDED":
            return 0
        return 143 if self.state == "STOPPED" else self.code or 1


class Server:
    """The job server of a cluster. Every method raises ClusterError when it is gone."""

    def __init__(self, address: str, client: Any) -> None:
        self.address, self._client = address, client

    def attempts(self, job: str | None = None) -> list[Attempt]:
        """Of one job or of all, as they were submitted; jobs of others than `metadist submit` are passed over."""
        with self._answering():
            found = [_attempt(details) for details in self._client.list_jobs() if _is_ours(details)]
        return sorted((one for one in found if job in (None, one.job)), key=lambda one: (one.began, one.number))

    def last(self, name: str) -> Attempt:
        """The newest attempt of a job, or the one of that submission id."""
        found = [one for one in self.attempts() if name in (one.job, one.submission)]
        if not found:
            raise RunError(f"{name}: no such job at {self.address}; `metadist jobs list` names them")
        exactly = [one for one in found if one.submission == name and name != one.job]
        return (exactly or found)[-1]

    def submit(self, job: Submission, number: int) -> str:
        """Send a job; the id of the attempt. Raises RunError where that is taken already."""
        name = job.id if number == 1 else f"{job.id}-{number}"
        told = {
            "metadist": job.verb, "job": job.id, "attempt": str(number), "run": job.run, "storage": job.config.storage,
            "identity": job.identity,
        }  # fmt: skip
        words = ["metadist.jobs.entry", *job.words, "--id", job.id]
        self._send(name, words, job.job, told, job.environment)
        return name

    def run_apart(self, name: str, words: Sequence[str]) -> str:
        """Run a module of the package on the head to its end, and forget it; what it printed. Raises RunError."""
        self._send(name, words, None, {}, {})
        try:
            with self._answering():
                while (status := str(self._client.get_job_status(name).value)) not in ENDED:
                    time.sleep(0.3)
                printed: str = self._client.get_job_logs(name)
        finally:
            with contextlib.suppress(RuntimeError, ClusterError), self._answering():
                self._client.delete_job(name)
        if status != "SUCCEEDED":
            told = [line.removeprefix("error: ") for line in printed.splitlines() if line.startswith("error: ")]
            raise RunError(told[-1] if told else f"{name}: {status.lower()}: {printed[-500:]}")
        return printed

    def stop(self, name: str) -> None:
        """Ask an attempt to end; it keeps its state first."""
        with self._answering():
            self._client.stop_job(name)

    def printed(self, name: str) -> str:
        """All that an attempt has printed so far."""
        with self._answering():
            found: str = self._client.get_job_logs(name)
            return found

    async def tail(self, name: str) -> AsyncIterator[str]:
        """What an attempt prints, in pieces, until its end."""
        with self._answering():
            async for piece in self._client.tail_job_logs(name):
                yield piece

    def _send(
        self, name: str, words: Sequence[str], job: str | None, told: dict[str, str], env: dict[str, str]
    ) -> None:
        # Ray starts entry points in a shell of the head, whose `python` need not be the cluster's.
        command = f"exec {shlex.join([self._python(), '-m', *words])}"
        with tempfile.TemporaryDirectory() as folder, self._answering():
            package, work = stage(Path(folder), job)
            environment = {"py_modules": [str(package)], "working_dir": str(work), "env_vars": env}
            send = partial(self._client.submit_job, entrypoint=command, submission_id=name, metadata=told)
            until = time.monotonic() + YOUNG
            while True:
                try:
                    send(runtime_env=environment)
                    return
                except RuntimeError as error:
                    if "already exists" in str(error):
                        raise RunError(f"{name}: was submitted by somebody else meanwhile") from error
                    # A head answers before the part of it that starts jobs is up; Ray itself waits ten seconds for it.
                    if "No available agent" not in str(error) or time.monotonic() > until:
                        raise

    def _python(self) -> str:
        """The interpreter that the head's own workers run."""
        mark = "--python_worker_command="
        for node in self._asked("/nodes?view=summary")["data"]["summary"]:
            if node.get("raylet", {}).get("isHeadNode"):
                for word in node.get("cmdline") or []:
                    if word.startswith(mark):
                        return str(word.removeprefix(mark).split(" ")[0])
        return "python3"

    def versions(self) -> dict[str, str]:
        """Of Ray and Python on the cluster."""
        found = self._asked("/api/v0/cluster_metadata")["data"]
        return {"Ray": found["rayVersion"], "Python": found["pythonVersion"]}

    def _asked(self, path: str) -> dict[str, Any]:
        with self._answering():
            answer = self._client._do_request("GET", path, timeout=TIMEOUT)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        import aiohttp
        import requests

        try:
            yield
        except (requests.RequestException, aiohttp.ClientError, ConnectionError, RuntimeError) as error:
            raise ClusterError(f"the cluster at {self.address} does not answer: {_first(error)}") from error


def connect(address: str | None) -> Server:
    """The job server at an address, else at RAY_ADDRESS. Raises ClusterError."""
    given = address or os.environ.get("RAY_ADDRESS")
    if not given:
        raise ClusterError("--address: names no cluster, nor does RAY_ADDRESS; valid: http://HOST:8265")
    place = given.rstrip("/")
    _expect_answer(place)
    say_whether_there_is_a_token()
    with _told_by_environment(place):
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        _quiet()
        try:
            server = Server(place, JobSubmissionClient(place))
        except AuthenticationError as error:
            named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
            what = "takes another token than this one" if named else "asks for a token, and there is none"
            raise ClusterError(f"--address: the cluster at {place} {what}; {TOKEN}") from error
        except (ConnectionError, RuntimeError, OSError) as error:
            raise ClusterError(f"--address: no cluster answers at {place}: {_first(error)}") from error
    refuse_other_versions(server.versions(), place)
    return server


def _quiet() -> None:
    """Ray's client tells of every package and every connection."""
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)


def refuse_other_versions(there: dict[str, str], place: str) -> None:
    """Refuse a cluster whose Ray, or whose Python but for its last number, is another one."""
    import ray

    here = {"Ray": ray.__version__, "Python": platform.python_version()}
    for name, version in here.items():
        mine, other = (text.split("-")[0].split(".") for text in (version, there[name]))
        if name == "Python":
            mine, other = mine[:2], other[:2]
        if mine != other:
            raise ClusterError(
                f"--address: the cluster at {place} runs {name} {there[name]}, this is {name} {version}; submit with "
                f"{name} {'.'.join(other)}, or to a cluster with {'.'.join(mine)}"
            )


def _expect_answer(place: str) -> None:
    """Ask before Ray's client, which waits for ever where somebody listens and says nothing."""
    parts = urlsplit(place)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise ClusterError(f"--address: {place!r} is no address of a job server; valid: http://HOST:8265")
    try:
        with urllib.request.urlopen(f"{place}/api/version", timeout=TIMEOUT) as answer:  # noqa: S310, http(s) only
            told = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # a token is asked for: that is one
            return
        raise ClusterError(f"--address: what answers at {place} is no job server of Ray's ({error.code})") from error
    except (ValueError, http.client.HTTPException):  # no JSON, or no HTTP at all
        told = None
    except OSError as error:
        why = getattr(error, "reason", None) or error
        told = getattr(why, "strerror", None) or why
        raise ClusterError(f"--address: no cluster answers at {place}: {told}") from error
    if not isinstance(told, dict) or "ray_version" not in told:
        raise ClusterError(f"--address: what answers at {place} is no job server of Ray's; its port is 8265 mostly")


@contextlib.contextmanager
def _told_by_environment(place: str) -> Iterator[None]:
    """Ray's client takes the environment's address before the one that it is given."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = place
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _is_ours(details: Any) -> bool:
    return details.submission_id is not None and "metadist" in (details.metadata or {})


def _attempt(details: Any) -> Attempt:
    told = details.metadata
    return Attempt(
        details.submission_id,
        told["job"],
        int(told["attempt"]),
        told["metadist"],
        told["run"],
        told["storage"],
        told["identity"],
        str(details.status.value),
        details.start_time / 1000,
        details.end_time / 1000 if details.end_time else None,
        details.driver_exit_code,
        details.message or "",
    )


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
