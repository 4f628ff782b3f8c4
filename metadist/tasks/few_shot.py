"""N-way K-shot classification episodes, sampled by counter.

Task `i` of step `t` is a pure function of (seed, split, t, i). Its classes come from one
pool: all classes of a split, or with `within_group` the classes of one group (each
language a task). A mixture of data sets picks the data set first, by weight. With
`rotate`, all examples of a class are turned by one random multiple of 90 degrees, which
makes four classes of each (Santoro et al. 2016 do so with Omniglot), anew in every episode.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from metadist.data.table import Table
from metadist.errors import DataError
from metadist.tasks.counter import Counter, below, distinct, key
from metadist.tasks.episode import Drawn, Episode, Examples

SPLITS = {"train": 0, "val": 1, "test": 2}

# Streams of one task: which draw belongs to which question.
_SOURCE, _POOL, _CLASSES, _EXAMPLES, _TURNS = range(5)


class FewShot:
    """The episodes of one split.

    tables: data sets with images of one shape; weights: their integer shares.
    Raises DataError where the classes or examples do not suffice; `keys` names the
    config section in that message.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        weights: Sequence[int],
        split: str,
        *,
        seed: int,
        ways: int,
        shots: int,
        queries: int,
        within_group: bool = False,
        rotate: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        keys: str = "task",
    ) -> None:
        self.seed, self.split, self.ways, self.shots, self.queries = seed, split, ways, shots, queries
        self.dtype, self.device = dtype, torch.device(device)
        shapes = {tuple(table.images.shape[1:]) for table in tables}
        if len(shapes) > 1:
            told = ", ".join(f"{table.name} {'×'.join(map(str, table.images.shape[1:]))}" for table in tables)
            raise DataError(f"data.name: the images of a mixture must have one shape, these have {told}")
        channels, height, width = shapes.pop()
        self.shape = (channels, height, width)
        starts, counts, sources = [], [], []
        pool_first: list[int] = []
        pool_size: list[int] = []
        pool_offset: list[int] = []
        pools: list[int] = []
        classes = 0
        self.families: list[str] = []
        for number, table in enumerate(tables):
            part = table.splits[split]
            starts.append(part.start)
            counts.append(part.count)
            sources.append(torch.full_like(part.start, number))
            groups = _pools(table, split, ways, within_group, keys)
            _check_examples(table, split, shots, queries, keys)
            pool_offset.append(len(pool_first))
            pools.append(len(groups))
            for name, first, size in groups:
                self.families.append(name)
                pool_first.append(classes + first)
                pool_size.append(size)
            classes += len(part.start)
        # On a GPU all data sets are one tensor, in which a row needs no question of whose it is.
        self._images = [table.images for table in tables]
        self._row_offset = torch.zeros(len(tables), dtype=torch.int64, device=self.device)
        if self.device.type != "cpu":
            rows = torch.tensor([0, *(len(table.images) for table in tables[:-1])])
            self._images, self._row_offset = [torch.cat(self._images).to(self.device)], rows.cumsum(0).to(self.device)
        self.classes = classes
        self._start, self._count, self._source = (torch.cat(x).to(self.device) for x in (starts, counts, sources))
        self._pool_first, self._pool_size, self._pool_offset, self._pools, self._lots = (
            torch.tensor(x, device=self.device)
            for x in (pool_first, pool_size, pool_offset, pools, list(accumulate(weights)))
        )
        # A number on the device: by one of the host a GPU multiplies with its inverse, which a CPU does not.
        self._white = torch.tensor(255, dtype=dtype, device=self.device)
        self._labels = torch.arange(ways, device=self.device)
        self._turned = _turned(height, width).to(self.device) if rotate else None

    def indices(self, step: Counter, first: Counter, tasks: int) -> tuple[Tensor, Tensor]:
        """Classes and table rows of tasks first … first+tasks−1, int64.

        Shapes [tasks, ways] and [tasks, ways, shots + queries].
        """
        drawn = self.draw(step, first, tasks)
        return drawn["classes"], drawn["rows"]

    def draw(self, step: Counter, first: Counter, tasks: int) -> Drawn:
        """Of tasks first … first+tasks−1 of a meta-step, int64: classes [tasks, ways]; rows of their tables,
        [tasks, ways, shots + queries]; the pool, [tasks], that the classes come from; with `rotate` quarter turns of
        each class, [tasks, ways], in [0, 4).

        step, first: numbers, or int64 scalars on the device, for which nothing is copied to it or from it; or step
        int64 [steps, 1], for the tasks of several steps, one step's behind the other's.
        """
        task = self._keys(step, first, tasks)
        pool = self._pool(task)
        size = self._pool_size[pool]
        classes = self._pool_first[pool][:, None] + distinct(key_of(task, _CLASSES), size, self.ways)
        way = torch.arange(self.ways, device=self.device)
        example = key_of(key_of(task, _EXAMPLES)[:, None], way).flatten()
        amount = self.shots + self.queries
        rows = distinct(example, self._count[classes.flatten()], amount)
        rows = self._start[classes][..., None] + rows.view(*classes.shape, amount)
        turned = {"turns": below(key_of(task, _TURNS)[:, None], way, 4)} if self._turned is not None else {}
        return {"classes": classes, "rows": rows, "pool": pool} | turned

    def _pool(self, task: Tensor) -> Tensor:
        """Which one each task's classes come from; where there is only one, nothing is drawn."""
        if len(self.families) == 1:
            return torch.zeros_like(task)
        lot = below(key_of(task, _SOURCE), 0, self._lots[-1])
        source = torch.searchsorted(self._lots, lot, right=True)
        return self._pool_offset[source] + below(key_of(task, _POOL), 0, self._pools[source])

    def sample(self, step: Counter, first: Counter, tasks: int) -> Episode:
        """Tasks first … first+tasks−1 of a meta-step as one batch with a leading task axis, as `draw` draws them."""
        return self.show(self.draw(step, first, tasks))

    def show(self, drawn: Drawn) -> Episode:
        """The tasks that were drawn.

        support.x: [tasks, ways·shots, channels, height, width] in [0, 1], of `dtype`;
        query likewise; the examples stand shot by shot.
        """
        classes, tasks = drawn["classes"], len(drawn["classes"])
        rows = drawn["rows"].transpose(1, 2)  # shot by shot
        x = self._pixels(classes, rows)
        if self._turned is not None:
            x = (
                x.flatten(-2)
                .gather(-1, self._turned[drawn["turns"]][:, None, :, None].expand(*x.shape[:-2], -1))
                .view_as(x)
            )
        y = self._labels.expand(tasks, self.shots + self.queries, self.ways)
        cut = self.shots
        return Episode(
            Examples(x[:, :cut].flatten(1, 2), y[:, :cut].flatten(1, 2)),
            Examples(x[:, cut:].flatten(1, 2), y[:, cut:].flatten(1, 2)),
            classes,
            drawn["pool"],
        )

    def _keys(self, step: Counter, first: Counter, tasks: int) -> Tensor:
        number = first + torch.arange(tasks, device=self.device)
        return key(self.seed, SPLITS[self.split], step, number, device=self.device).flatten()

    def _pixels(self, classes: Tensor, rows: Tensor) -> Tensor:
        """classes: [tasks, ways]; rows: [tasks, …, ways] of their tables."""
        if len(self._row_offset) == 1:
            picked = self._images[0][rows]
        else:
            source = self._source[classes][:, None].expand_as(rows)
            if len(self._images) == 1:
                picked = self._images[0][rows + self._row_offset[source]]
            else:
                picked = torch.empty(*rows.shape, *self.shape, dtype=torch.uint8, device=self.device)
                for number, images in enumerate(self._images):
                    here = source == number
                    picked[here] = images[rows[here]]
        return picked.to(self.dtype) / self._white


def _turned(height: int, width: int) -> Tensor:
    """Which pixel comes where after 0 to 3 quarter turns, int64 [4, height · width]."""
    if height != width:
        raise DataError(f"task.rotate: a quarter turn needs square images, these are {height} × {width}")
    pixels = torch.arange(height * width).view(height, width)
    return torch.stack([torch.rot90(pixels, turns).flatten() for turns in range(4)])


def key_of(keys: Tensor, coordinate: int | Tensor) -> Tensor:
    """The keys of a sub-stream."""
    return key(0, keys, coordinate, device=keys.device)


def _pools(table: Table, split: str, ways: int, within_group: bool, keys: str) -> list[tuple[str, int, int]]:
    """(name, first class, classes) of every pool that can fill an episode."""
    part = table.splits[split]
    if not within_group:
        if ways > len(part.start):
            raise DataError(
                f"{keys}.ways: {ways} ways, but meta-{split} of {table.name} has {len(part.start)} classes; "
                f"at most {len(part.start)} is valid"
            )
        return [(table.name, 0, len(part.start))]
    pools = [(name, first, size) for name, first, size in part.groups if size >= ways]
    if not pools:
        largest = max(size for _, _, size in part.groups)
        raise DataError(
            f"{keys}.ways: {ways} ways, but no group of meta-{split} of {table.name} has more than {largest} classes; "
            f"at most {largest} is valid with task.within_group"
        )
    return pools


def _check_examples(table: Table, split: str, shots: int, queries: int, keys: str) -> None:
    fewest = int(table.splits[split].count.min())
    if shots + queries > fewest:
        raise DataError(
            f"{keys}.shots + {keys}.queries: {shots} + {queries} examples per class, but a class in meta-{split} of "
            f"{table.name} has {fewest}; at most {fewest} together is valid"
        )
