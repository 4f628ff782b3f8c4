"""Settings of a process that decide bits: threads, deterministic kernels, no autotuning."""

import os
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
    torch.set_num_threads(engine.threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device: cuda, but this process sees no GPU; valid is cpu, or reserve cluster.gpus")
    return torch.device(engine.device)


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
