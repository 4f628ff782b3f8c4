"""The errors a person can cause or meet in normal operation.

Each carries one line that names the file or key and what would be valid. The
command line prints that line and exits with `exit_code`; anything that is not
a `MetadistError` is a defect and keeps its traceback.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class MetadistError(Exception):
    """A known failure, told in one line."""

    exit_code = 2


class ConfigError(MetadistError):
    """A job file, key or value that cannot be run."""


class DataError(MetadistError):
    """A data set that is missing, damaged or too small for the episodes asked of it."""


class RunError(MetadistError):
    """A run folder that cannot be created, resumed or read."""


class StorageError(MetadistError):
    """A disk that is full or does not take our files."""

    exit_code = 3


class ClusterError(MetadistError):
    """A Ray cluster that does not answer or cannot hold the workers."""

    exit_code = 4


class Interrupted(MetadistError):
    """A person stopped the run; it can go on from its last checkpoint."""

    exit_code = 130


class Divergence(MetadistError):
    """A shard whose loss or gradient is not finite twice in a row; the last good state is kept."""

    exit_code = 5


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Known errors become one line and an exit code; anything else keeps its traceback."""
    try:
        yield
    except MetadistError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
