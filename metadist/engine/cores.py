"""The same work on many blocks, on all cores that this process may use.

Numpy and torch let go of Python while they compute, so threads are enough. Who takes which block is left to chance:
the work on one must not depend on another.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Done = TypeVar("Done")

MOST = 4
"""Threads: what is done here waits for memory before there are more."""

LEAST = 2
"""Blocks of each: for less it is not worth waking one."""


def on_cores(work: Callable[[Item], Done], items: Iterable[Item]) -> list[Done]:
    """What the work returns of every item, in their order. To be called with one thread of torch's (`one_thread`)."""
    todo = deque(enumerate(items))
    others = min(_cores(), len(todo) // LEAST) - 1
    if others < 1:
        return [work(item) for _, item in todo]
    done: dict[int, Done] = {}

    def take() -> None:
        while True:
            try:
                number, item = todo.popleft()
            except IndexError:
                return
            done[number] = work(item)

    coming = [_threads().submit(_alone, take) for _ in range(others)]
    try:
        take()
    finally:
        todo.clear()  # after an error nobody begins another
        coming = [one for one in coming if not one.cancel()]  # nor waits for who has not begun yet
        if coming:
            wait(coming)
    for one in coming:
        one.result()  # or its error
    return [done[number] for number in range(len(done))]


def _alone(take: Callable[[], None]) -> None:
    """With one thread of torch's, whatever others have set meanwhile."""
    if torch.get_num_threads() != 1:  # the first time, this also is what makes the next line hold
        torch.set_num_threads(1)
    take()


@cache
def _cores() -> int:
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(there, MOST)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, _cores() - 1), "blocks")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads
