"""A meta-test of a finished run under other conditions than its own."""

import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from metadist.config import Config, apply_overrides, flatten, load, parse_override, resolve, validate
from metadist.data.table import Table
from metadist.durable import storage_errors, write
from metadist.engine.engine import blueprint as blueprint_of
from metadist.engine.fingerprint import data_fingerprint
from metadist.errors import ConfigError, RunError
from metadist.evaluation.protocol import meta_test, settings
from metadist.evaluation.sweep import RATE, read_grid, swept
from metadist.measure import MEASURES
from metadist.methods import InnerLoop
from metadist.run import checked_tables, start

OVERRIDABLE = ("eval", "cluster", "engine", "data", "task.transductive")

STATES = {False: "theta.safetensors", True: "best.safetensors"}
"""The last state of a run, and the best one on validation."""

SWEEP_EPISODES = 200
"""Tasks of a sweep that says nothing; a quarter of a meta-test's time for each cell is more than it is worth."""


def evaluate(run_dir: Path, overrides: Sequence[str], *, best: bool, split: str) -> tuple[dict[str, Any], Path]:
    """The scores of the trained and of the untrained state, and the JSON file they were written to."""
    state = STATES[best]
    config, tables, values = trained(run_dir, split, overrides, state)
    blueprint = blueprint_of(config, tables)
    flat = blueprint.values.flatten(values).numpy()
    runtime = start(config, tables, None, print)
    try:
        first, *others = settings(config)
        found = {
            "run": run_dir.name,
            "overrides": list(overrides),
            "data_fingerprint": data_fingerprint(tables),
            "state": state,
            "split": split,
            "test": meta_test(runtime, first, flat, split),
            "also": [meta_test(runtime, setting, flat, split) for setting in others],
        }
        untrained = meta_test(runtime, first, blueprint.initial(), split)
        found["untrained"] = {key: untrained[key] for key in (MEASURES[config.kind].name, "ci95")}
        found["numeric_fingerprint"] = runtime.fingerprint
    finally:
        runtime.close()
    return found, _written(run_dir / "evaluations", split, found)


def sweep(
    run_dir: Path, overrides: Sequence[str], words: Sequence[str], *, best: bool, split: str
) -> tuple[dict[str, Any], Path]:
    """The scores of the trained state under a grid of inner rates and steps, and the JSON file they were written to.

    words: as `--sweep` has them. Raises ConfigError.
    """
    given = dict(map(parse_override, overrides))
    if "eval.also" in given:
        raise ConfigError("eval.also: is not read with --sweep, whose cells are one evaluation each; leave it out")
    asked = [*overrides] if "eval.episodes" in given else [*overrides, f"eval.episodes={SWEEP_EPISODES}"]
    grid = read_grid(words, judged_config(run_dir, asked, best), given)
    config, tables, values = trained(run_dir, split, asked, STATES[best])
    flat = blueprint_of(config, tables).values.flatten(values).numpy()
    runtime = start(config, tables, None, print)
    try:
        began = time.perf_counter()
        cells = swept(runtime, grid._replace(judged=config), trained_config(run_dir, best), flat, split)
        found = {
            "run": run_dir.name,
            "overrides": list(overrides),
            "sweep": list(words),
            "data_fingerprint": data_fingerprint(tables),
            "state": STATES[best],
            "split": split,
            **cells,
            "seconds": time.perf_counter() - began,
            "numeric_fingerprint": runtime.fingerprint,
        }
    finally:
        runtime.close()
    return found, _written(run_dir / "sweeps", split, found)


def _written(folder: Path, split: str, found: dict[str, Any]) -> Path:
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    path = folder / f"{split}-{datetime.now():%Y%m%d-%H%M%S-%f}.json"
    write(path, json.dumps(found, indent=2).encode())
    return path


def trained_config(run_dir: Path, best: bool) -> Config:
    """A run's config as it was in the last step of its last, or its best, state."""
    config = load(run_dir / "config.yaml")
    done = _done(run_dir) if best else None
    return config.at((done or config.outer.steps) - 1)


def _done(run_dir: Path) -> int | None:
    """Meta-steps of the best state on validation."""
    result = run_dir / "result.json"
    best = json.loads(result.read_text())["best"] if result.is_file() else None
    return None if best is None else int(best["step"])


def trained(
    run_dir: Path, split: str, overrides: Sequence[str] = (), state: str = "theta.safetensors"
) -> tuple[Config, list[Table], dict[str, Tensor]]:
    """A finished run's config with overrides, its data, and its trained values by name."""
    if split not in ("test", "val"):
        raise ConfigError(f"--split: {split!r} is no split to judge on; valid: test, val")
    config = judged_config(run_dir, overrides, state == STATES[True])
    theta = run_dir / state
    if not theta.is_file():
        raise RunError(f"{run_dir}: holds no {theta.name}; finish the run with `metadist train --resume {run_dir}`")
    tables = checked_tables(config, print)
    try:
        return config, tables, load_file(theta)
    except SafetensorError as error:
        raise RunError(
            f"{theta}: is damaged ({error}); remove {run_dir / 'result.json'}, and a resume writes it again"
        ) from error


def judged_config(run_dir: Path, overrides: Sequence[str], best: bool = False) -> Config:
    """The run's config with the evaluation's overrides; what would need another training is refused.

    Of a run with stages the keys of the last step of the state that is judged.
    """
    if not (run_dir / "config.yaml").is_file():
        raise RunError(f"{run_dir}: is no run folder, it has no config.yaml")
    before = trained_config(run_dir, best)
    raw = before.model_dump()
    raw["eval"].update(test=True, also=[])
    config = resolve(validate(apply_overrides(raw, overrides), "override"))
    old, new = flatten(before), flatten(config)
    adapts = isinstance(config.algorithm, InnerLoop) and config.algorithm.adapts_at_inner_lr
    for key in dict.fromkeys([*old, *new]):
        free = any(key == allowed or key.startswith(allowed + ".") for allowed in OVERRIDABLE)
        free = free or (key == RATE and adapts)
        if old.get(key) != new.get(key) and not free:
            raise ConfigError(f"{key}: belongs to the training; an evaluation may change {', '.join(OVERRIDABLE)}")
    return config
