"""An evaluation's tasks, spread over the workers."""

from collections.abc import Callable

import numpy as np

from metadist.engine.sweep import Setting
from metadist.runtime.pool import Came, Judgement, Pool


def judge(
    pool: Pool, values: np.ndarray, judged: Setting, split: str, episodes: int, aside: Callable[[Came], None]
) -> dict[str, np.ndarray]:
    """Accuracy and loss of evaluation tasks 0 … episodes−1, float64, whoever judged them.

    aside: takes what comes in meanwhile and is no judgement.
    """
    shared = pool.ray.put(values)
    evaluation, size, dispatcher = shared.hex(), pool.config.shard, pool.dispatcher
    dispatcher.drop()
    dispatcher.add(Judgement(evaluation, first, min(size, episodes - first)) for first in range(0, episodes, size))
    found: dict[int, dict[str, np.ndarray]] = {}
    while dispatcher.open:
        for name, items in dispatcher.assign():
            for item in items:
                assert isinstance(item, Judgement), "nothing else is open"
                coming = pool.actor(name).judge.remote(shared, judged, split, item.first, item.tasks)
                pool.expect(coming, name, (item,))
        for came in pool.events():
            (item, *_) = came.items
            if not isinstance(item, Judgement):
                aside(came)
            elif dispatcher.done(came.worker, item):  # of a copied one there may be two
                found[item.first] = came.value
    parts = [found[first] for first in sorted(found)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
