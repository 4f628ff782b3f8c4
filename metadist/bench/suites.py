"""The suites by name."""

from collections.abc import Callable
from importlib import import_module

from metadist.bench.record import Row
from metadist.errors import ConfigError

SUITES = ("engine", "peers", "workers", "memory", "scale", "search")


def run(suite: str, say: Callable[[str], None]) -> list[Row]:
    """Measure a suite; imported only when named, because some need Ray and others must run without."""
    if suite not in SUITES:
        raise ConfigError(f"bench: {suite!r} is no suite; valid: {', '.join(SUITES)}")
    rows: list[Row] = import_module(f"metadist.bench.{suite}").run(say)
    return rows
