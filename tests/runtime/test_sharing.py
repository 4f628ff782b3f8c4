"""Memory that processes share: found by its handle, gone with its owner, used again when it was read."""

import multiprocessing
from multiprocessing.connection import Connection

import numpy as np
import pytest

from metadist.runtime import sharing
from metadist.runtime.sharing import Board, Gone, Outbox, Shared, Spaces


def put(box: Outbox, step: int, numbers: np.ndarray) -> Shared:
    space = box.place(step, numbers.nbytes)
    space.array(numbers.dtype.str, len(numbers))[:] = numbers
    return space.shared(numbers.dtype.str, len(numbers))


def owner(line: Connection) -> None:
    """A process with two numbers to hand over, until it hears something."""
    box = Outbox()
    line.send(put(box, 3, np.array([5, 7])))
    line.recv()
    line.send(int(box._places[0][0].head[0]))
    line.recv()


def test_between_processes() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=owner, args=(theirs,), daemon=True)
    process.start()
    shared: Shared = ours.recv()
    assert shared.pid == process.pid
    head, numbers = Spaces().read(shared)
    assert numbers.tolist() == [5, 7]
    assert head[0] == Outbox.WAITING
    head[0] = Outbox.READ
    ours.send(None)
    assert ours.recv() == Outbox.READ, "the owner sees it"
    with pytest.raises(Gone):
        Spaces().read(shared._replace(inode=shared.inode + 1))
    ours.send(None)
    process.join(10)
    assert numbers.tolist() == [5, 7], "whoever has it open keeps it"
    with pytest.raises(Gone):
        Spaces().read(shared)


def test_a_place_is_used_again_when_nobody_will_read_it() -> None:
    box, reader = Outbox(), Spaces()
    first = put(box, 0, np.arange(4))
    second = put(box, 0, np.arange(4))
    assert first.file != second.file, "the first one is not read yet"
    reader.read(first)[0][0] = Outbox.READ
    third = put(box, 0, np.arange(3, dtype=np.uint8))
    assert third.file == first.file
    assert reader.read(third)[1].tolist() == [0, 1, 2]
    assert put(box, 1, np.arange(4)).file in (first.file, second.file), "of another step"
    assert put(box, 1, np.arange(9)).file not in (first.file, second.file), "too large for them"


def test_parameters_stay_for_two_steps() -> None:
    board, reader = Board("<i8", 3), Spaces()

    def publish(step: int) -> tuple[np.ndarray, np.ndarray]:
        board.place(step)[:] = step
        return reader.read(board.publish(step))

    (zero, at_zero), (one, at_one) = publish(0), publish(1)
    assert (zero[0], one[0]) == (0, 1)
    assert [board.has(step) for step in range(3)] == [True, True, False]
    board.place(2)[:] = 2
    assert zero[0] not in range(3), "neither is there while it is written"
    assert not board.has(0)
    board.publish(2)
    assert (zero[0], at_zero.tolist()) == (2, [2, 2, 2])
    assert (one[0], at_one.tolist()) == (1, [1, 1, 1])


def test_few_are_kept_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "KEPT", 8)
    box, reader = Outbox(), Spaces()
    for number in range(20):
        assert reader.read(put(box, 0, np.array([number])))[1].tolist() == [number]
    assert len(reader._open) == 8
    context = multiprocessing.get_context("spawn")
    ours, theirs = multiprocessing.Pipe()
    process = context.Process(target=owner, args=(theirs,), daemon=True)
    process.start()
    reader.read(ours.recv())
    assert process.pid in {pid for pid, *_ in reader._open}
    process.kill()
    process.join(10)
    reader.prune()
    assert len(reader._open) == 7
    assert process.pid not in {pid for pid, *_ in reader._open}, "what the dead had is given back"
