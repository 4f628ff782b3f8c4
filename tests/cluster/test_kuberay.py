"""KubeRay's own definitions accept the manifests, and these agree with each other and with the image."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))

Problems = Callable[[dict[str, Any]], list[str]]


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return spec.get("rayClusterSpec", spec)


def read(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "kuberay" / f"{name}.yaml").read_text())
    return read


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_kuberay_accepts_the_manifest(path: Path, kuberay: Problems) -> None:
    assert kuberay(yaml.safe_load(path.read_text())) == []


def replica_count(spec: dict[str, Any]) -> None:
    spec["workerGroupSpecs"][0]["replica"] = 2


def head_memory(spec: dict[str, Any]) -> None:
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["memory"] = "8Gi"


def other_mode(spec: dict[str, Any]) -> None:
    spec["authOptions"]["mode"] = "password"


def number_for_text(spec: dict[str, Any]) -> None:
    spec["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def two_mounts_in_one_place(spec: dict[str, Any]) -> None:
    mounts = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    mounts.append({"name": "ray", "mountPath": mounts[0]["mountPath"]})


def metadata_of_a_pod(spec: dict[str, Any]) -> None:
    spec["headGroupSpec"]["template"]["metadata"] = {"label": {"app": "x"}}


@pytest.mark.parametrize(
    "spoil", [replica_count, head_memory, other_mode, number_for_text, two_mounts_in_one_place, metadata_of_a_pod]
)
@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_what_kuberay_does_not_know_is_refused(name: str, spoil: Callable[..., None], kuberay: Problems) -> None:
    manifest = copy.deepcopy(read(name))
    spoil(cluster_of(manifest))
    assert len(kuberay(manifest)) == 1


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_both_have_what_a_shared_cluster_needs(path: Path) -> None:
    spec = cluster_of(yaml.safe_load(path.read_text()))
    assert spec["authOptions"]["mode"] == "token"
    assert spec["networkPolicy"]["mode"] == "DenyAllIngress"
    assert spec["enableInTreeAutoscaling"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu"}
    assert "nvidia.com/gpu" in groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    for group in (spec["headGroupSpec"], *groups.values()):
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]
    for group in groups.values():
        pod = group["template"]["spec"]
        assert any("spot" in toleration["key"] for toleration in pod["tolerations"])
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert "tolerations" not in spec["headGroupSpec"]["template"]["spec"], "the head is on no spot node"


def test_a_run_of_its_own_has_the_workers_of_the_standing_cluster() -> None:
    standing, own = cluster_of(read("raycluster")), cluster_of(read("rayjob"))
    assert own["workerGroupSpecs"] == standing["workerGroupSpecs"]
    assert own["headGroupSpec"] == standing["headGroupSpec"]


def test_the_head_of_the_standing_cluster_may_die() -> None:
    fault_tolerance = cluster_of(read("raycluster"))["gcsFaultToleranceOptions"]
    assert fault_tolerance["backend"] == "rocksdb"
    assert "redisAddress" not in fault_tolerance


def test_a_run_that_is_stopped_has_the_time_that_submit_gives_it() -> None:
    from metadist.config import Checkpoint
    from metadist.submit.submission import LAST_COPY

    seconds = Checkpoint().grace + LAST_COPY
    environment = yaml.safe_load(read("rayjob")["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment == {"RAY_JOB_STOP_WAIT_TIME_S": f"{seconds:g}"}
    for name in ("raycluster", "rayjob"):
        assert cluster_of(read(name))["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"] > seconds


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_ray_is_that_of_the_image(path: Path) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "infra" / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster_of(yaml.safe_load(path.read_text()))["rayVersion"] == pinned[1]


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_the_quick_health_checks_on_offer_are_the_labs(path: Path) -> None:
    code = "import json, hosts; print(json.dumps(hosts.QUICK))"
    lab = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "cluster" / "lab", capture_output=True, check=True)
    offered = re.findall(r'(RAY_health_check_\w+)(?:=|, value: ")(\d+)', path.read_text())
    assert dict(offered) == yaml.safe_load(lab.stdout)
