"""Checkpoints: whole or not there, the newest good one wins."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metadist.runtime.aggregator import Snapshot
from metadist.runtime.checkpoint import Best, Damaged, checkpoints, load_checkpoint, newest_good, prune, save_checkpoint
from metadist.runtime.run_folder import RunFolder

BEST = Best(4, 0.43333333333333335, 0.1)
RECORD = {"fingerprint": {"device": "cpu", "probe": "ab"}, "steps_recomputed": 2, "reproducible": True}


def snapshot(step: int) -> Snapshot:
    random = np.random.default_rng(step)
    return Snapshot(
        step,
        {"net.weight": random.normal(size=(3, 4)).astype(np.float32), "net.mean": np.float32([np.pi, -0.0])},
        {"exp_avg.net.weight": random.normal(size=(3, 4)).astype(np.float32), "step.net.weight": np.float32(step)},
        random.integers(-900, 900, 5),
        tuple(lane(number, random) for number in range(11)),
    )


def lane(number: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Lanes 1 and 10 begin alike; 2 carries nothing."""
    residual = random.normal(size=(3, 4)).astype(np.float32)
    return {} if number == 2 else {"residual.net.weight": residual, "memory.step": np.float32(number)}


def assert_same(found: Snapshot, expected: Snapshot) -> None:
    assert found.step == expected.step
    assert len(found.lanes) == len(expected.lanes)
    for ours, theirs in (
        *zip(found.lanes, expected.lanes, strict=True),
        (found.values, expected.values),
        (found.memory, expected.memory),
        ({"e": found.exponents}, {"e": expected.exponents}),
    ):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert (ours[name].dtype, ours[name].shape) == (np.asarray(theirs[name]).dtype, np.shape(theirs[name]))
            assert ours[name].tobytes() == theirs[name].tobytes()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Checkpoints of steps 4, 8 and 12."""
    for step in (4, 8, 12):
        save_checkpoint(tmp_path, snapshot(step), BEST, RECORD)
    return tmp_path


def test_round_trip(saved: Path) -> None:
    found, best, record = load_checkpoint(saved / "step-8")
    assert_same(found, snapshot(8))
    assert best == BEST
    assert {key: record[key] for key in RECORD} == RECORD
    assert sorted(path.name for path in saved.iterdir()) == ["step-12", "step-4", "step-8"]


def test_one_without_lanes(tmp_path: Path) -> None:
    """As every run left them before there were any, and as most still do."""
    plain = snapshot(4)._replace(lanes=())
    save_checkpoint(tmp_path, plain, None, {})
    assert_same(load_checkpoint(tmp_path / "step-4")[0], plain)


def test_a_run_without_validation_has_no_best(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, snapshot(0), None, {})
    assert load_checkpoint(tmp_path / "step-0")[1] is None


def test_the_same_step_again_replaces_it(saved: Path) -> None:
    save_checkpoint(saved, snapshot(8), None, {})
    assert load_checkpoint(saved / "step-8")[1] is None
    assert [step for step, _ in checkpoints(saved)] == [12, 8, 4]


def test_nothing_in_it_can_run_code(saved: Path) -> None:
    for path in (saved / "step-8").iterdir():
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK")), "a pickle or torch archive"
        if path.suffix == ".safetensors":
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            assert all(set(entry) == {"dtype", "shape", "data_offsets"} for entry in header.values())
        else:
            json.loads(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def zeroed(path: Path) -> None:
    """What a file system may leave after a power cut."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("harm", [truncate, empty, remove, zeroed])
def test_a_damaged_newest_falls_back_to_the_one_before(saved: Path, name: str, harm) -> None:
    harm(saved / "step-12" / name)
    told: list[str] = []
    found = newest_good(saved, told.append)
    assert found is not None
    assert_same(found[0], snapshot(8))
    assert len(told) == 1
    assert "step-12 is damaged" in told[0]
    assert "\n" not in told[0]


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_no_flipped_bit_goes_unnoticed(saved: Path, name: str) -> None:
    path = saved / "step-12" / name
    good = path.read_bytes()
    random = np.random.default_rng(0)
    for position in {0, 8 * len(good) - 1, *random.integers(0, 8 * len(good), 300).tolist()}:
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        try:
            found, best, _ = load_checkpoint(path.parent)
        except Damaged:
            continue
        # A digit beyond a float's precision may change without changing the number.
        assert name == "checkpoint.json"
        assert best == BEST
        assert_same(found, snapshot(12))


def test_swapped_files_do_not_match(saved: Path) -> None:
    shutil.copy(saved / "step-8" / "state.safetensors", saved / "step-12" / "state.safetensors")
    with pytest.raises(Damaged, match="checksum"):
        load_checkpoint(saved / "step-12")


def test_an_empty_folder_and_strange_names_are_passed_over(saved: Path) -> None:
    (saved / "step-16").mkdir()
    (saved / "step-x").mkdir()
    (saved / "step-99").write_text("a file")
    told: list[str] = []
    found = newest_good(saved, told.append)
    assert found is not None
    assert found[0].step == 12
    assert len(told) == 1
    assert "step-16" in told[0]


def test_all_damaged_is_none(saved: Path) -> None:
    for _, path in checkpoints(saved):
        truncate(path / "state.safetensors")
    told: list[str] = []
    assert newest_good(saved, told.append) is None
    assert len(told) == 3
    assert newest_good(saved / "nothing here", told.append) is None


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(2, 14, 2):
        save_checkpoint(tmp_path, snapshot(step), BEST, {})
        prune(tmp_path, 3, BEST, step)
    assert [step for step, _ in checkpoints(tmp_path)] == [12, 10, 8, 4]
    prune(tmp_path, 3, Best(10, 0.5, 0.1), 12)
    assert len([step for step, _ in checkpoints(tmp_path) if step != 10]) == 3
    prune(tmp_path, 3, None, 12)
    assert [step for step, _ in checkpoints(tmp_path)] == [12, 10, 8]


def test_a_damaged_checkpoint_takes_no_good_ones_place(tmp_path: Path) -> None:
    """A run fell back from a damaged step 12 to 6: three good ones must stand behind what it writes now."""
    for step in (4, 5, 6, 12):
        save_checkpoint(tmp_path, snapshot(step), None, {})
    truncate(tmp_path / "step-12" / "state.safetensors")
    for step in (7, 8):
        save_checkpoint(tmp_path, snapshot(step), None, {})
        prune(tmp_path, 3, None, step)
    assert [path.name for _, path in checkpoints(tmp_path)] == ["step-8", "step-7", "step-6"]


def test_a_process_killed_while_writing_leaves_no_half_checkpoint(saved: Path, tmp_path: Path) -> None:
    """Really killed: between the two files, and between the last file and the rename."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    shutil.copytree(saved / "step-4", run / "checkpoints" / "step-4")
    for killed_at in (1, 3):  # fsyncs: a file, the other file, the folder
        code = (
            "import os, signal\n"
            "from pathlib import Path\n"
            "from metadist import durable\n"
            "count, real = [0], os.fsync\n"
            "def fsync(handle):\n"
            "    real(handle); count[0] += 1\n"
            f"    count[0] == {killed_at} and os.kill(os.getpid(), signal.SIGKILL)\n"
            "durable.os.fsync = fsync\n"
            f"durable.write_folder(Path({str(run / 'checkpoints' / 'step-8')!r}), {{'a': b'1', 'b': b'2'}})\n"
        )
        ended = subprocess.run([sys.executable, "-c", code], check=False)
        assert ended.returncode == -signal.SIGKILL
    left = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert len(left) == 2
    found = newest_good(run / "checkpoints", pytest.fail)
    assert found is not None
    assert found[0].step == 4
    (run / ".config.yaml.0123abcd").write_text("half a f")
    folder = RunFolder.open(run)
    folder.unlock()
    assert sorted(os.listdir(run / "checkpoints")) == ["step-4"]
    assert sorted(os.listdir(run)) == [".lock", "checkpoints", "config.yaml"]
