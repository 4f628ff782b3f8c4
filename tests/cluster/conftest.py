"""What KubeRay and Ray accept."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError, validators

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def once_each(validator: Any, keys: list[str], items: Any, schema: Any) -> Iterator[ValidationError]:
    """A Kubernetes list that is a map: no two entries with the same keys."""
    names = [tuple(item.get(key) for key in keys) for item in items]
    for name in {name for name in names if names.count(name) > 1}:
        yield ValidationError(f"{name} stands there more than once")


KubernetesValidator = validators.extend(Draft202012Validator, {"x-kubernetes-list-map-keys": once_each})


@pytest.fixture(scope="session")
def kuberay() -> Callable[[dict[str, Any]], list[str]]:
    """What KubeRay's resource definitions, unknown fields refused, have against a manifest."""
    definitions = json.loads((HERE / "kuberay.json").read_text())

    def problems(manifest: dict[str, Any]) -> list[str]:
        schema = {**definitions[manifest["kind"]], "$defs": definitions["$defs"]}
        found = KubernetesValidator(schema).iter_errors(manifest)
        return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in found]

    return problems
