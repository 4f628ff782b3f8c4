"""Debian's prometheus, where it is installed."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

INFRA = Path(__file__).parents[2] / "infra"


@pytest.fixture(scope="session")
def infra() -> Path:
    return INFRA


@pytest.fixture(scope="session")
def prometheus() -> str:
    """The server's path."""
    found = shutil.which("prometheus")
    if found is None:
        pytest.skip("needs prometheus")
    return found


@pytest.fixture(scope="session")
def promtool() -> Callable[..., str]:
    """Runs promtool, which must be content, and returns what it says."""
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs prometheus")

    def run(*words: object) -> str:
        ended = subprocess.run([found, *map(str, words)], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    return run
