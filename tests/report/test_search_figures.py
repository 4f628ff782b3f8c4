"""Figures and importance of a search, from made rows."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metadist.measure import ACCURACY, MSE, Measure
from metadist.report.html import Figure, Page, Section, html
from metadist.report.importance import importance
from metadist.report.search_figures import Found, _Axis, _Scale, save

KEYS = ("algorithm.inner_lr", "algorithm.inner_steps", "model.norm")


def rows(count: int, seed: int = 0, of: str = "algorithm.inner_lr") -> list[dict[str, Any]]:
    """Trials whose score one key alone decides."""
    noise = np.random.default_rng(seed)
    made = []
    for n in range(count):
        rate, steps = float(np.exp(noise.uniform(math.log(0.05), math.log(5)))), int(noise.choice([1, 2, 3, 5]))
        norm = str(noise.choice(["batch", "none"]))
        score = math.exp(-(math.log(rate / 0.6) ** 2)) if of == KEYS[0] else 1 / steps
        how, origin = "finished" if n % 3 else "stopped", "random" if n else "baseline"
        values = dict(zip(KEYS, (rate, steps, norm), strict=True))
        told = {"id": f"{n:03}", "how": how, "origin": origin, "score": score, "ci95": 0.01, "early": score}
        made.append(told | values)
    return made


def found(trials: list[dict[str, Any]], keys: tuple[str, ...] = KEYS, measure: Measure = ACCURACY) -> Found:
    curves = [{"trial": t["id"], "step": s, "score": t["score"] or 0.0} for t in trials for s in (5, 10)]
    return Found(keys, frozenset({KEYS[0]}), measure, trials, trials, curves, 5, 10)


@pytest.mark.parametrize("key", KEYS[:2])
@pytest.mark.parametrize("higher", [True, False])
def test_the_key_that_decides_is_the_one_that_matters(key: str, higher: bool) -> None:
    trials = rows(60, of=key)
    if not higher:
        for row in trials:
            row["early"] = -row["early"]
    shares = importance(KEYS, trials, "early", higher, {KEYS[0]})
    assert next(iter(shares)) == key and shares[key] > 0.6
    assert sum(shares.values()) == pytest.approx(1) and set(shares) == set(KEYS)


def test_what_cannot_be_known_is_not_told() -> None:
    trials = rows(8)
    trials[0]["early"] = None
    assert importance(KEYS, trials, "early", True) == {}
    trials[0]["early"] = 0.1
    assert importance(KEYS, trials, "early", True)
    same = [row | dict.fromkeys(KEYS, 1) for row in trials]
    assert importance(KEYS, same, "early", True) == {}
    for row in trials[:4]:
        row["model.norm"] = None  # its method has no such key
    assert importance(KEYS, trials, "early", True)


@pytest.mark.parametrize(
    ("count", "keys", "measure"),
    [(1, KEYS, ACCURACY), (30, KEYS, MSE), (5, KEYS[2:], ACCURACY)],
)
def test_whatever_was_searched_is_drawn(count: int, keys: tuple[str, ...], measure: Measure, tmp_path: Path) -> None:
    trials = rows(count)
    for row in trials[1:3]:
        row["score"] = None  # ended before its first validation
    for row in trials[3:4]:
        row["score"], row["how"] = float("nan"), "diverged"
    paths = save(found(trials, keys, measure), tmp_path / "figures")
    assert set(paths) == {"heatmap", "curves", "parallel", "importance"}
    for path in paths.values():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 150 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 8


def test_the_same_search_gives_the_same_files(tmp_path: Path) -> None:
    one, other = (save(found(rows(10), KEYS[:2]), tmp_path / name) for name in ("one", "other"))
    assert all(one[name].read_bytes() == other[name].read_bytes() for name in one)


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert save(found([row | {"score": None} for row in rows(3)]), tmp_path / "figures") == {}


def test_every_trial_is_in_its_cell() -> None:
    trials = rows(40)
    axis = _Axis.of(found(trials), KEYS[0], trials)
    assert axis.edges is not None and np.allclose(np.diff(np.log(axis.edges)), np.diff(np.log(axis.edges))[0])
    for row in trials:
        cell = axis.place(row[KEYS[0]])
        assert axis.edges[cell] <= row[KEYS[0]] * (1 + 1e-12) and row[KEYS[0]] <= axis.edges[cell + 1] * (1 + 1e-12)
    steps = _Axis.of(found(trials), KEYS[1], trials)
    assert steps.edges is None and steps.values == [1, 2, 3, 5]


def test_an_axis_keeps_the_order_and_names_its_places() -> None:
    scale = _Scale.of([0.01, 0.1, 1.0], True)
    assert [scale.height(value) for value in (0.01, 0.1, 1.0)] == pytest.approx([0, 0.5, 1])
    assert all(scale.height(float(told)) == pytest.approx(height) for height, told in scale.ticks)
    words = _Scale.of(["none", "batch", None], False)
    assert [told for _, told in words.ticks] == ["None", "batch", "none"]
    assert _Scale.of([3, 3], False).ticks == [(0.5, "3")]


def test_a_page_escapes_every_word() -> None:
    bad = "<script>&\"'"
    page = html(Page(bad, [bad], [Figure(bad, bad, b"png")], [Section(bad, bad, (bad,), [(bad,)])]))
    assert "<script" not in page and page.count("&lt;script&gt;") == 9
    assert page.count("<p") == 2 and "data:image/png;base64,cG5n" in page
