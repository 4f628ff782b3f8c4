"""How a command tells what a person can cause or meet: one line, and an exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from metadist.errors import MetadistError


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Known errors become one line and an exit code; anything else keeps its traceback."""
    try:
        yield
    except MetadistError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
