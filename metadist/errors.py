"""The errors a person can cause or meet in normal operation.

Each carries one line that names the file or key and what would be valid. The
command line prints that line and exits with `exit_code`; anything that is not
a `MetadistError` is a defect and keeps its traceback.
"""


class MetadistError(Exception):
    """A known failure, told in one line."""

    exit_code = 2
    level = "error"
    """how the log of a run counts it"""


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
    level = "warning"


class Divergence(MetadistError):
    """A shard whose loss or gradient is not finite twice in a row; the last good state is kept."""

    exit_code = 5
