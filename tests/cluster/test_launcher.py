"""The files for `ray up` are what Ray's own schema accepts, before and behind its defaults are filled in."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cluster" / "launcher").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    import ray.autoscaler

    loaded: dict[str, Any] = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return loaded


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_accepts_the_file(path: Path, schema: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    told = yaml.safe_load(path.read_text())
    jsonschema.validate(told, schema)
    validate_config(prepare_config(copy.deepcopy(told)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_unknown_key_is_refused(path: Path, schema: dict[str, Any]) -> None:
    told = {**yaml.safe_load(path.read_text()), "worker_count": 2}
    with pytest.raises(jsonschema.ValidationError, match="worker_count"):
        jsonschema.validate(told, schema)


def test_there_is_one_for_each_place() -> None:
    assert [path.stem for path in FILES] == ["aws", "gcp", "on-premise"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_host_asks_for_the_token(path: Path) -> None:
    told = yaml.safe_load(path.read_text())
    assert "/home/metadist/.ray/auth_token" in told["file_mounts"]
    starts = [line for key in ("head", "worker") for line in told[f"{key}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0], "reached by a tunnel only"


@pytest.mark.parametrize(("name", "spot"), [("aws", "InstanceMarketOptions"), ("gcp", "scheduling")])
def test_workers_are_on_spot_and_the_head_is_not(name: str, spot: str) -> None:
    kinds = yaml.safe_load((ROOT / "cluster" / "launcher" / f"{name}.yaml").read_text())["available_node_types"]
    assert {kind: spot in told["node_config"] for kind, told in kinds.items()} == {
        "head": False,
        "cpu-spot": True,
        "gpu-spot": True,
    }
