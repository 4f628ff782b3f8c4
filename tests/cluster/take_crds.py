"""`python -m tests.cluster.take_crds FOLDER`: what `kuberay.json` holds, from KubeRay's own resource definitions.

FOLDER has `ray.io_rayclusters.yaml` and `ray.io_rayjobs.yaml` (Apache-2.0) of a release's
`ray-operator/config/crd/bases`. Descriptions go; parts that stand there several times, such as a pod's template,
stand here once. An API server drops or refuses what a schema does not name: here it is refused.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

VERSION = "v1"
KEPT = (
    "type",
    "enum",
    "pattern",
    "maxLength",
    "minimum",
    "maximum",
    "required",
    "anyOf",
    "oneOf",
    "x-kubernetes-list-map-keys",
)
SMALL = 200
"""Characters below which a part is written out where it is."""

WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
METADATA = {
    "type": "object",
    "properties": {"name": NAME, "labels": WORDS, "annotations": WORDS},
    "required": ["name"],
    "additionalProperties": False,
}
"""Of the object itself: an API server knows it without a definition. KubeRay takes names of so many characters."""


def strict(node: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """A part of an OpenAPI schema as JSON Schema, unknown fields refused; repeated parts go into `shared`."""
    told = {key: node[key] for key in KEPT if key in node}
    if node.get("x-kubernetes-int-or-string"):
        told.pop("anyOf", None)
        told["type"] = ["integer", "string"]
    if "properties" in node:
        told["properties"] = {name: strict(part, shared) for name, part in node["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            told["additionalProperties"] = False
    elif isinstance(node.get("additionalProperties"), dict):
        told["additionalProperties"] = strict(node["additionalProperties"], shared)
    elif node.get("type") == "object" and not node.get("x-kubernetes-preserve-unknown-fields"):
        told["additionalProperties"] = False
    if "items" in node:
        told["items"] = strict(node["items"], shared)
    text = json.dumps(told, sort_keys=True)
    if len(text) < SMALL:
        return told
    name = hashlib.sha256(text.encode()).hexdigest()[:8]
    shared[name] = told
    return {"$ref": f"#/$defs/{name}"}


def taken(folder: Path) -> dict[str, Any]:
    """Kind → schema, and the parts that they share."""
    shared: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for path in sorted(folder.glob("ray.io_*.yaml")):
        definition = yaml.safe_load(path.read_text())["spec"]
        (schema,) = (v["schema"]["openAPIV3Schema"] for v in definition["versions"] if v["name"] == VERSION)
        schema["properties"].pop("status", None)  # written by the operator
        schema["properties"]["metadata"] = METADATA
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
        schema["properties"]["apiVersion"]["enum"] = [f"{definition['group']}/{VERSION}"]
        schema["properties"]["kind"]["enum"] = [definition["names"]["kind"]]
        kinds[definition["names"]["kind"]] = strict(schema, shared)
    return {**kinds, "$defs": shared}


if __name__ == "__main__":
    print(json.dumps(taken(Path(sys.argv[1])), separators=(",", ":"), sort_keys=True))
