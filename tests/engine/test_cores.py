"""Blocks on several threads."""

import contextlib
import os
import threading
import time

import pytest
import torch

from metadist.engine import cores
from metadist.engine.cores import on_cores
from metadist.engine.device import one_thread


@pytest.fixture(params=[1, 2, 4])
def threads(request, monkeypatch):
    """So many, whatever this machine has."""
    cores._threads.cache_clear()
    monkeypatch.setattr(cores, "_cores", lambda: request.param)
    yield request.param
    cores._threads.cache_clear()


def test_each_once_and_in_order(threads):
    seen, names = [], set()

    def work(item):
        time.sleep(0.001)
        seen.append(item)
        names.add(threading.current_thread().name)
        return -item

    assert on_cores(work, range(40)) == [-item for item in range(40)]
    assert sorted(seen) == list(range(40))
    assert len(names) == threads
    assert on_cores(work, []) == []


def test_an_error_comes_through_when_nothing_runs_any_more(threads):
    running = []

    def work(item):
        running.append(item)
        time.sleep(0.002)
        running.remove(item)
        if item in (3, 5):
            raise ValueError(f"block {item}")

    with pytest.raises(ValueError, match="block"):
        on_cores(work, range(9))
    assert running == []
    assert on_cores(lambda item: item, range(3)) == [0, 1, 2]


@pytest.mark.parametrize("born", [one_thread, contextlib.nullcontext])
def test_a_thread_has_one_of_torchs_whatever_others_set(born, threads):
    """torch gives a thread its number when it first computes there: that of the whole process by then."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with born():
            on_cores(lambda _: time.sleep(0.001), range(20))  # nothing of torch's yet

        def asked(_):
            time.sleep(0.001)
            return threading.current_thread().name, torch.get_num_threads()

        found = dict(on_cores(asked, range(40)))
        assert found.pop(threading.current_thread().name) == 4
        assert list(found.values()) == [1] * (threads - 1)
    finally:
        torch.set_num_threads(before)


def test_nobody_waits_for_a_thread_that_has_not_begun(monkeypatch):
    monkeypatch.setattr(cores, "_cores", lambda: 2)
    cores._threads.cache_clear()
    busy, go = threading.Event(), threading.Event()
    kept = [cores._threads().submit(lambda: (busy.set(), go.wait(20))) for _ in range(cores._threads()._max_workers)]
    assert busy.wait(20)
    try:
        assert on_cores(lambda item: item, range(8)) == list(range(8))
        assert not any(one.done() for one in kept)
    finally:
        go.set()
        for one in kept:
            one.result()
        cores._threads.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_fork_has_threads_of_its_own():
    on_cores(lambda item: item, range(8))
    child = os.fork()
    if child == 0:
        os._exit(0 if on_cores(lambda item: item, range(8)) == list(range(8)) else 1)
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended[0]:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)
