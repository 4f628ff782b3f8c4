"""Between a driver and a group of ranks: commands go in, answers and reports come out.

A plain class with coroutines; it runs as a Ray actor that needs no CPU. Every rank reads the
same commands in the same order, each at its own pace. Who waits for what will never come,
because the group has ended, is handed the reason.
"""

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """The end of a group. defect: what a rank raised, where the end was no loss of a process."""

    reason: str
    defect: BaseException | None = None


class Mailbox:
    """Of one group of `world` ranks."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._commands: list[Any] = []
        self._answers: dict[int, dict[int, Any]] = {}
        self._reports: list[Any] = []
        self._ended: Ended | None = None
        self._news = asyncio.Condition()

    async def tell(self, command: Any) -> int:
        """A command for all ranks; returns its number."""
        async with self._news:
            self._commands.append(command)
            self._news.notify_all()
            return len(self._commands) - 1

    async def command(self, number: int) -> Any:
        """The command of a number, as soon as it is there."""
        return await self._when(lambda: len(self._commands) > number) or self._commands[number]

    async def answer(self, number: int, rank: int, value: Any) -> None:
        """What a rank says to a command."""
        async with self._news:
            self._answers.setdefault(number, {})[rank] = value
            self._news.notify_all()

    async def answers(self, number: int) -> "list[Any] | Ended":
        """What all ranks said to a command, in their order; once."""
        ended = await self._when(lambda: len(self._answers.get(number, ())) == self.world)
        if ended:
            return ended
        found = self._answers.pop(number)
        return [found[rank] for rank in sorted(found)]

    async def answered(self, number: int) -> int:
        """How many ranks have said something to a command."""
        return len(self._answers.get(number, ()))

    async def report(self, report: Any) -> int:
        """What the first rank tells unasked; returns how many commands there are by now."""
        async with self._news:
            self._reports.append(report)
            self._news.notify_all()
            return len(self._commands)

    async def reports(self) -> "list[Any] | Ended":
        """What has been told since the last call, as soon as there is something."""
        ended = await self._when(lambda: bool(self._reports))
        found, self._reports = self._reports, []
        return found or ended or []

    async def end(self, ended: Ended) -> None:
        """The group has ended; the first reason is the one that is told."""
        async with self._news:
            self._ended = self._ended or ended
            self._news.notify_all()

    async def _when(self, there: Callable[[], bool]) -> Ended | None:
        """Wait for a condition, or for the end of the group, which is returned."""
        async with self._news:
            await self._news.wait_for(lambda: there() or self._ended is not None)
        return None if there() else self._ended
