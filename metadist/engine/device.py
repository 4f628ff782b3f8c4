"""Settings of a process that decide bits: threads, deterministic kernels, no autotuning."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from metadist.config import Engine
from metadist.errors import ConfigError


def settle(engine: Engine) -> torch.device:
    """Make this process compute the way the config says; returns the device.

    Raises ConfigError where the device is not there.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    _keep_memory()
    torch.set_num_threads(engine.threads)
    # What `use_deterministic_algorithms` does, without torch's compiler, whose import takes one to two seconds.
    torch.set_deterministic_debug_mode("error")
    # It would also fill every fresh buffer with NaN, which costs a tenth of a shard's time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device: cuda, but this process sees no GPU; valid is cpu, or reserve cluster.gpus")
    return torch.device(engine.device)


@contextmanager
def precision(engine: Engine) -> Iterator[None]:
    """Matrix products inside the block as the config says: of factors in TF32, or of bfloat16 altogether."""
    if engine.precision == "bf16":
        with torch.autocast(engine.device, torch.bfloat16, cache_enabled=False):
            yield
        return
    # Of the block and not of the process, in which engines of another precision may compute as well.
    torch.backends.cuda.matmul.allow_tf32 = engine.precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def keep_all_memory() -> None:
    """The same also for blocks beyond 32 MB, for a process that needs the same large ones step by step."""
    _keep_memory()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-4, 0)  # blocks that are mapped by themselves: none


def _keep_memory() -> None:
    """Let glibc keep freed memory.

    By default it hands every block of some size back to the kernel and gets it again, zeroed
    page by page, a moment later: a fifth to a third of a small shard's time.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    mallopt(mmap_threshold, 1 << 25)  # the largest that glibc takes
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(top_pad, 1 << 26)


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
