"""The ledger: what is cut off and what is refused, whatever happens to the file; one driver at a time."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.errors import RunError, StorageError
from metadist.search.ledger import Ledger, read_ledger

EVENTS = [
    {"event": "trial", "id": "000", "values": {"algorithm.inner_lr": 0.1 + 0.2, "model.norm": "größe\n"}},
    {"event": "report", "id": "000", "step": 10, "values": {"score": 1 / 3}, "decision": "go"},
    {"event": "end", "id": "000", "facts": {"nested": [1, None, True, {"a": "b c"}]}},
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def written(path, events):
    path.unlink(missing_ok=True)
    ledger = Ledger(path)
    for event in events:
        ledger.append(event)
    ledger.close()
    return path.read_bytes()


def test_events_come_back_as_they_were(path):
    assert Ledger(path).events == []
    content = written(path, EVENTS)
    assert read_ledger(path) == EVENTS and Ledger(path).events == EVENTS
    assert content.count(b"\n") == len(EVENTS) and content.startswith(b'{"event":"trial","id":"000",')


def test_every_prefix_opens_to_its_whole_lines_and_goes_on(path):
    content = written(path, EVENTS)
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = content[:size].count(b"\n")
        assert read_ledger(path) == EVENTS[:whole]
        told = []
        ledger = Ledger(path, told.append)
        assert ledger.events == EVENTS[:whole]
        assert bool(told) == (not content[:size].endswith(b"\n") and size > 0)
        for event in EVENTS[whole:]:
            ledger.append(event)
        ledger.close()
        assert path.read_bytes() == content


def test_a_flipped_bit_is_refused_or_costs_the_end_alone(path):
    """In a line with others behind it: refused, with its number. In what may be an unfinished last line: cut off."""
    content = written(path, EVENTS)
    ends = [at for at, byte in enumerate(content) if byte == 10]
    for at in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            line = content[:at].count(b"\n")
            if at < ends[-2]:
                with pytest.raises(RunError, match=rf"ledger.jsonl line {line + 1}: is damaged; [^\n]+$"):
                    read_ledger(path)
            elif bytes(damaged).count(b"\n") > len(EVENTS):  # a line break within the last line: a whole one is behind
                with pytest.raises(RunError, match=r"ledger.jsonl line 3: is damaged"):
                    read_ledger(path)
            else:
                assert read_ledger(path) == EVENTS[: line if at > ends[-2] else 1]


def test_lines_that_are_missing_swapped_or_twice_are_refused(path):
    lines = written(path, EVENTS).splitlines(keepends=True)
    for order in ([0, 2, 1], [1, 0, 2], [1, 2, 0], [0, 0, 1], [2, 1, 0]):
        path.write_bytes(b"".join(lines[n] for n in order))
        with pytest.raises(RunError, match="is damaged"):
            read_ledger(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=5), st.data())
def test_any_events_survive_a_cut_anywhere(tmp_path_factory, events, data):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    content = written(path, events)
    assert read_ledger(path) == events
    size = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:size])
    ledger = Ledger(path)
    assert ledger.events == events[: content[:size].count(b"\n")]
    ledger.append({"again": 1})
    ledger.close()
    assert read_ledger(path) == [*ledger.events]


def test_a_number_that_is_none_is_a_defect_and_writes_nothing(path):
    ledger = Ledger(path)
    with pytest.raises(ValueError, match="JSON"):
        ledger.append({"score": float("nan")})
    assert path.read_bytes() == b"" and ledger.events == []


@pytest.mark.parametrize("fails", ["write", "fsync", "short"])
def test_a_disk_that_does_not_take_an_event_leaves_none(path, monkeypatch, fails):
    ledger = Ledger(path)
    ledger.append(EVENTS[0])
    write, left = os.write, [1]

    def failing(handle, *what):
        if not left:
            return write(handle, *what) if what else None
        left.pop()
        if fails == "short":
            return write(handle, what[0][:7])
        if fails == "write":
            write(handle, what[0][:7])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync" if fails == "fsync" else "write", failing)
    with pytest.raises(StorageError, match=r"ledger.jsonl: cannot be written: No space left on device$"):
        ledger.append(EVENTS[1])
    assert ledger.events == read_ledger(path) == EVENTS[:1]
    ledger.append(EVENTS[1])
    assert ledger.events == read_ledger(path) == EVENTS[:2]


def test_a_cut_that_the_disk_refuses_is_made_up_for(path, monkeypatch):
    ledger = Ledger(path)
    with monkeypatch.context() as broken:
        write = os.write
        broken.setattr(os, "write", lambda handle, line: write(handle, line[:7]))
        broken.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(StorageError):
            ledger.append(EVENTS[0])
    ledger.append(EVENTS[1])
    assert read_ledger(path) == [EVENTS[1]]


def test_it_is_on_the_disk_before_anybody_is_answered(path, monkeypatch):
    ledger, calls = Ledger(path), []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda *a: (calls.append("write"), write(*a))[1])
    monkeypatch.setattr(os, "fsync", lambda *a: (calls.append("fsync"), fsync(*a))[1])
    ledger.append(EVENTS[0])
    assert calls == ["write", "fsync"]


OPEN = "import sys; from pathlib import Path; from metadist.search.ledger import Ledger; Ledger(Path(sys.argv[1])); "


def test_one_driver_at_a_time_and_a_dead_one_is_none(path):
    ledger = Ledger(path)
    with pytest.raises(RunError, match=r": another process searches in it; wait for it, or end it$"):
        Ledger(path)
    assert read_ledger(path) == []  # whoever looks at it need not wait
    ledger.close()
    code = OPEN.replace("; Ledger(", "; kept = Ledger(") + "print('open', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"open\n"
    with pytest.raises(RunError, match="another process"):
        Ledger(path)
    other.kill()
    other.wait()
    Ledger(path).close()


def test_a_folder_without_one(tmp_path):
    with pytest.raises(RunError, match=r": is no search folder, it has no ledger.jsonl$"):
        read_ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(StorageError, match=r"cannot be written: No such file or directory$"):
        Ledger(tmp_path / "none" / "ledger.jsonl")
