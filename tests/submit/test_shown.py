"""What a person sees of a job's log."""

import hashlib
import json

import pytest

from metadist.errors import RunError
from metadist.submit.fetch import _received
from metadist.submit.shown import messages

LOG = "\n".join([
    "2026-01-01 00:00:00,000\tINFO job_manager.py:568 -- Runtime env is setting up.",
    "Running entrypoint for job a: exec python3 -m metadist.jobs.entry train job.yaml --id a",
    json.dumps({"time": 1.0, "level": "info", "run": "a", "step": 3, "worker": None, "message": "two\nlines"}),
    "/bin/sh: 1: exec: python3: not found",
])  # fmt: skip


def test_messages_and_what_is_not_of_ray() -> None:
    assert messages(LOG) == ["two\nlines", "/bin/sh: 1: exec: python3: not found"]


def test_as_json_every_line_is_an_object() -> None:
    first, second = map(json.loads, messages(LOG, as_json=True))
    assert (first["run"], first["step"]) == ("a", 3)
    assert second == {"message": "/bin/sh: 1: exec: python3: not found"}


HEAD = json.dumps({"file": "a", "bytes": 1, "sha256": hashlib.sha256(b"a").hexdigest()})


@pytest.mark.parametrize(
    ("lines", "say"),
    [
        ([HEAD, "YQ=="], "did not come whole"),
        ([HEAD, "Yg==", '{"end": 1}'], "a was damaged on its way"),
        ([HEAD, "YQ==", '{"end": 2}'], "1 of 2 files are missing"),
        ([], "did not come whole"),
    ],
)
def test_a_run_that_does_not_come_whole(lines: list[str], say: str) -> None:
    with pytest.raises(RunError, match=say):
        list(_received(lines))


def test_a_run_that_comes_whole() -> None:
    assert list(_received(["what Ray says", HEAD, "YQ==", '{"end": 1}'])) == [("a", b"a")]


def test_a_folder_that_goes_is_not_recommended() -> None:
    """The process tells where it wrote, on a host of the cluster; as JSON it stays what it was."""
    for verb in ("train", "search"):
        text = f"error: ended by SIGTERM; step 7 is kept; go on with `metadist {verb} --resume /cache/jobs/a`"
        line = json.dumps({"message": text})
        assert messages(line) == ["error: ended by SIGTERM; step 7 is kept"]
        assert messages(line, as_json=True) == [line]
