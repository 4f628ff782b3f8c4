"""A published table is run, stopped, gone on with and told; a tiny table whose rows take seconds."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from metadist.config import find_job, load
from metadist.errors import ConfigError, RunError
from metadist.reproduce import published, run
from metadist.reproduce.published import BUDGETS, Line, Published, PublishedTable, chosen, read_table
from metadist.reproduce.report import markdown
from metadist.reproduce.rows import Outcome, command_of, overrides_of


def newest(folder: Path) -> Path:
    """The last checkpoint."""
    return max(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


@pytest.fixture
def table(tmp_path: Path, tiny_job: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """`tiny`: two rows that finish and one that cannot."""
    told = {
        "title": "Tiny",
        "measure": "accuracy",
        "short": ["outer.steps=6"],
        "rows": [
            {
                "method": "maml",
                "setting": "3w1s",
                "job": str(tiny_job),
                "short": [],
                "published": {"value": 5.0, "source": "A"},
            },
            {
                "method": "fomaml",
                "setting": "3w1s",
                "job": str(tiny_job),
                "short": ["algorithm.order=1", "outer.steps=4"],
            },
            {"method": "broken", "setting": "3w1s", "job": str(tiny_job), "short": ["algorithm.inner_lr=1e37"]},
            {"method": "maml", "setting": "2w1s", "job": str(tiny_job), "recipe": ["task.ways=2", "outer.steps=2"]},
        ],
    }
    path = tmp_path / "tiny-table.yaml"
    path.write_text(yaml.safe_dump(told))
    monkeypatch.setattr(published, "tables", lambda: {"tiny": path})
    return told


def reproduce(
    out: Path,
    methods: str | None = None,
    budget: str = "short",
    overrides: tuple[str, ...] = (),
    at_once: int = 1,
    **further: str,
):
    said: list[str] = []
    _, rows = run.reproduce(
        "tiny",
        budget=budget,
        methods=methods,
        overrides=overrides,
        out=out,
        at_once=at_once,
        say=said.append,
        **further,
    )
    return rows, said


def test_rows_are_run_resumed_and_told(table: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows, _ = reproduce(out, "maml,fomaml")
    maml, fomaml = rows
    result = json.loads((out / "short" / "maml-3w1s" / "result.json").read_text())
    assert maml.value == pytest.approx(100 * result["test"]["accuracy"])
    assert maml.ci95 == pytest.approx(100 * result["test"]["ci95"])
    assert (maml.steps, fomaml.steps) == (6, 4)
    assert maml.difference == pytest.approx(maml.value - 5.0)
    assert load(out / "short" / "fomaml-3w1s" / "config.yaml").algorithm.order == 1

    told = pq.read_table(out / "short" / "table.parquet").to_pylist()
    assert [row["method"] for row in told] == ["maml", "fomaml"]
    assert told[0]["ours"] == maml.value
    assert told[1]["published"] is None
    text = (out / "short" / "table.md").read_text()
    assert f"{maml.value:.2f}" in text
    assert maml.command in text
    metrics = pq.read_table(out / "short" / "maml-3w1s" / "metrics.parquet").to_pylist()
    judged = [(row["step"], 100 * row["val_accuracy"]) for row in metrics if row["val_accuracy"] is not None]
    assert list(maml.curve) == judged == [(point["step"], point["value"]) for point in told[0]["curve"]]
    assert f"- maml, 3w1s: {judged[0][0]}: {judged[0][1]:.4g}" in text
    assert "outer.steps=6" in maml.command

    assert maml.hardware.startswith("one process on ")
    assert maml.seconds == result["wall_seconds"]

    # Stopped before its end, a row goes on from its checkpoint; a finished one is read.
    checkpoint = newest(out / "short" / "maml-3w1s" / "checkpoints")
    (out / "short" / "maml-3w1s" / "result.json").unlink()
    again, said = reproduce(out, "maml,fomaml")
    assert any("going on" in line for line in said)
    assert sum("training in" in line for line in said) == 0
    assert [row.value for row in again] == [row.value for row in rows]
    after = json.loads((out / "short" / "maml-3w1s" / "result.json").read_text())
    assert after["theta_sha256"] == result["theta_sha256"]
    before_it_stopped = json.loads((checkpoint / "checkpoint.json").read_text())["seconds"]
    assert 0 < before_it_stopped < again[0].seconds == after["wall_seconds"], "the time of all its processes"

    # Another call's rows stay in the table, as long as they are what the table asks for.
    for path in (out / "short").glob("table.*"):
        path.unlink()
    rows, _ = reproduce(out, "fomaml")
    assert [row.line.method for row in rows] == ["fomaml"]
    assert [row["method"] for row in pq.read_table(out / "short" / "table.parquet").to_pylist()] == ["maml", "fomaml"]

    with pytest.raises(ConfigError, match=r"maml-3w1s: holds a run with another seed; name another --out"):
        reproduce(out, "maml", overrides=("seed=7",))
    with pytest.raises(ConfigError, match="eval"):
        reproduce(out, "maml", overrides=("eval.episodes=10",))


def test_a_setting_may_stand_in_the_paper_budget_alone(table: dict, tmp_path: Path) -> None:
    short = chosen(read_table("tiny"), "short")
    assert [(line.method, line.setting) for line in short] == [("maml", "3w1s"), ("fomaml", "3w1s"), ("broken", "3w1s")]
    (row,), _ = reproduce(tmp_path / "out", "maml", "paper", settings="2w1s")
    config = load(tmp_path / "out" / "paper" / "maml-2w1s" / "config.yaml")
    assert (row.steps, config.task.ways) == (2, 2)
    assert "task.ways=2 outer.steps=2" in row.command


def test_two_rows_at_once_and_one_that_fails_stops_no_other(table: dict, tmp_path: Path) -> None:
    rows, _ = reproduce(tmp_path / "out", "broken,maml,fomaml", at_once=2)
    assert [row.line.method for row in rows] == ["maml", "fomaml", "broken"]
    maml, fomaml, broken = rows
    assert maml.value is not None
    assert fomaml.value is not None
    assert broken.value is None
    assert "error" in broken.problem
    told = (tmp_path / "out" / "short" / "table.md").read_text()
    assert "failed" in told
    assert len(told.split("```")[1].strip().splitlines()) == 3


def test_a_variant_of_a_row() -> None:
    line = Line(
        method="m", variant="easier", setting="s", job="j", published=Published(value=9.0, source="A"), short=()
    )
    row = Outcome(line, "metadist train j", value=5.0, ci95=1.0, hardware="1 CPU", transductive=None)
    assert (line.folder, row.difference, row.falls_short(True)) == ("m-easier-s", None, False)
    told = markdown(PublishedTable(title="T", measure="accuracy", rows=(line,)), "short", [row])
    assert "| m, easier | s | 5.00 ± 1.00 % | 9.00 % (A) | – |" in told


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"methods": "mamel"}, "maml, fomaml, broken"),
        ({"budget": "tiny"}, "short, paper"),
        ({"settings": "2w1s"}, "no such row of the short budget: '2w1s'; valid: 3w1s"),
        ({"overrides": ("outer.stepz=3",)}, "outer.steps"),
    ],
)
def test_bad_input(asked: dict, told: str, table: dict, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        reproduce(tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_one_process_at_a_time(table: dict, tmp_path: Path) -> None:
    from metadist.durable import lock

    (tmp_path / "out" / "short").mkdir(parents=True)
    with lock(tmp_path / "out" / "short" / ".lock"), pytest.raises(RunError, match="another process"):
        reproduce(tmp_path / "out", "maml")


@pytest.mark.parametrize(
    ("measure", "aim", "missed"),
    [("accuracy", 95.1, True), ("accuracy", 95, False), ("mse", 94, True), ("mse", 96, False)],
)
def test_what_misses_its_aim_is_named_under_the_short_budget(measure, aim, missed) -> None:
    line = Line(method="m", setting="s", job="j", aim=aim)
    row = Outcome(line, "metadist train j", value=95.0, ci95=1.0, hardware="1 × CPU", transductive=True)
    table = PublishedTable(title="T", measure=measure, rows=(line,))
    assert (f"Worse than the aim of the short budget: m, s ({aim:g})" in markdown(table, "short", [row])) is missed
    assert "Worse" not in markdown(table, "paper", [row])


@pytest.mark.parametrize(
    ("measure", "ours", "published", "short"),
    [
        ("accuracy", (90.0, 1.0), (92.5, 1.0), True),
        ("accuracy", (90.0, 1.0), (91.5, 1.0), True),
        ("accuracy", (90.0, 1.0), (90.9, 1.0), False),
        ("accuracy", (95.0, 1.0), (91.5, 1.0), False),
        ("mse", (0.9, 0.1), (0.5, 0.1), True),
        ("mse", (0.3, 0.1), (0.5, 0.1), False),
    ],
)
def test_what_falls_short_is_named(measure, ours, published, short) -> None:
    line = Line(
        method="m", setting="s", job="j", published=Published(value=published[0], ci95=published[1], source="A")
    )
    row = Outcome(line, "metadist train j", value=ours[0], ci95=ours[1], hardware="1 × CPU", transductive=True)
    assert row.falls_short(measure == "accuracy") is short
    text = markdown(PublishedTable(title="T", measure=measure, rows=(line,)), "paper", [row])
    assert ("Worse than the published figure by more than our interval: m, s." in text) is short


@pytest.mark.parametrize("name", list(published.tables()))
def test_packaged_tables_are_whole(name: str) -> None:
    """Every row's job exists, and both budgets of it are valid configs of the method that the row names."""
    table = read_table(name)
    assert table.rows
    for line in table.rows:
        find_job(line.job)
        for budget in ("paper",) if line.short is None else ("paper", "short"):
            config = load(line.job, overrides_of(table, line, budget, ()))
            assert config.kind == ("classification" if table.measure == "accuracy" else "regression")
            assert line.method in (config.algorithm.name, "fomaml" if config.algorithm.name == "maml" else None)
            ways, shots = config.eval.ways or config.task.ways, config.eval.shots or config.task.shots
            assert line.setting == (f"{ways}w{shots}s" if table.measure == "accuracy" else f"{shots}-shot")
    assert len({line.folder for line in table.rows}) == len(table.rows)
    first = table.rows[0].method
    assert {line.method for line in chosen(table, "paper", first)} == {first}


def test_what_is_recorded_is_what_the_tables_run() -> None:
    """Every command in jobs/RESULTS.md is that of a row as the tables have it now."""
    current = set()
    for name in published.tables():
        table = read_table(name)
        further = ("data.root=FOLDER",) if name == "omniglot" else ()
        for line in table.rows:
            for budget in BUDGETS[line.short is None :]:
                current.add(command_of(line, overrides_of(table, line, budget, further)))
    text = (find_job("quickstart").parent / "RESULTS.md").read_text()
    recorded = [line for line in text.splitlines() if line.startswith("metadist train")]
    assert recorded
    assert [line for line in recorded if line not in current] == []
