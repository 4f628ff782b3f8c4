"""A meta-test of a finished run under other conditions than its own."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from metadist.config import Config, apply_overrides, flatten, load, resolve, validate
from metadist.durable import storage_errors, write
from metadist.engine.engine import Blueprint
from metadist.engine.fingerprint import data_fingerprint
from metadist.errors import ConfigError, RunError
from metadist.evaluation.protocol import meta_test, settings
from metadist.run import checked_tables, start

OVERRIDABLE = ("eval", "cluster", "engine", "data", "task.transductive")


def evaluate(run_dir: Path, overrides: Sequence[str], *, best: bool, split: str) -> tuple[dict[str, Any], Path]:
    """The scores of the trained and of the untrained state, and the JSON file they were written to."""
    if split not in ("test", "val"):
        raise ConfigError(f"--split: {split!r} is no split to judge on; valid: test, val")
    config = judged_config(run_dir, overrides)
    theta = run_dir / ("best.safetensors" if best else "theta.safetensors")
    if not theta.is_file():
        raise RunError(f"{run_dir}: holds no {theta.name}; finish the run with `metadist train --resume {run_dir}`")
    tables = checked_tables(config, print)
    blueprint = Blueprint(config, tuple(tables[0].images.shape[1:]))  # type: ignore[arg-type]
    try:
        values = load_file(theta)
    except SafetensorError as error:
        raise RunError(
            f"{theta}: is damaged ({error}); remove {run_dir / 'result.json'}, and a resume writes it again"
        ) from error
    trained = blueprint.values.flatten({name: values[name] for name in blueprint.values.names}).numpy()
    runtime = start(config, tables, None, print)
    try:
        first, *others = settings(config)
        found = {
            "run": run_dir.name,
            "overrides": list(overrides),
            "data_fingerprint": data_fingerprint(tables),
            "state": theta.name,
            "split": split,
            "test": meta_test(runtime, first, trained, split),
            "also": [meta_test(runtime, setting, trained, split) for setting in others],
        }
        untrained = meta_test(runtime, first, blueprint.initial(), split)
        found["untrained"] = {"accuracy": untrained["accuracy"], "ci95": untrained["ci95"]}
        found["numeric_fingerprint"] = runtime.fingerprint
    finally:
        runtime.close()
    folder = run_dir / "evaluations"
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    path = folder / f"{split}-{datetime.now():%Y%m%d-%H%M%S-%f}.json"
    write(path, json.dumps(found, indent=2).encode())
    return found, path


def judged_config(run_dir: Path, overrides: Sequence[str]) -> Config:
    """The run's config with the evaluation's overrides; what would need another training is refused."""
    if not (run_dir / "config.yaml").is_file():
        raise RunError(f"{run_dir}: is no run folder, it has no config.yaml")
    before = load(run_dir / "config.yaml")
    raw = before.model_dump()
    raw["eval"].update(test=True, also=[])
    config = resolve(validate(apply_overrides(raw, overrides), "override"))
    old, new = flatten(before), flatten(config)
    for key in dict.fromkeys([*old, *new]):
        free = any(key == allowed or key.startswith(allowed + ".") for allowed in OVERRIDABLE)
        if old.get(key) != new.get(key) and not free:
            raise ConfigError(f"{key}: belongs to the training; an evaluation may change {', '.join(OVERRIDABLE)}")
    return config
