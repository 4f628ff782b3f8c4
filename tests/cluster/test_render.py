"""`metadist cluster render`: one job file says what a cluster is made of."""

import hashlib
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from metadist.manifests.demand import demand, object_name
from metadist.submit.submission import submission

ROOT = Path(__file__).parents[2]

Problems = Callable[[dict[str, Any]], list[str]]
Run = Callable[..., Any]

STORED = "storage=s3://bucket/runs"


@pytest.fixture
def rendered(cli: Run, kuberay: Problems) -> Callable[..., list[dict[str, Any]]]:
    """The documents that the verb prints, each accepted by KubeRay where it is one of its own."""

    def render(kind: str, *words: str) -> list[dict[str, Any]]:
        ended = cli("cluster", "render", "--kind", kind, *words)
        assert ended.code == 0, ended.err
        documents = list(yaml.safe_load_all(ended.out))
        assert kuberay(documents[-1]) == []
        return documents

    return render


def group_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    (group,) = spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
    return dict(group)


def amounts_of(group: dict[str, Any]) -> dict[str, str]:
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    return dict(container["resources"]["limits"])


def test_what_runs_is_what_submit_would_send(
    rendered: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry point, in the folder where the head has the job file, understands its words as the same job."""
    words = ["quickstart", STORED, "seed=7"]
    carried, manifest = rendered("rayjob", *words)
    head = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = (m for m in head["containers"][0]["volumeMounts"] if m["name"] == "job")
    (volume,) = (v for v in head["volumes"] if v["name"] == "job")
    assert volume["configMap"]["name"] == carried["metadata"]["name"]

    change, run = manifest["spec"]["entrypoint"].split(" && ")
    assert change == f"cd {mount['mountPath']}"
    replaced, python, module, name, *told = shlex.split(run)
    assert (replaced, python, module) == ("exec", "python", "-m")
    assert (ROOT / name.replace("metadist.", "").replace(".", "/")).with_suffix(".py").is_file(), "packaged with jobs/"
    (tmp_path / "job.yaml").write_text(carried["data"]["job.yaml"])
    monkeypatch.chdir(tmp_path)
    here = submission(words)
    assert told[-2:] == ["--id", here.id]
    there = submission(told[:-2], id=told[-1])
    assert (there.config, there.words, there.id) == (here.config, here.words, here.id)


def test_the_workers_of_the_job_are_pods(rendered: Callable[..., list[dict[str, Any]]]) -> None:
    group = group_of(rendered("rayjob", "quickstart", STORED, "cluster.workers={min: 2, max: 9}", "cluster.cpus=3")[-1])
    assert group["groupName"] == "cpu"
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 9)
    assert amounts_of(group)["cpu"] == "3"


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "pods", "pod_cpus", "pod_gpus"),
    [
        (1, 0, 4, 4, 1, 0),
        (0.5, 0, 5, 3, 1, 0),
        (0, 0, 2, 2, 1, 0),
        (2, 1, 3, 3, 2, 1),
        (1, 0.25, 6, 2, 4, 1),
        (1, 0.1, 10, 1, 10, 1),
        (4, 2, 2, 2, 4, 2),
        (1.5, 0, 2, 2, 2, 0),
    ],
)
def test_workers_share_a_pod_as_they_share_a_gpu(
    cpus: float, gpus: float, workers: int, pods: int, pod_cpus: int, pod_gpus: int
) -> None:
    device = "cuda" if gpus else "cpu"
    wanted = demand(
        [
            "quickstart",
            f"cluster.cpus={cpus}",
            f"cluster.gpus={gpus}",
            f"cluster.workers={workers}",
            f"engine.device={device}",
        ]
    )
    assert (wanted.pods(workers), wanted.pod_cpus, wanted.pod_gpus) == (pods, pod_cpus, pod_gpus)
    assert wanted.pod_cpus >= wanted.each * cpus
    assert wanted.pod_gpus >= wanted.each * gpus - 1e-9


def test_a_job_on_gpus_gets_pods_with_gpus(rendered: Callable[..., list[dict[str, Any]]]) -> None:
    words = ("engine.device=cuda", "cluster.gpus=0.5", "cluster.workers=4", "cluster.resources={fast: 1}")
    group = group_of(rendered("raycluster", "quickstart", *words)[-1])
    assert group["groupName"] == "gpu"
    assert group["replicas"] == 2
    assert amounts_of(group)["nvidia.com/gpu"] == "1"
    assert group["resources"] == {"fast": "2"}


def test_this_machines_gpus_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose device is auto computes where the cluster says, not as on the machine where it is rendered."""
    import metadist.config

    monkeypatch.setattr(metadist.config, "visible_gpus", lambda: 8)
    assert demand(["quickstart"]).gpus == 0


def test_a_search_has_workers_for_all_trials_at_once(rendered: Callable[..., list[dict[str, Any]]]) -> None:
    words = (STORED, "cluster.workers=2", "search.concurrent=3")
    carried, manifest = rendered("rayjob", "search-inner-loop", *words)
    group = group_of(manifest)
    assert (group["minReplicas"], group["maxReplicas"]) == (6, 6)
    assert " search job.yaml " in manifest["spec"]["entrypoint"]
    assert yaml.safe_load(carried["data"]["job.yaml"])["search"]["concurrent"] == 3


@pytest.mark.parametrize("kind", ["rayjob", "raycluster"])
def test_one_image_for_all_pods(kind: str, rendered: Callable[..., list[dict[str, Any]]]) -> None:
    manifest = rendered(kind, "quickstart", STORED, "--image", "registry.example/metadist:1")[-1]
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    images = {container["image"] for pod in pods for container in pod["template"]["spec"]["containers"]}
    assert images == {"registry.example/metadist:1"}


@pytest.mark.parametrize("kind", ["rayjob", "raycluster"])
@pytest.mark.parametrize(("storage", "mounted"), [("/results/mine", "/results/mine"), ("s3://bucket/runs", None)])
def test_a_path_is_where_the_volume_is_mounted(
    kind: str, storage: str, mounted: str | None, rendered: Callable[..., list[dict[str, Any]]]
) -> None:
    manifest = rendered(kind, "quickstart", f"storage={storage}")[-1]
    head = manifest["spec"].get("rayClusterSpec", manifest["spec"])["headGroupSpec"]["template"]["spec"]
    places = [mount["mountPath"] for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "storage"]
    assert places == ([mounted] if mounted else [])
    assert any(volume["name"] == "storage" for volume in head["volumes"]) == bool(mounted)


def test_written_to_a_file_is_what_is_printed(cli: Run, tmp_path: Path) -> None:
    printed = cli("cluster", "render", "quickstart", STORED).out
    assert cli("cluster", "render", "quickstart", STORED, "--out", tmp_path / "run.yaml").code == 0
    assert (tmp_path / "run.yaml").read_text() == printed


@pytest.mark.parametrize(
    ("words", "say"),
    [
        (("--kind", "pod", "quickstart", STORED), ("--kind", "'pod'", "raycluster, rayjob")),
        (("quickstart",), ("storage:", "s3://BUCKET/FOLDER")),
        (("quickstart", "storage=file:///results"), ("storage: file:///results", "s3://BUCKET/FOLDER")),
        (("quickstart", STORED, "tracking.uri=http://user:secret@host"), ("tracking.uri", "metadist-credentials")),
        (("quickstart", "storage=results"), ("storage: 'results'", "/FOLDER")),
        (("evaluate", "quickstart-0123", STORED), ("evaluate:", "a cluster that stands")),
        (("quickstart", "search-inner-loop", STORED), ("one job at a time",)),
        (("quickstart", STORED, "cluster.workers=0"), ("cluster.workers: 0", "valid is 1 or more")),
        (("search-inner-loop", STORED), ("cluster.workers: 0", "trials")),
        (("quickstart", STORED, "task.shotz=1"), ("task.shotz", "did you mean task.shots?")),
        (("quick", STORED), ("quick",)),
    ],
)
def test_refused_in_one_line_with_nothing_written(
    words: tuple[str, ...], say: tuple[str, ...], refused: Run, tmp_path: Path
) -> None:
    refused("cluster", "render", *words, "--out", tmp_path / "run.yaml", say=say)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_job_has_its_grace(rendered: Callable[..., list[dict[str, Any]]]) -> None:
    """As `submit` gives it, and the head's pod more."""
    for grace, seconds in ((25, 85), (199.5, 260)):
        words = ["quickstart", STORED, f"checkpoint.grace={grace}"]
        spec = rendered("rayjob", *words)[-1]["spec"]
        told = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
        assert told == submission(words).environment == {"RAY_JOB_STOP_WAIT_TIME_S": str(seconds)}
        for cluster in (spec["rayClusterSpec"], rendered("raycluster", *words)[-1]["spec"]):
            assert cluster["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"] > seconds


def test_another_job_is_another_object(rendered: Callable[..., list[dict[str, Any]]]) -> None:
    """`kubectl apply` puts nothing in the place of a run; the same render again is the same object."""
    words = ("rayjob", "quickstart", STORED)
    names = [[one["metadata"]["name"] for one in rendered(*words, f"seed={seed}")] for seed in (1, 2, 1)]
    assert names[0] == names[2]
    assert not {*names[0]} & {*names[1]}
    assert names[0][1] == f"metadist-quickstart-{submission([*words[1:], 'seed=1']).identity[:8]}"
    named = [one["metadata"]["name"] for one in rendered(*words, "--id", "first")]
    assert named == ["metadist-first-job", "metadist-first"]


@pytest.mark.parametrize(
    ("job", "identity", "name"),
    [
        ("omniglot-maml++-5w1s", "0123456789", "metadist-omniglot-mamlpp-5w1s-01234567"),
        ("My_Job v2", "0123456789", "metadist-my-job-v2-01234567"),
        ("x" * 80, "0123456789", "metadist-" + "x" * 29 + "-01234567"),
        ("first", "", "metadist-first"),
        ("First", "", "metadist-first-" + hashlib.sha256(b"First").hexdigest()[:8]),
        ("x" * 80, "", "metadist-" + "x" * 29 + "-" + hashlib.sha256(b"x" * 80).hexdigest()[:8]),
    ],
)
def test_names_are_what_kubernetes_allows(job: str, identity: str, name: str) -> None:
    assert object_name(job, identity) == name
