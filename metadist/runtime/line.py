"""A line between two processes of one machine, beside Ray: calls of an actor's methods by a socket.

Ray places an actor, watches and ends it. Each call of one by Ray costs a fraction of a millisecond of both processes
and of Ray's own, which is most of a step of a small network. By a line it costs a tenth. An actor serves its line
inside a call of Ray's, `serve`, so that errors and deaths are told as ever, and returns from it now and then: what was
called by Ray meanwhile has its turn. After `settle` what is called by Ray is done behind what was called by the line.
"""

import contextlib
import itertools
import os
import select
import socket
import struct
import sys
import time
import uuid
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from metadist.runtime.sharing import Gone, Shared, Space, Spaces

SECONDS = 1.0
"""An actor serves its line at a stretch."""

DEATH = 30.0
"""Seconds in which Ray tells why a process ended whose line broke."""

PROBE = 7


class Address(NamedTuple):
    """Where a line begins: a name that only this machine knows, and memory that only its processes can open."""

    name: str
    probe: Shared


class Broken(Exception):
    """The other process is gone; Ray does not say why."""


# --- the actor's end ---------------------------------------------------------


class Reached:
    """An actor that can be called by a line. Ray Client calls nothing but methods of the actor's class."""

    _listening: socket.socket | None = None
    _line: Connection | None = None
    _calls_taken = 0

    def listen(self) -> Address | None:
        """Where the driver finds the line; None where there are none. An earlier line, of another driver, ends."""
        if not sys.platform.startswith("linux"):
            return None
        for old in (self._listening, self._line):
            if old is not None:
                old.close()
        self._line, self._calls_taken = None, 0
        name = f"\0metadist-{uuid.uuid4().hex}"
        try:
            self._probe = Space(0)
            self._listening = socket.socket(socket.AF_UNIX)
            self._listening.bind(name)
            self._listening.listen()
        except OSError:
            return None
        self._probe.head[0] = PROBE
        return Address(name, self._probe.shared("u1", 0))

    def serve(self, session: int) -> None:
        """Answer what is called by the line, until the driver says so, or for some time."""
        if self._line is None:
            self._line = self._accepted()
        end = time.monotonic() + SECONDS
        try:
            while (call := self._called(end)) is not None:
                ticket, method, arguments = call
                if method is None:
                    if ticket == session:  # else it is of a session that had ended already
                        break
                    continue
                self._calls_taken += 1
                answer = getattr(self, method)(*arguments)
                if ticket is not None:
                    self._say(ticket, answer)
                if not self.more:
                    self.spare()
            self.served()
            self._say(None, (session, self._calls_taken))
        except BaseException:
            self._line.close()  # this call tells
            raise

    def spare(self) -> None:
        """While nothing waits: what may be done ahead. To be left when `more` comes."""

    def served(self) -> None:
        """Before what was called by Ray has its turn: what came by the line and is not done yet."""

    def _called(self, end: float) -> tuple[int | None, str | None, tuple[Any, ...]] | None:
        """The next call; None where none comes until then, or the driver is gone."""
        assert self._line is not None
        with contextlib.suppress(EOFError, OSError):
            if (left := end - time.monotonic()) > 0 and _comes(self._line, left):
                found: tuple[int | None, str | None, tuple[Any, ...]] = self._line.recv()
                return found
        return None

    def _say(self, ticket: int | None, what: Any) -> None:
        assert self._line is not None
        with contextlib.suppress(OSError):  # the driver is gone
            self._line.send((ticket, what))

    @property
    def more(self) -> bool:
        """Whether something comes by the line already, behind what is done now."""
        return self._line is not None and _comes(self._line)

    def _accepted(self) -> Connection:
        assert self._listening is not None, "listen comes before serve"
        self._listening.settimeout(DEATH)
        while True:
            found, _ = self._listening.accept()
            if _user(found) == os.getuid():
                self._listening.close()
                return Connection(found.detach())
            found.close()


def _comes(line: Connection, seconds: float = 0.0) -> bool:
    """As `Connection.poll`, which makes a selector each time: ten times as long."""
    ready = select.poll()
    ready.register(line.fileno(), select.POLLIN)
    return bool(ready.poll(1000 * seconds))


def _user(line: socket.socket) -> int:
    """Whose process is at the other end."""
    _, user, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)


# --- the driver's end --------------------------------------------------------


class Line:
    """To one actor.

    serving: the reference of the call of Ray's in which the actor serves, if the driver knows of one.
    """

    def __init__(self, ray: Any, actor: Any, connection: Connection) -> None:
        self.ray, self.actor, self.connection = ray, actor, connection
        self.serving: Any = None
        self._last: Any = None
        self._ready = select.poll()
        self._ready.register(connection.fileno(), select.POLLIN | select.POLLOUT)
        self._session = self._sent = self._taken = 0
        self._tickets = itertools.count()
        self._answers: dict[int, Any] = {}

    @classmethod
    def to(cls, ray: Any, actor: Any, address: Address | None) -> "Line | None":
        """None where the actor is not a process of this machine that shares memory with this one."""
        if address is None:
            return None
        found = socket.socket(socket.AF_UNIX)
        try:
            head, _ = Spaces().read(address.probe)
            found.connect(address.name)
            if head[0] == PROBE and _user(found) == os.getuid():
                return cls(ray, actor, Connection(found.detach()))
        except (OSError, Gone):
            pass
        found.close()
        return None

    def call(self, method: str, *arguments: Any) -> int:
        """Ask for a method's answer: its ticket."""
        ticket = next(self._tickets)
        self._send(ticket, method, arguments)
        return ticket

    def tell(self, method: str, *arguments: Any) -> None:
        """Have a method called; its answer is not sent."""
        self._send(None, method, arguments)

    def answers(self) -> dict[int, Any]:
        """Those that have come, by ticket. Raises EOFError or OSError where the line is broken."""
        while _comes(self.connection):
            self._receive()
        found, self._answers = self._answers, {}
        return found

    def answer(self, ticket: int) -> Any:
        """Wait for one. Raises what Ray says of an actor that died or failed, or Broken."""
        try:
            while ticket not in self._answers:
                self._receive()
        except (EOFError, OSError):
            raise self.why() from None
        return self._answers.pop(ticket)

    def rest(self) -> None:
        """What is called by Ray from now on is done when the actor has done what was called by the line."""
        if self.serving is not None:
            self.serving = None
            with contextlib.suppress(OSError):
                self.connection.send((self._session, None, ()))

    def settle(self) -> None:
        """The same; returns when it has. Raises as `answer` does."""
        try:
            while self.serving is not None or self._sent > self._taken:
                if self.serving is None:
                    self._serve()
                session = self._session
                self.connection.send((session, None, ()))
                while self.serving is not None and self._session == session:
                    self._receive(again=False)
        except (EOFError, OSError):
            raise self.why() from None

    def why(self) -> Exception:
        """Ray's error about an actor whose line is broken."""
        from ray.exceptions import RayError

        self.close()
        try:
            self.ray.get(self._last if self._last is not None else self.actor.listen.remote(), timeout=DEATH)
        except RayError as error:
            found: Exception = error
            return found
        return Broken("its line is broken")

    def close(self) -> None:
        """Nothing is called any more."""
        self.connection.close()

    def _serve(self) -> None:
        self._session += 1
        self.serving = self._last = self.actor.serve.remote(self._session)

    def _send(self, ticket: int | None, method: str, arguments: tuple[Any, ...]) -> None:
        with contextlib.suppress(EOFError, OSError):  # whoever waits for an answer hears of it
            self._until_there_is_room()
        if self.serving is None:
            self._serve()
        self._sent += 1
        with contextlib.suppress(OSError):
            self.connection.send((ticket, method, arguments))

    def _until_there_is_room(self) -> None:
        """Take what the actor says meanwhile: one that has returned to Ray with calls left would leave them there."""
        while True:
            ((_, state),) = self._ready.poll()
            if not state & select.POLLIN:
                return
            self._receive()

    def _receive(self, again: bool = True) -> None:
        """One message; of an actor that returned to Ray with calls left, it is called again."""
        ticket, found = self.connection.recv()
        if ticket is not None:
            self._answers[ticket] = found
            return
        session, self._taken = found
        if session == self._session:
            self.serving = None
            if again and self._sent > self._taken:
                self._serve()


def heard(lines: Iterable[Line], seconds: float) -> list[Line]:
    """Those by which something has come, or that are broken; waits for the first so long."""
    ready, found = select.poll(), {line.connection.fileno(): line for line in lines}
    for file in found:
        ready.register(file, select.POLLIN)
    return [found[file] for file, _ in ready.poll(1000 * seconds)]
