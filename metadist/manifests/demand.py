"""What a job asks of a cluster, as pods."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from metadist.config import Config, find_job, load, read_yaml, resolve, to_yaml
from metadist.errors import ConfigError
from metadist.search import job as search_job

LONGEST = 47
"""Characters of a name that KubeRay takes; it makes longer ones of it."""


class Demand(NamedTuple):
    """name: of a Kubernetes object. verb: of metadist. job: the whole job file, every `auto` resolved.

    least, most: workers. cpus, gpus, resources: what each reserves. storage: where results outlive the cluster.
    """

    name: str
    verb: str
    job: str
    least: int
    most: int
    cpus: float
    gpus: float
    resources: dict[str, float]
    storage: str

    @property
    def each(self) -> int:
        """Workers of a pod: one, or as many as share a GPU, or without GPUs a core."""
        share = self.gpus or self.cpus
        return int(1 / share + 1e-9) if 0 < share < 1 else 1

    def pods(self, workers: int) -> int:
        """That hold so many workers."""
        return -(-workers // self.each)

    @property
    def pod_cpus(self) -> int:
        """Cores of a pod, whole ones; Ray itself wants one where workers reserve none."""
        return max(1, math.ceil(self.each * self.cpus - 1e-9))

    @property
    def pod_gpus(self) -> int:
        """GPUs of a pod."""
        return math.ceil(self.each * self.gpus - 1e-9)

    @property
    def pod_resources(self) -> dict[str, str]:
        """Custom resources of a pod, as the operator passes them to Ray."""
        return {name: f"{self.each * amount:g}" for name, amount in self.resources.items() if amount}


def demand(job: str, overrides: Sequence[str]) -> Demand:
    """Of a job file of `train` or `search`, run by a driver inside of the cluster. Raises ConfigError."""
    path, words = find_job(job), [*overrides, "cluster.address=auto"]
    if "search" in read_yaml(path):
        searched = search_job.load_search(job, words)
        return _demand("search", path, search_job.to_yaml(searched), searched.base, searched.search.concurrent)
    config = resolve(load(job, words))
    return _demand("train", path, to_yaml(config), config, 1)


def _demand(verb: str, path: Path, text: str, config: Config, at_once: int) -> Demand:
    cluster = config.cluster
    if not cluster.most:
        why = "keeps trials on the driver's host" if verb == "search" else "computes in the driver's process"
        raise ConfigError(f"{path}: cluster.workers: 0 {why}, and pods would stand idle; valid is 1 or more")
    assert not isinstance(cluster.cpus, str)  # resolved
    assert not isinstance(cluster.gpus, str)
    return Demand(
        object_name(path.stem),
        verb,
        text,
        cluster.least * at_once,
        cluster.most * at_once,
        cluster.cpus,
        cluster.gpus,
        cluster.resources,
        config.storage,
    )


def object_name(job: str) -> str:
    """A job's name as Kubernetes allows it: lower case, digits and dashes; maml++ is mamlpp."""
    words = re.sub(r"[^a-z0-9]+", "-", job.lower().replace("+", "p")).strip("-")
    return f"metadist-{words}"[:LONGEST].rstrip("-")
