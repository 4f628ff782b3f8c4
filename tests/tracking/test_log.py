"""The log of a run: every line one JSON object, with run, step and worker."""

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metadist.errors import RunError
from metadist.tracking.log import NAME, Log, concerning

KEYS = {"time", "level", "run", "step", "worker", "message"}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


def test_what_is_told_before_there_is_a_folder_comes_into_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person reads it on the standard error as ever."""
    with Log() as log:
        with concerning("7@host"):
            log.say("worker 7 joined")
        log.keep(tmp_path)
        log.shown("meta-step 3/9", 3)
        log.say("warning: a cold day")
    told = lines(tmp_path)
    assert [line["message"] for line in told] == ["worker 7 joined", "meta-step 3/9", "warning: a cold day"]
    assert [line["worker"] for line in told] == ["7@host", None, None]
    assert [line["step"] for line in told] == [None, 3, 3]
    assert [line["level"] for line in told] == ["info", "info", "warning"]
    assert {line["run"] for line in told} == {tmp_path.name}
    assert all(line.keys() == KEYS for line in told)
    assert capsys.readouterr().err == "worker 7 joined\nwarning: a cold day\n"


def test_structured_it_is_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METADIST_LOG", "json")
    monkeypatch.setattr("sys.excepthook", lambda *_: None)
    with contextlib.suppress(ZeroDivisionError), Log() as log:
        log.keep(tmp_path)
        log.shown("meta-step 3/9", 3)
        with concerning("7@host"):
            1 / 0  # noqa: B018
    out, err = capsys.readouterr()
    shown, failed = map(json.loads, out.splitlines())
    assert (shown["message"], err) == ("meta-step 3/9", "")
    assert (failed["level"], failed["worker"], failed["step"]) == ("error", "7@host", 3)
    assert "ZeroDivisionError" in failed["message"]
    assert "in worker 7@host" in failed["message"]
    assert [line["message"] for line in lines(tmp_path)] == ["meta-step 3/9", failed["message"]]


def test_a_known_error_is_a_line(tmp_path: Path) -> None:
    with contextlib.suppress(RunError), Log() as log:
        log.keep(tmp_path)
        raise RunError("no such run")
    (line,) = lines(tmp_path)
    assert (line["level"], line["message"]) == ("error", "no such run")


def test_a_run_and_its_resume_are_in_one_log(half_run: Path, cli: Callable[..., Any]) -> None:
    before = lines(half_run)
    assert any("validation" in line["message"] and line["step"] == 6 for line in before)
    assert cli("train", "--resume", half_run).code == 0
    after = lines(half_run)
    assert after[: len(before)] == before
    assert any(line["message"].startswith("meta-step 12/12") for line in after[len(before) :])
    assert {line["run"] for line in after[len(before) :]} == {half_run.name}


def test_threads_that_go_on_after_the_end_lose_their_lines_only(tmp_path: Path) -> None:
    """What comes while the log is opened comes into it; what comes when it is closed harms nobody."""
    with Log() as log:
        threads = [threading.Thread(target=log.shown, args=(f"{n}", n)) for n in range(20)]
        for number, thread in enumerate(threads):
            thread.start()
            if number == 10:
                log.keep(tmp_path)
        for thread in threads:
            thread.join()
    log.shown("late", 21)
    assert sorted(line["message"] for line in lines(tmp_path)) == sorted(map(str, range(20)))
