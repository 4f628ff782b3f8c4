"""What a job asks of a cluster, as pods."""

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from metadist.errors import ConfigError
from metadist.submit.submission import Submission, submission

LONGEST = 47
"""Characters of a name that KubeRay takes; it makes longer ones of it."""


class Demand(NamedTuple):
    """name: of the Kubernetes objects. least, most: workers. cpus, gpus, resources: what each reserves."""

    name: str
    job: Submission
    least: int
    most: int
    cpus: float
    gpus: float
    resources: dict[str, float]

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


def demand(words: Sequence[str], id: str | None = None) -> Demand:
    """Of the training or search that `metadist submit` would send with these words. Raises ConfigError, DataError."""
    job = submission(words, id=id)
    if job.job is None:
        raise ConfigError(f"{job.verb}: needs what a run has left; submit it to a cluster that stands")
    cluster = job.config.cluster
    if not cluster.most:
        why = "keeps trials on the driver's host" if job.verb == "search" else "computes in the driver's process"
        raise ConfigError(f"cluster.workers: 0 {why}, and pods would stand idle; valid is 1 or more")
    assert not isinstance(cluster.cpus, str)  # resolved
    assert not isinstance(cluster.gpus, str)
    told: dict[str, Any] = yaml.safe_load(job.job)
    at_once = told["search"]["concurrent"] if job.verb == "search" else 1
    (name,) = (word for word in words if "=" not in word and word != job.verb)
    return Demand(
        object_name(id) if id else object_name(Path(name).stem, job.identity),
        job,
        cluster.least * at_once,
        cluster.most * at_once,
        cluster.cpus,
        cluster.gpus,
        cluster.resources,
    )


def object_name(job: str, identity: str = "") -> str:
    """A job's name as Kubernetes allows it: lower case, digits and dashes; maml++ is mamlpp.

    Behind it, as of another job it is another name: of its identity the first eight digits; without one, where the name
    could not be kept as it is, of a hash of it.
    """
    words = re.sub(r"[^a-z0-9]+", "-", job.lower().replace("+", "p")).strip("-")
    if not identity and f"metadist-{words}"[:LONGEST] != f"metadist-{job}":
        identity = hashlib.sha256(job.encode()).hexdigest()
    mark = f"-{identity[:8]}" if identity else ""
    return f"metadist-{words}"[: LONGEST - len(mark)].rstrip("-") + mark
