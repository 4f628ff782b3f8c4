"""The numeric fingerprint: what has to be equal for the bits to be equal.

One thread and two threads, AVX2 and AVX-512, a loop and `vmap`, two versions of a matrix
library: each pair differs in the last digits. So all of it is written down, and a worker
must show the same before it takes part.
"""

import platform
from collections.abc import Mapping, Sequence

import numpy
import torch

from metadist.config import Config
from metadist.data.table import Table

ENGINE_VERSION = 7
"""Raised with every change of the engine that changes bits."""


def fingerprint(config: Config, tables: Sequence[Table]) -> dict[str, str]:
    """Name → value, all strings."""
    device = config.engine.device
    if device == "cuda":
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        instructions = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
    else:
        instructions = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device,
        "instructions": instructions,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "threads": str(config.engine.threads),
        "engine": f"{config.engine.mode} {_dtype(config)} version {ENGINE_VERSION}",
        "data": data_fingerprint(tables),
    }


def _dtype(config: Config) -> str:
    engine = config.engine
    return engine.dtype if engine.precision == "full" else f"{engine.dtype}, products {engine.precision}"


def data_fingerprint(tables: Sequence[Table]) -> str:
    """Content of all data sets, in the order of the config."""
    return "+".join(table.fingerprint[:16] for table in tables)


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """What differs, in words; empty if nothing does."""
    return ", ".join(
        f"{name} {found.get(name)} instead of {expected.get(name)}"
        for name in dict.fromkeys([*expected, *found])
        if expected.get(name) != found.get(name)
    )
