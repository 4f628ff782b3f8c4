"""A manifest of `cluster/kuberay` filled from a job, so that image, resources and storage are said once."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from metadist.errors import ConfigError
from metadist.manifests.demand import Demand
from metadist.submit.package import JOB
from metadist.submit.submission import Submission, outlives_a_host

Node = dict[str, Any]

PLACE = "/etc/metadist"
"""The head's folder with the job file."""

RAYS_END = 5
"""Seconds of a head's pod for Ray itself, when its jobs have ended."""

ENTRY = "metadist.jobs.entry"
"""The entry point of `metadist submit`; the image has it."""


class _Plain(yaml.SafeDumper):
    """What is said twice is written twice: a manifest is read by people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, value: str) -> yaml.Node:
        """Lines stay lines."""
        return self.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Plain.add_representer(str, _Plain.text)


def templates() -> dict[str, Path]:
    """Kind, as a person writes it, → file."""
    package = Path(__file__).parents[1]
    for folder in (package / "cluster" / "kuberay", package.parent / "cluster" / "kuberay"):  # installed, or a checkout
        found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
        if found:
            return found
    return {}


def render(kind: str, wanted: Demand, image: str | None) -> str:
    """The manifest as YAML, for `kubectl apply -f`. Raises ConfigError."""
    found = templates()
    if kind not in found:
        raise ConfigError(f"--kind: {kind!r} is no manifest; valid: {', '.join(found)}")
    manifest = yaml.safe_load(found[kind].read_text(encoding="utf-8"))
    manifest["metadata"]["name"] = wanted.name
    documents = [manifest]
    if kind == "rayjob":
        cluster = manifest["spec"]["rayClusterSpec"]
        _store(cluster, wanted, lasting=True)
        manifest["spec"]["entrypoint"] = entry_point(wanted.job)
        manifest["spec"]["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": wanted.job.environment})
        documents.insert(0, _bring(cluster, wanted))
    else:
        cluster = manifest["spec"]
        _store(cluster, wanted, lasting=False)
    cluster["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"] = wanted.job.stop_seconds + RAYS_END
    cluster["workerGroupSpecs"] = [_sized(cluster, wanted)]
    if image is not None:
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            for container in group["template"]["spec"]["containers"]:
                container["image"] = image
    text = yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120)
    return f"# Made by `metadist cluster render`; cluster/kuberay/{kind}.yaml says what is left to decide.\n{text}"


def entry_point(job: Submission) -> str:
    """What the head runs, in a shell."""
    words = shlex.join(["python", "-m", ENTRY, *job.words, "--id", job.id])
    return f"cd {PLACE} && exec {words}"


def _sized(cluster: Node, wanted: Demand) -> Node:
    """The worker group that fits the job, with its number and size of pods."""
    name = "gpu" if wanted.gpus else "cpu"
    group: Node = next(group for group in cluster["workerGroupSpecs"] if group["groupName"] == name)
    least, most = wanted.pods(wanted.least), wanted.pods(wanted.most)
    group.update(replicas=least, minReplicas=least, maxReplicas=most)
    (container,) = group["template"]["spec"]["containers"]
    for amounts in container["resources"].values():
        amounts["cpu"] = str(wanted.pod_cpus)
        if wanted.gpus:
            amounts["nvidia.com/gpu"] = str(wanted.pod_gpus)
    if wanted.pod_resources:
        group["resources"] = wanted.pod_resources
    return group


def _store(cluster: Node, wanted: Demand, lasting: bool) -> None:
    """Mount the claim where the job's storage is a path, and leave it out where it is not."""
    storage = wanted.job.config.storage
    if lasting and not storage.startswith("/") and not outlives_a_host(storage):
        raise ConfigError(
            f"storage: {storage}: a RayJob's cluster is deleted with its disks when the run is over; valid is "
            f"s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, or an absolute path, where the volume is then mounted"
        )
    head = cluster["headGroupSpec"]["template"]["spec"]
    (container,) = head["containers"]
    mount = next(mount for mount in container["volumeMounts"] if mount["name"] == "storage")
    if storage.startswith("/"):
        mount["mountPath"] = storage
        return
    container["volumeMounts"].remove(mount)
    head["volumes"] = [volume for volume in head["volumes"] if volume["name"] != "storage"]


def _bring(cluster: Node, wanted: Demand) -> Node:
    """Mount the job file into the head, and return the object that holds it."""
    name = f"{wanted.name}-job"
    head = cluster["headGroupSpec"]["template"]["spec"]
    (container,) = head["containers"]
    container["volumeMounts"].append({"name": "job", "mountPath": PLACE, "readOnly": True})
    head["volumes"].append({"name": "job", "configMap": {"name": name}})
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {JOB: wanted.job.job}}
