"""`python killed_driver.py JOB RUN:N,N,… RUN:N,N,…`: trains, and kills itself with SIGKILL right before its N-th act.

An act is a call by which the driver's protocol moves on or its files change. Each N is one process; a process that
finds a run folder goes on with it. One that comes to its end is the last of its run. Prints a line for each.
"""

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import metadist.run
from metadist import durable
from metadist.config import load
from metadist.runtime import checkpoint, journal, run_folder, train
from metadist.runtime.aggregator import Aggregator
from metadist.runtime.in_process import InProcess

FILES = [
    (durable.os, "fsync"),
    (durable.os, "rename"),
    (durable.os, "replace"),
    (shutil, "rmtree"),
    (checkpoint, "write_folder"),
    (journal, "write_metrics"),
    (train, "prune"),
    (run_folder.RunFolder, "create"),
    (run_folder.RunFolder, "write_values"),
    (run_folder.RunFolder, "write_result"),
]
ALONE = [
    (InProcess, "begin"),
    (InProcess, "apply"),
    (InProcess, "judge"),
    (InProcess, "snapshot"),
    (Aggregator, "add"),
]


def on_ray() -> list[tuple[Any, str]]:
    """What the driver does where workers and aggregator are other processes."""
    from metadist.runtime.on_ray import OnRay

    return [(OnRay, name) for name in ("begin", "finish", "_take", "apply", "judge", "snapshot", "close")]


def kill_before(number: int, acts: list[tuple[Any, str]]) -> None:
    """Make the N-th of these calls the process's end."""
    count = [0]

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                print(f"killed before {name}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call

    for where, name in acts:
        setattr(where, name, counted(name, getattr(where, name)))


def one_process(job: Path, run: Path, number: int, ray: bool) -> None:
    """Begin or go on, in a process of its own; does not return there."""
    kill_before(number, FILES + (on_ray() if ray else ALONE))
    if (run / "config.yaml").exists():
        finished = metadist.run.resume(run, [])
    else:
        shutil.rmtree(run, ignore_errors=True)
        finished = metadist.run.train(load(job), "killed", run)
    print("ended", finished.result["theta_sha256"], flush=True)


def main() -> None:
    """Fork once for each number, so that torch is imported once."""
    job, *runs = sys.argv[1:]
    torch.set_num_threads(1)
    ray = load(Path(job)).cluster.most > 0
    for word in runs:
        run, _, numbers = word.rpartition(":")
        for number in map(int, numbers.split(",")):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    one_process(Path(job), Path(run), number, ray)
                    code = 0
                except BaseException:  # noqa: BLE001, this process has no other end
                    traceback.print_exc()
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                if os.WEXITSTATUS(status):
                    sys.exit(f"{run}: it failed before act {number}")
                break
        else:
            sys.exit(f"{run}: it was killed every time")


if __name__ == "__main__":
    main()
