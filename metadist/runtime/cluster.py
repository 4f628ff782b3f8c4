"""Getting a Ray cluster: our own on this machine, or one that is running.

Ray is imported by this module, by the strategies and by what they are made of, and nowhere else.
"""

import os
import secrets
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from metadist.config import Cluster
from metadist.errors import ClusterError

OBJECT_STORE_BYTES = 512 * 2**20
"""Of a local cluster at least: parameters and sums are small, the data lives in its own memory map."""

DIRECT_BYTES = 4 * 2**20
"""Up to which results and arguments travel inside the calls of a local cluster."""

_said_for_others: set[str] = set()


def connect(cluster: Cluster, summed: int = 0) -> tuple[Any, bool]:
    """Ray's module, connected, and whether this call connected it, so that its caller disconnects.

    summed: bytes of a worker's sum; the memory of a local cluster holds three of every worker, and some for θ.

    `local` starts a cluster of our own with as many logical CPUs and GPUs as the workers
    ask for. Raises ClusterError in one line where nothing answers within `cluster.timeout`.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Ray gives workers the lowest but four priorities; on a full machine everything else would go first.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # The calls that a death takes with it are computed again; Ray would print the traceback of each.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
    if cluster.address == "local":
        _close_the_door()
        # On one machine a message is quicker than the object store and its bookkeeping, for θ and sums of this size.
        os.environ.setdefault("RAY_max_direct_call_object_size", str(DIRECT_BYTES))
        import ray

        if ray.is_initialized():
            raise ClusterError("cluster.address: local, but this process is connected to a Ray cluster; valid is auto")
        ray.init(
            address="local",
            num_cpus=max(1, round(cluster.most * _number(cluster.cpus) + 0.499)),
            num_gpus=round(cluster.most * _number(cluster.gpus) + 0.499),
            include_dashboard=False,
            object_store_memory=max(OBJECT_STORE_BYTES, (3 * cluster.most + 2) * summed),
            **quiet,  # type: ignore[arg-type]
        )
        return ray, True
    say_whether_there_is_a_token()
    _expect_answer(cluster)
    import ray

    if ray.is_initialized():
        return ray, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray Client warns before it raises the same
            ray.init(address=cluster.address, namespace="metadist", runtime_env=_shipped(cluster), **quiet)  # type: ignore[arg-type]
    except (ConnectionError, RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise ClusterError(f"cluster.address: no Ray cluster answers at {cluster.address}: {line}") from error
    return ray, True


def _shipped(cluster: Cluster) -> dict[str, Any] | None:
    """This package as it is here, for hosts that have none or another version; a submitted job has brought it."""
    if not cluster.ship or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    import metadist

    return {"py_modules": [str(Path(metadist.__file__).parent)], "excludes": ["__pycache__"]}


def disconnect() -> None:
    """Leave the cluster; end it if it is ours."""
    import ray

    ray.shutdown()
    for name in _said_for_others:  # a cluster of our own, started later, is none of theirs
        os.environ.pop(name, None)
    _said_for_others.clear()


def check_resources(ray: Any, cluster: Cluster) -> None:
    """Refuse in one line what the cluster can never hold."""
    total = ray.cluster_resources()
    for kind, each in reserved(cluster).items():
        needed, there = cluster.least * each, total.get(kind, 0.0)
        if needed > there:
            raise ClusterError(
                f"cluster.workers: {cluster.least} workers with {each:g} {kind} each need {needed:g}, the cluster at "
                f"{cluster.address} has {there:g}; at most {int(there // each)} workers are valid"
            )


def room(ray: Any, cluster: Cluster) -> int:
    """How many of the workers fit into the cluster as it is now, were it empty."""
    total = ray.cluster_resources()
    each = [int(total.get(kind, 0.0) // one) for kind, one in reserved(cluster).items() if one]
    return min([cluster.most, *each])


def hosts(ray: Any) -> list[dict[str, float]]:
    """What each living host of the cluster has in all, by Ray's names; this process's first."""
    me = ray.get_runtime_context().get_node_id()
    return [node["Resources"] for node in sorted(living(ray), key=lambda node: node["NodeID"] != me)]


def on_one_machine(ray: Any, cluster: Cluster) -> bool:
    """Whether the cluster's only host is the driver's machine, and has room for all the workers that a run may have.

    A driver outside (`ray://`) is a member of no host; where it runs, its name says.
    """
    there = living(ray)
    here = len(there) == 1 and there[0]["NodeManagerHostname"] == socket.gethostname()
    return here and room(ray, cluster) == cluster.most


def workers_on_a_host(ray: Any, cluster: Cluster) -> float:
    """How many there will be, about: as many on each host that has room for any, or, packed, as one has room for."""
    rooms = [fit for node in living(ray) if (fit := places(node["Resources"], cluster))]
    share = cluster.most if cluster.placement == "pack" or not rooms else cluster.most / len(rooms)
    return min(share, max(rooms, default=cluster.most))


def living(ray: Any) -> list[dict[str, Any]]:
    """What Ray knows of each host that is there."""
    return [node for node in ray.nodes() if node["Alive"]]


def places(host: dict[str, float], cluster: Cluster) -> int:
    """How many workers fit on a host, were it empty; `cluster.workers` where nothing is reserved for one."""
    each = [int(host.get(kind, 0.0) // one) for kind, one in reserved(cluster).items() if one]
    return min(each, default=max(1, cluster.most))


def reserved(cluster: Cluster) -> dict[str, float]:
    """What a worker reserves, by Ray's names."""
    return {"CPU": _number(cluster.cpus), "GPU": _number(cluster.gpus), **cluster.resources}


def free(ray: Any, cluster: Cluster) -> str:
    """What a worker needs, beside what nobody has reserved."""
    there = ray.available_resources()
    needs = {kind: each for kind, each in reserved(cluster).items() if each}
    return ", ".join(f"each needs {each:g} {kind}, {there.get(kind, 0):g} are free" for kind, each in needs.items())


def _number(value: float | str) -> float:
    """A resolved resource."""
    assert not isinstance(value, str), "resolve() comes first"
    return value


def _close_the_door() -> None:
    """Token authentication for a cluster of our own, unless the environment says otherwise.

    The token lives in the environment of our own processes only: left to itself, Ray writes
    one into the home folder, and clusters started later change their mode because of it.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def say_whether_there_is_a_token() -> None:
    """Ray's mode for a cluster that others started, unless the environment says it: with a token where there is one.

    Left to itself, Ray decides by its version.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
        there = named or (Path.home() / ".ray" / "auth_token").is_file()
        os.environ["RAY_AUTH_MODE"] = "token" if there else "disabled"
        _said_for_others.add("RAY_AUTH_MODE")


def _expect_answer(cluster: Cluster) -> None:
    """Ask before `ray.init`, which waits for minutes at an address where nobody is."""
    address = cluster.address
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(
            f"cluster.address: {address!r} is no address; valid: local, auto, HOST:PORT, ray://HOST:PORT"
        )
    deadline = time.monotonic() + min(cluster.timeout, 30)  # with the start-up of two interpreters less than a minute
    try:
        socket.create_connection((host, int(port)), timeout=min(cluster.timeout, 10)).close()
    except OSError as error:
        raise ClusterError(
            f"cluster.address: no Ray cluster answers at {address}: {error.strerror or error}"
        ) from error
    if address.startswith("ray://"):
        return
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        asked = subprocess.run(command, capture_output=True, timeout=max(5, deadline - time.monotonic()), check=False)
    except subprocess.TimeoutExpired:
        asked = None
    if asked is not None and b"AuthenticationError" in asked.stdout + asked.stderr:
        raise ClusterError(
            f"cluster.address: the Ray cluster at {address} asks for a token, and this one is not its own; "
            f"RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH names it"
        )
    if asked is None or asked.returncode != 0:
        raise ClusterError(f"cluster.address: something listens at {address}, but it does not answer as a Ray cluster")


def first_line(error: BaseException) -> str:
    """What a person needs of an error of Ray's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "creation task" in lines[0]:  # Ray puts the cause last
        return lines[-1]
    return lines[0] if lines else type(error).__name__
