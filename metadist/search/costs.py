"""What a trial costs: arithmetic of an adaptation, and memory."""

import ctypes
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from metadist import algorithms
from metadist.config import Config
from metadist.data.table import Table
from metadist.engine.engine import blueprint
from metadist.tasks.episode import Examples
from metadist.tasks.samplers import evaluation_tasks, training_tasks


def adaptation_mflop(config: Config, tables: Sequence[Table]) -> float:
    """Million floating point operations of one `adapt` as the validation does it, from a support set to a predictor.

    Matrix products and convolutions count, forwards and backwards. The same on any machine.
    """
    sampler = evaluation_tasks(config, tables, "val", "cpu")
    config = config.at(config.outer.steps - 1)
    algorithm = algorithms.for_evaluation(config, sampler.shape, training_tasks(config, tables, "cpu").classes)
    plan = blueprint(config, tables)
    theta, state = plan.named(plan.initial())
    support = sampler.sample(config.eval.draw, 0, 1).support
    with FlopCounterMode(display=False) as counter:
        algorithm.adapt(theta, state, Examples(support.x[0], support.y[0]), sampler.ways)
    return float(counter.get_total_flops()) / 1e6


STATUS = Path("/proc/self/status")


def forget_peak() -> None:
    """Let the peaks begin where memory is now. A process that is used again gives back what it has kept first."""
    gc.collect()
    if _on_a_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        except OSError:  # a sandbox that has no such file: the peak is then that of the whole process
            return


def peak_memory() -> dict[str, float]:
    """MiB since `forget_peak`: `peak_memory` of this process, on a GPU `peak_gpu_memory` too. Empty where unknown."""
    found: dict[str, float] = {}
    if STATUS.is_file():
        line = next((line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")), "")
        if line:
            found["peak_memory"] = int(line.split()[1]) / 1024
    if _on_a_gpu():
        found["peak_gpu_memory"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def _on_a_gpu() -> bool:
    """Whether this process has used one; to ask for its memory would start one otherwise."""
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
