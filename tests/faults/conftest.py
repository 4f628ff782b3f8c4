"""What the tests of faults share: deeds at chosen steps, stalls measured from a run's own metrics, a table of them."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

Deed = Callable[[Any], None]


class Measured(NamedTuple):
    """A line of the table at the end of a test run."""

    fault: str
    stall: float
    note: str


MEASURED = pytest.StashKey[list[Measured]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The stalls as they were measured; a busy machine shows in them, so the assertions are wide."""
    found = config.stash.get(MEASURED, [])
    if found:
        terminalreporter.section("faults")
        for line in found:
            terminalreporter.write_line(f"{line.fault:<44} longest gap between steps {line.stall:6.2f} s  {line.note}")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a line to the table of stalls."""

    def tell(fault: str, stall: float, note: str = "") -> None:
        request.config.stash.setdefault(MEASURED, []).append(Measured(fault, stall, note))

    return tell


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Deed]], dict[int, float]]:
    """Deeds that the driver's process does once each, right before it begins a step; returns when it did them."""
    from metadist.runtime.on_ray import OnRay

    real = OnRay.begin

    def plan(deeds: dict[int, Deed]) -> dict[int, float]:
        done: dict[int, float] = {}

        def begin(self: Any, step: int) -> None:
            if step in deeds and step not in done:
                done[step] = time.time()
                deeds[step](self)
            real(self, step)

        monkeypatch.setattr(OnRay, "begin", begin)
        return done

    return plan
