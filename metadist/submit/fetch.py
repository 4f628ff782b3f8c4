"""A stored run brought back: from a bucket by pyarrow; from the head's disk through the job server.

The job server sends nothing but logs. So a job on the head prints the files, and the reader here puts them together:
a line of JSON with name, bytes and SHA-256 for each, then its content as lines of base64.
"""

import base64
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from metadist.durable import storage_errors
from metadist.errors import ClusterError, MetadistError, RunError
from metadist.submit.client import Server
from metadist.submit.storage import RUN, Storage
from metadist.submit.submission import outlives_a_host

MOST_BYTES = 512 * 2**20
"""Of a folder that comes through the job server, which holds the whole of it in memory."""

PIECE = 3 * 2**14


def fetch(server: Server | None, run: str, place: str, to: Path) -> int:
    """Bring the folder of a stored run to `to`; bytes. Raises RunError, StorageError, ClusterError.

    What is in a bucket comes without a server: its cluster may be gone.
    """
    if to.exists():
        raise RunError(f"--to: {to} exists already; choose another folder")
    with storage_errors(to):
        to.parent.mkdir(parents=True, exist_ok=True)
    if outlives_a_host(place):
        storage = Storage(place, run)
        if not storage.restore(to):
            raise RunError(_nothing(run, place))
        return sum(storage.files().values())
    if server is None:
        raise ClusterError(f"{place} is on the disk of a cluster's head, which alone can send it")
    name = f"fetch-{run[:80]}-{uuid.uuid4().hex[:8]}"
    printed = server.run_apart(name, ["metadist.jobs.send", run, place])
    passing = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}")
    try:
        with storage_errors(to):
            size = _write(_received(printed.splitlines()), passing)
            os.rename(passing, to)
    finally:
        shutil.rmtree(passing, ignore_errors=True)
    return size


def send(run: str, place: str) -> None:
    """Print a stored run's files. Raises MetadistError."""
    storage = Storage(place, run)
    names = storage.files()
    if not names:
        raise RunError(_nothing(run, place))
    size = sum(names.values())
    if size > MOST_BYTES:
        raise RunError(
            f"{run}: {size / 2**20:,.0f} MB are too many to come through the job server, at most "
            f"{MOST_BYTES / 2**20:,.0f} are; copy {storage.root}/{RUN} from the head, or store runs in a bucket"
        )
    for name in names:
        with storage.system.open_input_stream(f"{storage.root}/{RUN}/{name}") as read:
            content = read.read()
        print(json.dumps({"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}))
        for at in range(0, len(content), PIECE):
            print(base64.b64encode(content[at : at + PIECE]).decode())
    print(json.dumps({"end": len(names)}), flush=True)


def _received(lines: list[str]) -> Iterator[tuple[str, bytes]]:
    """Names and contents. Raises RunError where something is missing or damaged."""
    head: dict[str, object] = {}
    pieces: list[bytes] = []
    count = 0
    for line in lines:
        if not line.startswith("{"):
            if head:
                pieces.append(base64.b64decode(line))
            continue
        if head:
            content = b"".join(pieces)
            if hashlib.sha256(content).hexdigest() != head["sha256"]:
                raise RunError(f"{head['file']} was damaged on its way; fetch it again")
            yield str(head["file"]), content
            count += 1
        told, pieces = json.loads(line), []
        if "end" in told:
            if told["end"] != count:
                raise RunError(f"{told['end'] - count} of {told['end']} files are missing; fetch it again")
            return
        head = told
    raise RunError("the run did not come whole; fetch it again")


def _write(files: Iterator[tuple[str, bytes]], folder: Path) -> int:
    size = 0
    for name, content in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise RunError(f"{name}: is no name in a run folder")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
        size += len(content)
    return size


def _nothing(run: str, place: str) -> str:
    return f"{run}: nothing of it is stored in {place}"


def main() -> int:
    """On the head: `RUN STORAGE`."""
    try:
        send(*sys.argv[1:])
    except MetadistError as error:
        print("error:", " ".join(str(error).split()), flush=True)
        return error.exit_code
    return 0
