"""A driver that is really killed, again and again, decides what an undisturbed one does."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from simulated_search import job, search

from metadist.search.ledger import Ledger, read_ledger

DRIVER = """
import sys, time
from pathlib import Path
from simulated_search import job, search
from metadist.search.ledger import Ledger

def slow(running):
    time.sleep(0.02)
    return min(running)

print("begins", flush=True)
search(job(concurrent=1, trials=10), Ledger(Path(sys.argv[1])), slow)
"""


KILLS = 6
"""Each costs a process's start; a busy machine takes seconds for one, in which it may decide nothing."""


@pytest.mark.chaos
def test_a_killed_driver(tmp_path, monkeypatch):
    whole = Ledger(tmp_path / "whole.jsonl")
    search(job(concurrent=1, trials=10), whole)
    path, chance, kills = tmp_path / "ledger.jsonl", random.Random(0), 0
    folders = [str(Path(__file__).parent), *sys.path]
    monkeypatch.setenv("PYTHONPATH", ":".join(folders))
    while True:
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(path)], stdout=subprocess.PIPE)
        assert driver.stdout.readline() == b"begins\n"
        if kills < KILLS:  # then one of them may come to the end
            time.sleep(0.05 + 0.5 * chance.random())
            driver.kill()
        if driver.wait() == 0:
            break
        kills += 1
        assert read_ledger(path) == whole.events[: len(read_ledger(path))]
    assert kills >= 2 and path.read_bytes() == whole.path.read_bytes()
