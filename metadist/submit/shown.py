"""The log of a job as a person reads it: the message of each line; or as it is."""

import asyncio
import json
import re
from collections.abc import Callable

from metadist.submit.client import Server

RAYS = re.compile(r"Running entrypoint for job |.* -- Runtime env is setting up\.$")
"""What Ray writes into every job's log."""

RESUME = re.compile(r"; go on with `metadist \w+ --resume [^`]*`")
"""Of a process that is stopped: what it writes is moved into the storage, and its folder goes."""

Print = Callable[[str], None]


def readable(line: str, as_json: bool) -> str | None:
    """A line of a job's log for a person, or as JSON; None where it says nothing."""
    try:
        told = json.loads(line)
    except ValueError:
        told = None
    if isinstance(told, dict) and "message" in told:
        return line if as_json else RESUME.sub("", str(told["message"]))
    if RAYS.match(line) or not line.strip():
        return None
    return json.dumps({"message": line}, ensure_ascii=False) if as_json else line


def messages(text: str, as_json: bool = False) -> list[str]:
    """All lines of a log."""
    found = (readable(line, as_json) for line in text.splitlines())
    return [line for line in found if line is not None]


def follow(server: Server, name: str, show: Print, as_json: bool = False) -> None:
    """Show what an attempt prints, from its beginning to its end. Raises ClusterError where the cluster goes away."""

    async def all_of_it() -> None:
        rest = ""
        async for piece in server.tail(name):
            *lines, rest = (rest + piece).split("\n")
            for line in filter(None, (readable(line, as_json) for line in lines)):
                show(line)
        for line in messages(rest, as_json):
            show(line)

    asyncio.run(all_of_it())
