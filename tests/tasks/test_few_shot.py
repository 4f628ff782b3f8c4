"""Episodes against an independent implementation of the documented rule, and what they promise."""

from pathlib import Path

import pytest
import torch

from metadist.config import Config, validate
from metadist.data.table import Split, Table
from metadist.errors import DataError
from metadist.tasks.few_shot import FewShot
from metadist.tasks.samplers import evaluation_tasks, training_tasks

WORD = (1 << 64) - 1
TRAIN = [("greek", [6, 8, 7]), ("latin", [9, 6]), ("runic", [6, 6, 10, 6])]
"""Groups with the number of examples of each class."""


def make_table(name="letters", shape=(1, 4, 3), train=TRAIN, val=(("cyrillic", [6] * 5),), test=(("thai", [8] * 4),)):
    """Image r of a table is filled with r and r // 256, so that a pixel names its row."""
    splits, row = {}, 0
    for split, groups in (("train", train), ("val", val), ("test", test)):
        start, count, spans = [], [], []
        for group, sizes in groups:
            spans.append((group, len(start), len(sizes)))
            for size in sizes:
                start.append(row)
                count.append(size)
                row += size
        classes = [f"{split}{c}" for c in range(len(start))]
        splits[split] = Split(torch.tensor(start), torch.tensor(count), classes, spans)
    images = torch.arange(row).to(torch.uint8)[:, None, None, None].expand(row, *shape).contiguous()
    return Table(name, images, splits, "0" * 64, Path("nowhere"))


def few_shot(*tables, weights=None, split="train", seed=5, ways=3, shots=2, queries=3, **more):
    tables = tables or (make_table(),)
    return FewShot(
        tables, weights or [1] * len(tables), split, seed=seed, ways=ways, shots=shots, queries=queries, **more
    )


# --- the rule ------------------------------------------------------------------


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def chain(*words):
    state = mix(words[0])
    for word in words[1:]:
        state = mix(state ^ word)
    return state


def draw(key, number, bound):
    return (mix((key + number) & WORD) >> 32) * bound >> 32


def shuffled(key, size, amount):
    deck = list(range(size))
    for position in range(amount):
        other = position + draw(key, position, size - position)
        deck[position], deck[other] = deck[other], deck[position]
    return deck[:amount]


def episode_by_rule(tables, weights, split, seed, ways, amount, within_group, step, number):
    """(data set, classes, rows) of one task, on Python's integers."""
    task = chain(seed, ("train", "val", "test").index(split), step, number)
    lot = draw(chain(0, task, 0), 0, sum(weights))
    source = 0
    while lot >= sum(weights[: source + 1]):
        source += 1
    part = tables[source].splits[split]
    pools = [(0, len(part.start))]
    if within_group:
        pools = [(first, size) for _, first, size in part.groups if size >= ways]
    first, size = pools[draw(chain(0, task, 1), 0, len(pools))]
    classes = [first + c for c in shuffled(chain(0, task, 2), size, ways)]
    rows = []
    for way, c in enumerate(classes):
        of_way = chain(0, chain(0, task, 3), way)
        rows.append([int(part.start[c]) + r for r in shuffled(of_way, int(part.count[c]), amount)])
    return source, classes, rows


@pytest.mark.parametrize("within_group", [False, True])
@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("mixture", [False, True])
def test_equals_an_independent_implementation(split, within_group, mixture):
    tables = [make_table()]
    weights = [1]
    if mixture:
        tables.append(make_table("others", train=[("a", [7] * 6)], val=[("b", [9] * 3)], test=[("c", [6] * 8)]))
        weights = [2, 3]
    sampler = few_shot(*tables, weights=weights, split=split, within_group=within_group)
    before = [0, len(tables[0].splits[split].start)]  # classes of a mixture are numbered through
    for step in (0, 1, 1000):
        classes, rows = sampler.indices(step, 4, 30)
        for i in range(30):
            source, expected, expected_rows = episode_by_rule(
                tables, weights, split, 5, 3, 5, within_group, step, 4 + i
            )
            assert classes[i].tolist() == [before[source] + c for c in expected]
            assert rows[i].tolist() == expected_rows


# --- promises ------------------------------------------------------------------


def test_a_task_is_the_same_whatever_batch_it_is_sampled_in():
    sampler = few_shot()
    whole = sampler.sample(7, 0, 12)
    for first, tasks in [(0, 1), (3, 4), (11, 1), (5, 7)]:
        part = sampler.sample(7, first, tasks)
        for side in (0, 1):
            assert torch.equal(part[side].x, whole[side].x[first : first + tasks])
            assert torch.equal(part[side].y, whole[side].y[first : first + tasks])
    sampler.sample(3, 0, 5)
    assert torch.equal(sampler.sample(7, 0, 12).support.x, whole.support.x)  # no generator is carried along


def test_seeds_steps_splits_and_tasks_differ():
    base = few_shot().indices(3, 0, 8)[1]
    same_classes = make_table(train=TRAIN, val=TRAIN)
    assert not torch.equal(few_shot(seed=6).indices(3, 0, 8)[1], base)
    assert not torch.equal(few_shot().indices(4, 0, 8)[1], base)
    assert not torch.equal(few_shot().indices(3, 8, 8)[1], base)
    rows = [few_shot(same_classes, split=split).indices(3, 0, 8)[0] for split in ("train", "val")]
    assert not torch.equal(*rows)
    assert len({tuple(map(tuple, task)) for task in few_shot().indices(0, 0, 200)[1].tolist()}) == 200


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_extreme_seeds(seed):
    classes, rows = few_shot(seed=seed).indices(2**40, 2**40, 3)
    assert episode_by_rule([make_table()], [1], "train", seed, 3, 5, False, 2**40, 2**40)[1] == classes[0].tolist()
    assert (rows >= 0).all()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_classes_and_examples_are_distinct_and_belong_together(split):
    table = make_table()
    part = table.splits[split]
    classes, rows = few_shot(table, split=split, ways=4).indices(1, 0, 100)
    for task, of_task in zip(classes.tolist(), rows.tolist(), strict=True):
        assert len(set(task)) == 4
        for c, examples in zip(task, of_task, strict=True):
            assert len(set(examples)) == 5  # support and queries never share one
            start, count = int(part.start[c]), int(part.count[c])
            assert all(start <= row < start + count for row in examples)


def test_the_layout_of_an_episode():
    sampler = few_shot(dtype=torch.float64)
    _, rows = sampler.indices(2, 0, 6)
    support, query, *_ = sampler.sample(2, 0, 6)
    assert support.x.shape == (6, 6, 1, 4, 3)
    assert query.x.shape == (6, 9, 1, 4, 3)
    assert support.x.dtype == torch.float64
    # Shot by shot: the first `ways` examples hold one of each class.
    assert support.y[0].tolist() == [0, 1, 2, 0, 1, 2]
    assert query.y[5].tolist() == [0, 1, 2] * 3
    for task in range(6):
        shown = (support.x[task, :, 0, 0, 0] * 255).round().long().tolist()
        assert shown == [int(rows[task, way, shot]) % 256 for shot in range(2) for way in range(3)]
        shown = (query.x[task, :, 0, 3, 2] * 255).round().long().tolist()
        assert shown == [int(rows[task, way, shot]) % 256 for shot in range(2, 5) for way in range(3)]


def test_pixels_are_in_zero_to_one():
    table = make_table()
    table.images[:] = 255
    assert (few_shot(table).sample(0, 0, 2).query.x == 1).all()
    assert few_shot(table).sample(0, 0, 2).query.x.dtype == torch.float32


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def test_classes_and_examples_are_equally_frequent():
    """9 classes and up to 10 examples each: the bounds are beyond one in a million."""
    table = make_table()
    tasks = 6000
    classes, rows = few_shot(table).indices(0, 0, tasks)
    assert chi_square(torch.bincount(classes.flatten(), minlength=9).double(), tasks * 3 / 9) < 45
    for position in range(3):  # every position of an episode, too
        assert chi_square(torch.bincount(classes[:, position], minlength=9).double(), tasks / 9) < 45
    part = table.splits["train"]
    for c in range(9):
        mine = rows[classes == c] - part.start[c]
        for slot in (0, 4):
            counts = torch.bincount(mine[:, slot], minlength=int(part.count[c])).double()
            assert chi_square(counts, len(mine) / int(part.count[c])) < 50


def test_within_group_episodes_stay_within_one_group():
    table = make_table()
    classes, _ = few_shot(table, within_group=True).indices(0, 0, 4000)
    spans = {"greek": range(0, 3), "runic": range(5, 9)}  # latin has 2 classes, too few for 3 ways
    counts = dict.fromkeys(spans, 0)
    for task in classes.tolist():
        (group,) = [name for name, span in spans.items() if all(c in span for c in task)]
        counts[group] += 1
    assert abs(counts["greek"] - 2000) < 5 * 32  # groups are equally likely, whatever their size
    mixed, _ = few_shot(table).indices(0, 0, 100)
    assert any(len({c < 3 for c in task}) > 1 for task in mixed.tolist())


def test_a_mixture_respects_its_weights():
    one, two = make_table("one"), make_table("two", train=[("a", [6] * 4)])
    two.images[:] = 200
    sampler = few_shot(one, two, weights=[1, 3])
    classes, _ = sampler.indices(0, 0, 4000)
    second = classes >= 9
    assert (second.all(1) | ~second.any(1)).all()  # an episode comes from one data set
    assert abs(int(second[:, 0].sum()) - 3000) < 5 * 28
    support, query, *_ = sampler.sample(0, 0, 4000)
    of_two = ((support.x * 255).round() == 200).flatten(1).all(1) & ((query.x * 255).round() == 200).flatten(1).all(1)
    assert torch.equal(of_two, second[:, 0])


def test_a_mixture_shows_the_images_of_its_own_tables():
    one, two = make_table("one"), make_table("two", train=[("a", [6] * 4)])
    two.images[:] = 255 - two.images
    sampler = few_shot(one, two, weights=[1, 1])
    classes, rows = sampler.indices(0, 0, 50)
    support = sampler.sample(0, 0, 50).support
    for task in range(50):
        images = two.images if classes[task, 0] >= 9 else one.images
        expected = [int(images[rows[task, way, shot], 0, 0, 0]) for shot in range(2) for way in range(3)]
        assert (support.x[task, :, 0, 0, 0] * 255).round().long().tolist() == expected


# --- what cannot be sampled ----------------------------------------------------


def refused(*tables, **arguments):
    with pytest.raises(DataError) as error:
        few_shot(*tables, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_more_ways_than_classes():
    few_shot(ways=9)
    message = refused(ways=10)
    assert message.startswith("task.ways: 10 ways")
    assert "meta-train of letters has 9 classes" in message
    assert "at most 9" in message
    assert refused(split="test", ways=5, keys="eval").startswith("eval.ways: 5 ways, but meta-test of letters has 4")


def test_more_ways_than_the_largest_group_has():
    few_shot(ways=4, within_group=True)
    message = refused(ways=5, within_group=True)
    assert message.startswith("task.ways: 5 ways")
    assert "at most 4" in message


def test_more_examples_than_a_class_has():
    few_shot(shots=1, queries=5)
    message = refused(shots=2, queries=5)
    assert message.startswith("task.shots + task.queries: 2 + 5")
    assert "has 6" in message
    assert "at most 6" in message


def test_any_data_set_of_a_mixture_may_be_the_one():
    small = make_table("small", train=[("a", [6, 6])])
    assert "meta-train of small has 2 classes" in refused(make_table(), small)


def test_different_shapes_do_not_mix():
    message = refused(make_table(), make_table("large", shape=(3, 4, 3)))
    assert message.startswith("data.name: ")
    assert "letters 1×4×3, large 3×4×3" in message


# --- from a config -------------------------------------------------------------


def test_what_eval_leaves_open_is_the_tasks():
    config = Config().with_values(task={"ways": 3, "shots": 2, "queries": 1}, eval={"queries": 4})
    train = training_tasks(config, [make_table()], "cpu")
    judged = evaluation_tasks(config, [make_table()], "test", "cpu")
    assert (train.ways, train.shots, train.queries, train.split) == (3, 2, 1, "train")
    assert (judged.ways, judged.shots, judged.queries, judged.split) == (3, 2, 4, "test")


def test_the_message_names_the_section_that_asks_for_too_much():
    config = validate({"algorithm": {"name": "protonet"}, "task": {"ways": 3}, "eval": {"ways": 5}}, "test")
    training_tasks(config, [make_table()], "cpu")
    with pytest.raises(DataError, match=r"^eval\.ways: 5"):
        evaluation_tasks(config, [make_table()], "test", "cpu")
    with pytest.raises(DataError, match=r"^task\.ways: 12"):
        training_tasks(Config().with_values(task={"ways": 12}), [make_table()], "cpu")


# --- rotation ------------------------------------------------------------------


def square_table():
    table = make_table(shape=(1, 4, 4))
    table.images[:] = torch.randint(0, 256, table.images.shape, generator=torch.Generator().manual_seed(0)).byte()
    return table


def test_with_rotate_each_class_is_turned_as_a_whole():
    table = square_table()
    still, turning = few_shot(table), few_shot(table, rotate=True)
    assert torch.equal(still.indices(3, 2, 10)[1], turning.indices(3, 2, 10)[1])
    plain, turned, turns = still.sample(3, 2, 10), turning.sample(3, 2, 10), turning.draw(3, 2, 10)["turns"]
    for side in (0, 1):
        for task in range(10):
            for x, y, expected in zip(turned[side].x[task], turned[side].y[task], plain[side].x[task], strict=True):
                assert torch.equal(x, torch.rot90(expected, int(turns[task, y]), (1, 2)))


def test_turns_follow_the_rule_and_are_equally_likely():
    sampler = few_shot(square_table(), rotate=True)
    turns = sampler.draw(7, 4, 5000)["turns"]
    for i in (0, 1, 77):
        stream = chain(0, chain(5, 0, 7, 4 + i), 4)
        assert turns[i].tolist() == [draw(stream, way, 4) for way in range(3)]
    for way in range(3):
        assert chi_square(torch.bincount(turns[:, way], minlength=4).double(), 5000 / 4) < 35
    assert chi_square(torch.bincount(turns[:, 0] * 4 + turns[:, 1], minlength=16).double(), 5000 / 16) < 60


def test_only_training_rotates():
    config = Config().with_values(task={"ways": 3, "rotate": True})
    table = square_table()
    still = few_shot(table, split="test", seed=0, shots=1, queries=1).sample(0, 0, 8)
    assert torch.equal(evaluation_tasks(config, [table], "test", "cpu").sample(0, 0, 8).query.x, still.query.x.float())
    still = few_shot(table, seed=0, shots=1, queries=1).sample(0, 0, 8)
    assert not torch.equal(training_tasks(config, [table], "cpu").sample(0, 0, 8).query.x, still.query.x.float())


def test_only_squares_can_be_turned():
    assert refused(rotate=True).startswith("task.rotate: a quarter turn needs square images, these are 4 × 3")
