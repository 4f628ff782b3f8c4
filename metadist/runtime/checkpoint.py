"""Checkpoints: `checkpoints/step-N`, whole or not there, the newest good one wins.

A folder holds `state.safetensors` (θ and state as `value.NAME`, the optimizer's tensors as
`memory.KEY.NAME`, the exponents of the exact sum, what lane i carries as `lane.i.KEY.NAME`,
with async the ledger) and `checkpoint.json` with the step, the best validation so far and the
SHA-256 of the other file. Nothing in it can run code.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from metadist.durable import write_folder
from metadist.runtime.aggregator import Snapshot


class Best(NamedTuple):
    """The best validation so far, and the step of its state."""

    step: int
    score: float
    ci95: float


class Damaged(Exception):
    """A checkpoint that is not what was written; says why."""


def save_checkpoint(folder: Path, snapshot: Snapshot, best: Best | None, record: dict[str, Any]) -> Path:
    """Write `step-N` into `folder`; `record` joins the JSON (fingerprint, counts)."""
    tensors = {f"value.{name}": value for name, value in snapshot.values.items()}
    tensors |= {f"memory.{name}": value for name, value in snapshot.memory.items()}
    tensors |= {f"lane.{i}.{name}": value for i, lane in enumerate(snapshot.lanes) for name, value in lane.items()}
    tensors["exponents"] = snapshot.exponents
    if snapshot.ledger is not None:
        tensors["ledger"] = snapshot.ledger
    state = save({name: np.asarray(value, order="C") for name, value in tensors.items()})
    told = record | {
        "step": snapshot.step,
        "best": best._asdict() if best else None,
        "sha256": hashlib.sha256(state).hexdigest(),
    }
    told["self"] = _seal(told)
    path = folder / f"step-{snapshot.step}"
    write_folder(path, {"state.safetensors": state, "checkpoint.json": json.dumps(told, indent=1).encode()})
    return path


def load_checkpoint(path: Path) -> tuple[Snapshot, Best | None, dict[str, Any]]:
    """What `save_checkpoint` wrote. Raises Damaged."""
    try:
        told = json.loads((path / "checkpoint.json").read_bytes())
        state = (path / "state.safetensors").read_bytes()
        if told.pop("self", None) != _seal(told):
            raise Damaged("the checksum of checkpoint.json does not match")
        if hashlib.sha256(state).hexdigest() != told["sha256"]:
            raise Damaged("the checksum of state.safetensors does not match")
        tensors = load(state)
        exponents = tensors.pop("exponents")
        snapshot = Snapshot(
            told["step"],
            _below("value.", tensors),
            _below("memory.", tensors),
            exponents,
            _lanes(_below("lane.", tensors)),
            tensors.get("ledger"),
        )
        return snapshot, Best(**told["best"]) if told["best"] else None, told
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error


def _below(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _lanes(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], ...]:
    """By lane, from tensors named `i.KEY.NAME`."""
    last = max((int(name.partition(".")[0]) for name in tensors), default=-1)
    return tuple(_below(f"{lane}.", tensors) for lane in range(last + 1))


def checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """(step, path) of all checkpoints, newest first, damaged ones included."""
    found = []
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if path.is_dir() and number.isdigit():
            found.append((int(number), path))
    yield from sorted(found, reverse=True)


def newest_good(folder: Path, say: Callable[[str], None]) -> tuple[Snapshot, Best | None, dict[str, Any]] | None:
    """The newest checkpoint that is whole; a damaged one is told and passed over."""
    for _, path in checkpoints(folder):
        try:
            return load_checkpoint(path)
        except Damaged as reason:
            say(f"{path.name} is damaged ({reason}); falling back to the one before")
    return None


def prune(folder: Path, keep: int, best: Best | None, done: int) -> None:
    """Remove all but the best checkpoint and the newest `keep` up to `done`, the step just saved.

    Later ones are damaged, or the run would not have come by `done` again.
    """
    kept = 0
    for step, path in checkpoints(folder):
        if best is not None and step == best.step:
            continue
        if step <= done and kept < keep:
            kept += 1
        else:
            shutil.rmtree(path, ignore_errors=True)


def _seal(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
