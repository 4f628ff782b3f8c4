"""A shard that does not fit into memory: one line, and the shard that would fit does."""

import re
import resource
import subprocess
import sys
from typing import Any

import pytest
import torch

from metadist.config import Config, resolve, validate
from metadist.data.sources import prepare
from metadist.engine.engine import Engine
from metadist.engine.exact import first_exponents
from metadist.engine.fit import Need, largest, misfit, smallest
from metadist.errors import RunError

LIMITED = """
import resource, sys
import torch
from metadist.config import load, resolve
from metadist.data.sources import prepare
from metadist.engine.engine import Engine
from metadist.engine.fit import status
from metadist.errors import MetadistError

config = resolve(load("quickstart", sys.argv[1:]))
engine = Engine(config, [prepare(config.data.sources[0])])
theta, state = engine.blueprint.named(engine.blueprint.initial())
torch.func.grad(torch.sin)(torch.ones(()))  # imports torch's compiler: 200 MB of addresses that are no shard's
most = status("VmSize") + 475 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    engine.sums(theta, state, 0, 0)
    print("fits")
except MetadistError as error:
    print(error)
"""
"""A shard in a process whose memory is limited to 475 MB more than it has when it is idle.

A task was measured to take 38 to 51 MB, so that 8 fit and 16 do not, by whichever of these."""


def limited(shard: int) -> str:
    """By vmap: in closed form the tasks of a large shard are computed some at a time."""
    words = [
        "model.name=conv4", "task.meta_batch=64", f"task.shard={shard}", "cluster.workers=0", "engine.device=cpu",
        "task.transductive=false",
    ]  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-500:]
    return ended.stdout.strip()


def test_a_shard_that_does_not_fit_is_told_with_the_largest_that_does() -> None:
    line = limited(64)
    told = re.fullmatch(
        r"task\.shard: 64 tasks do not fit into memory; [\d,]+ MiB are free, and it takes \d+ MiB for 1 and "
        r"\d+ MiB for 2; the largest that fits and divides task\.meta_batch=64 is (\d+)",
        line,
    )
    assert told, line
    assert 1 < int(told[1]) < 64
    assert limited(int(told[1])) == "fits"


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
], ids=lambda error: str(error)[:30])  # fmt: skip
def test_a_program_and_a_judgement_that_do_not_fit_are_told_too(error: Exception, monkeypatch: Any) -> None:
    config = resolve(validate({"engine": {"mode": "graph", "device": "cpu"}, "task": {"shard": 2}}, "test"))
    one = Engine(config, [prepare(config.data.sources[0])])
    values, exponents = one.blueprint.initial(), first_exponents(one.blueprint.sums)

    def fails(*given: Any) -> None:
        raise error

    monkeypatch.setattr("metadist.engine.engine.too_large", lambda config, paths: RunError("the largest is 1"))
    with monkeypatch.context() as patch:
        patch.setattr(one, "_compute", fails)
        patch.setattr(one, "_judge", fails)
        with pytest.raises(RunError, match="the largest is 1"):
            one.part(values, exponents, 0, 0)
        with pytest.raises(RunError, match=r"^eval: 2 tasks at once, .* smaller task\.shard"):
            one.judge(values, config, "val", 0, 2)
    assert one.part(values, exponents, 0, 0).fits, "nothing of what failed is left"


@pytest.mark.parametrize(("free", "expected"), [(0, 0), (110, 1), (130, 2), (184, 4), (185, 6), (1e9, 12)])
def test_memory_grows_by_the_same_amount_with_every_task(free: float, expected: int) -> None:
    needs = [Need(1, 110, 0.0, 0), Need(2, 125, 0.0, 0)]
    assert largest(needs, 12, free) == expected


@pytest.mark.chaos
def test_where_processes_died_and_a_shard_fits_it_was_not_the_memory(tiny) -> None:  # type: ignore[no-untyped-def]
    config: Config = resolve(tiny("engine.device=cpu"))
    assert misfit(config, [str(prepare(config.data.sources[0]).path)], 1) is None
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_method_that_compares_tasks_needs_two() -> None:
    assert smallest(validate({}, "test")) == 1
    assert smallest(validate({"algorithm": {"name": "task-conditioned"}, "task": {"within_group": True}}, "test")) == 2
