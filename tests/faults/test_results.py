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


def test_results_that_come_twice_late_and_in_any_order(
    on_two: Config, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of what really came in is told again some rounds later; and the workers share a process id.

    Hosts have process ids of their own: what each worker did must be told apart all the same.
    """
    from metadist.runtime.on_ray import OnRay, Shard

    arrived = OnRay._arrived

    def elsewhere(self: OnRay, name: str, introduction: Any) -> None:
        arrived(self, name, introduction._replace(host=f"host-{name[-1]}", pid=118))

    real, drawn = OnRay._events, random.Random(0)
    old: list[Any] = []
    repeated = [0]

    def events(self: OnRay) -> Any:
        results = [result for result in real(self) if isinstance(result[1][0], Shard)] if self._calls else real(self)
        for result in list(results):
            if drawn.random() < 0.5:
                old.append(result)
        if old and drawn.random() < 0.7:
            again = old.pop(drawn.randrange(len(old)))
            repeated[0] += len(again[1])
            results.append(again)
        drawn.shuffle(results)
        return results

    monkeypatch.setattr(OnRay, "_events", events)
    monkeypatch.setattr(OnRay, "_arrived", elsewhere)
    result = train(on_two.with_values(eval={"every": 0, "test": False}), "tiny", tmp_path / "run").result
    assert repeated[0] > 5
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert result["duplicates_dropped"] == repeated[0]
    assert set(result["shards_by_worker"]) == {"118@host-0", "118@host-1"}
    assert all(result["shards_by_worker"].values())
    assert sum(result["shards_by_worker"].values()) == 12 * 4, "each shard is counted once"


def test_a_damaged_sum_is_never_counted(
    on_two: Config, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit, on its way from a worker to the aggregator: what is missing then is computed again."""
    from metadist.runtime.on_ray import OnRay

    real = OnRay._take
    damaged: list[int] = []

    def take(self: OnRay, step: int, name: str, items: Any, receipt: Any, sent: Any) -> None:
        if step == 6 and not damaged and receipt.summed:
            damaged.append(step)
            changed = self.ray.get(sent[0]).copy()
            changed[5] ^= 1 << 33
            sent = [self.ray.put(changed)]
        real(self, step, name, items, receipt, sent)

    monkeypatch.setattr(OnRay, "_take", take)
    result = train(on_two, "tiny", tmp_path / "run").result
    assert damaged == [6]
    assert result["theta_sha256"] == tiny_run.result["theta_sha256"]
    assert result["duplicates_dropped"] > 0, "it was dropped, and counted"
    assert result["steps_recomputed"] <= 4
    assert result["best"] == tiny_run.result["best"]
