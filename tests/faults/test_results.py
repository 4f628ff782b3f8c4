"""Results that come twice, late, in another order or damaged, on real workers: dropped, counted, computed again."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metadist.config import Config
from metadist.run import train

pytestmark = pytest.mark.cluster

Make = Callable[..., Config]


@pytest.fixture
def on_two(tiny: Make, cluster: Any) -> Config:
    return tiny("cluster.workers=2", f"cluster.address={cluster.address}")


@pytest.mark.chaos
def test_results_that_come_twice_late_and_in_any_order(
    on_two: Config, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of what really came in is told again some rounds later; and the workers share a process id.

    Hosts have process ids of their own: what each worker did must be told apart all the same.
    """
    from metadist.runtime.pool import Pool, Shard

    arrived = Pool._arrived

    def elsewhere(self: Pool, name: str, introduction: Any, *place: Any) -> None:
        arrived(self, name, introduction._replace(host=f"host-{name[-1]}", pid=118), *place)

    real, drawn = Pool.events, random.Random(0)
    old: list[Any] = []
    repeated = [0]

    def events(self: Pool) -> Any:
        results = [came for came in real(self) if isinstance(came.items[0], Shard)]
        for result in list(results):
            if drawn.random() < 0.5:
                old.append(result)
        if old and drawn.random() < 0.7:
            again = old.pop(drawn.randrange(len(old)))
            repeated[0] += len(again.items)
            results.append(again)
        drawn.shuffle(results)
        return results

    monkeypatch.setattr(Pool, "events", events)
    monkeypatch.setattr(Pool, "_arrived", elsewhere)
    calm = on_two.with_values(eval={"every": 0, "test": False}, cluster={"backup": None})  # copies would come twice too
    result = train(calm, "tiny", tmp_path / "run").result
    assert repeated[0] > 5
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert result["duplicates_dropped"] == repeated[0]
    assert set(result["shards_by_worker"]) == {"118@host-0", "118@host-1"}
    assert all(result["shards_by_worker"].values())
    assert sum(result["shards_by_worker"].values()) == 12 * 4, "each shard is counted once"


WAYS = {
    "flat": (),
    "by Ray": ("cluster.lines=false",),
    "tree": ("cluster.sums=tree",),
    "pieces": ("cluster.aggregators=2",),
    "payloads": ("outer.compression=int8",),
}


@pytest.mark.parametrize("way", [way if way == "flat" else pytest.param(way, marks=pytest.mark.chaos) for way in WAYS])
def test_a_damaged_sum_is_never_counted(
    way: str, on_two: Config, tiny: Make, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit, on its way from a worker to the aggregator: what is missing then is computed again, and no step is."""
    from metadist.runtime.on_ray import OnRay
    from metadist.runtime.sharing import Shared, Spaces

    real = OnRay._take
    damaged: list[int] = []

    def take(self: OnRay, step: int, came: Any) -> None:
        if step in (6, 9) and step not in damaged and came.value.summed:
            damaged.append(step)
            sent, piece = list(came.sent), 0 if step == 9 else len(self._sums.pieces) - 1
            here = isinstance(sent[piece], Shared)
            changed = Spaces().read(sent[piece])[1] if here else self.ray.get(sent[piece]).copy()
            changed[5] ^= 1 << (33 if changed.dtype == "int64" else 3)
            sent[piece] = sent[piece] if here else self.ray.put(changed)
            came = came._replace(sent=sent)
        real(self, step, came)

    monkeypatch.setattr(OnRay, "_take", take)
    keys = WAYS[way]
    calm = tiny_run if way != "payloads" else train(tiny(*keys), "tiny", tmp_path / "calm")
    config = tiny("cluster.workers=2", f"cluster.address={on_two.cluster.address}", *keys)
    result = train(config, "tiny", tmp_path / "run").result
    assert damaged == [6, 9], "one in the middle, one before a validation"
    assert result["theta_sha256"] == calm.result["theta_sha256"]
    assert result["duplicates_dropped"] > 0, "it was dropped, and counted"
    assert result["shards_recomputed"] >= 2
    assert result["steps_recomputed"] == 0
    assert sum(result["shards_by_worker"].values()) == 12 * 4, "each shard is counted once"
    assert result["best"] == calm.result["best"]
