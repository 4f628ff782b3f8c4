"""Bad input: one line that names what is wrong, an exit code, and no run folder."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metadist.config import Config
from metadist.data.sources import prepare

Refused = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def built(one_cache: Path) -> None:
    """The embedded data set, so that no command tells of building it beside its one line."""
    prepare(Config().data.sources[0])


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each case runs in a folder where no run folder may be afterwards."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert os.listdir(tmp_path / "here") == []
    assert not (tmp_path / "run").exists()


@pytest.fixture
def train(refused: Refused, tiny_job: Path, tmp_path: Path) -> Refused:
    def run(*words: object, **expected: Any) -> Any:
        return refused("train", tiny_job, "--run-dir", tmp_path / "run", *words, **expected)

    return run


CASES = {
    "unknown-key": ("task.shotz=1", ("task.shotz", "did you mean task.shots?")),
    "unknown-section": ("taks.shots=1", ("taks", "did you mean task?")),
    "unknown-key-of-a-method": ("algorithm.inner_rate=1", ("algorithm.inner_rate",)),
    "unknown-method": ("algorithm.name=mamel", ("algorithm.name", "maml")),
    "wrong-type": ("task.shots=many", ("task.shots", "'many'")),
    "zero": ("task.shots=0", ("task.shots",)),
    "negative-rate": ("outer.lr=-1", ("outer.lr",)),
    "infinite-rate": ("algorithm.inner_lr=.inf", ("algorithm.inner_lr",)),
    "no-choice": ("model.name=conv5", ("model.name", "conv4")),
    "shard": ("task.shard=3", ("task.shard", "task.meta_batch=8")),
    "more-ways-than-classes": ("task.ways=5000", ("task.ways", "5000", "at most")),
    "more-ways-than-meta-test-classes": ("task.ways=400", ("ways", "400", "at most")),
    "more-examples-than-there-are": ("task.queries=20", ("task.shots + task.queries", "at most 20")),
    "eval-shots": ("eval.shots=20", ("eval.shots", "at most 20")),
    "eval-ways-of-a-class-bound-head": ("eval.ways=5", ("eval.ways", "3")),
    "eval-also": ("eval.also=[{shotz: 5}]", ("eval.also.0", "shotz", "shots")),
    "eval-also-too-much": ("eval.also=[{queries: 20}]", ("eval",)),
    "generated-data-set": ("data.name=sinusoidd", ("data.name", "did you mean sinusoid?")),
    "a-mixture-with-a-generated-one": ("data.name=[{name: glyphs}, {name: sinusoid}]", ("data.name", "sinusoid")),
    "data-set": ("data.name=omniglott", ("data.name", "omniglot")),
    "split": ("data.split=vinyals", ("data.split", "scripts")),
    "a-root-that-is-not-read": ("data.root=/tmp", ("data.root", "glyphs")),
    "tracking": ("tracking.uri=file:./mlruns", ("tracking.uri",)),
    "halving": ("outer.schedule=halving", ("outer.halve_every",)),
    "gpus-on-cpu": ("cluster.gpus=1", ("cluster.gpus", "engine.device=cpu")),
    "half-an-override": ("task.=1", ("key.path=value",)),
    "into-a-value": ("seed.x=1", ("seed",)),
    "yaml": ("task.shots=[1", ("task.shots",)),
}


@pytest.mark.parametrize(("word", "say"), CASES.values(), ids=CASES)
def test_an_override(train: Refused, word: str, say: tuple[str, ...]) -> None:
    train(word, say=say)


def test_no_gpu_here(train: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train("engine.device=cuda", say=("engine.device", "cpu"))


@pytest.mark.parametrize(
    ("text", "say"),
    [
        ("task: {shotz: 1}", ("bad.yaml", "task.shotz", "task.shots")),
        ("task: {shots: 1}\ntask: {shots: 2}", ("bad.yaml", "task", "twice")),
        ("task: {shots: 1", ("bad.yaml", "not valid YAML")),
        ("- 1\n- 2", ("bad.yaml", "mapping")),
        ("seed: -1", ("bad.yaml", "seed")),
        ("algorithm: {inner_lr: 1}", ("bad.yaml", "algorithm.name")),
        ("algorithm: 3", ("bad.yaml", "algorithm")),
        ("data: {name: []}", ("bad.yaml", "data.name")),
        ("data: {name: [{name: glyphs, wait: 1}]}", ("bad.yaml", "wait", "weight")),
        ("\x00", ("bad.yaml",)),
    ],
)
def test_a_job_file(refused: Refused, tmp_path: Path, text: str, say: tuple[str, ...]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    refused("train", tmp_path / "bad.yaml", "--run-dir", tmp_path / "run", say=say)


@pytest.mark.parametrize(
    ("job", "say"),
    [
        ("jobs/nothing.yaml", ("jobs/nothing.yaml", "does not exist", "quickstart")),
        ("quikstart", ("quikstart", "did you mean quickstart?")),
        ("/", ("is a folder",)),
    ],
)
def test_a_job_that_does_not_exist(refused: Refused, job: str, say: tuple[str, ...]) -> None:
    refused("train", job, say=say)


def test_no_job_and_two_jobs(refused: Refused) -> None:
    refused("train", say=("no job", "quickstart"))
    refused("train", "task.shots=1", say=("no job",))
    refused("train", "quickstart", "omniglot", say=("one job",))


def test_a_run_folder_that_exists(refused: Refused, tiny_job: Path, tiny_run: Any, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    refused("train", tiny_job, "--run-dir", tmp_path / "there", say=(str(tmp_path / "there"), "--run-dir"))
    assert os.listdir(tmp_path / "there") == []
    refused("train", tiny_job, "--run-dir", tiny_run.folder, say=("exists already", "--resume"))
    refused("train", tiny_job, "--run-dir", tiny_job, say=("exists already",))


def test_a_place_that_takes_no_folder(refused: Refused, tiny_job: Path) -> None:
    refused("train", tiny_job, "--run-dir", "/sys/run", code=3, say=("/sys/run", "cannot be written"))
    refused("train", tiny_job, "--run-dir", tiny_job / "run", code=3, say=(str(tiny_job / "run"),))


def test_resuming_what_is_no_run(refused: Refused, tmp_path: Path, tiny_run: Any) -> None:
    refused("train", "--resume", tmp_path / "nothing", say=("no such run folder",))
    refused("train", "--resume", tmp_path, say=("no run folder", "config.yaml"))
    refused("train", "quickstart", "--resume", tiny_run.folder, say=("quickstart",))
    refused("train", "--resume", tiny_run.folder, "--run-dir", tmp_path / "run", say=("--resume",))


# --- data --------------------------------------------------------------------------

DRAWING = "images_background/Alphabet_of_the_Magi/character01/0709_01.png"


def missing(root: Path) -> None:
    pass


def empty(root: Path) -> None:
    root.mkdir()


def a_file(root: Path) -> None:
    root.write_text("")


def something_else(root: Path) -> None:
    root.mkdir()
    (root / "cat.jpg").write_bytes(b"cat")


def half(root: Path) -> None:
    root.mkdir()
    (root / "images_background").mkdir()


def corrupt_archive(root: Path) -> None:
    root.mkdir()
    (root / "images_background.zip").write_bytes(b"PK\x03\x04 half a file")
    (root / "images_evaluation.zip").write_bytes(b"")


def corrupt_image(root: Path) -> None:
    (root / DRAWING).parent.mkdir(parents=True)
    (root / DRAWING).write_bytes(b"\x89PNG\r\n\x1a\n half a file")
    (root / "images_evaluation").mkdir()


FOLDERS = {
    missing: ("does not exist", "images_background.zip"),
    empty: ("is empty", "images_background.zip"),
    a_file: ("is no folder",),
    something_else: ("holds no Omniglot",),
    half: ("images_evaluation",),
    corrupt_archive: ("images_background.zip", "corrupt archive"),
    corrupt_image: (DRAWING.partition("/")[2], "damaged"),
}


@pytest.mark.parametrize(("make", "say"), FOLDERS.items(), ids=[make.__name__ for make in FOLDERS])
def test_a_data_folder(
    cli: Refused, tiny_job: Path, tmp_path: Path, make: Callable[[Path], None], say: tuple[str, ...]
) -> None:
    make(tmp_path / "data")
    words = ("data.name=omniglot", f"data.root={tmp_path / 'data'}")
    ended = cli("train", tiny_job, "--run-dir", tmp_path / "run", *words)
    *progress, last = ended.err.strip().splitlines()
    assert ended.code == 2
    assert last.startswith("error: ")
    assert all(word in last for word in (str(tmp_path / "data"), *say))
    assert all(line.startswith("omniglot: ") for line in progress), "what was being done before it was found"


# --- clusters that are not there -----------------------------------------------------


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a program that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield int(listener.getsockname()[1])


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:port", "ray://"])
def test_no_address(train: Refused, address: str) -> None:
    train("cluster.workers=1", f"cluster.address={address}", code=4, say=("cluster.address", "HOST:PORT"))


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nothing_listens(train: Refused, scheme: str, free_port: Callable[[], int]) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    train("cluster.workers=1", f"cluster.address={address}", code=4, say=("cluster.address", address))


@pytest.mark.parametrize(
    ("scheme", "timeout"),
    [("", 4), pytest.param("ray://", 60, marks=pytest.mark.chaos, id="by Ray Client, which tries for half a minute")],
)
def test_something_listens_that_is_no_cluster(
    start_cli: Refused, tiny_job: Path, tmp_path: Path, silent: int, scheme: str, timeout: int
) -> None:
    address = f"{scheme}127.0.0.1:{silent}"
    command = ("train", tiny_job, "--run-dir", tmp_path / "run", "cluster.workers=1")
    process = start_cli(*command, f"cluster.address={address}", f"cluster.timeout={timeout}")
    assert process.wait(60) == 4, process.said
    assert process.said.startswith("error: cluster.address"), process.said
    assert process.said.count("\n") == 1, process.said
    assert address in process.said
