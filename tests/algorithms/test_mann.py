"""MANN against its formulas, step by step and head by head; its symmetries; that it learns."""

import pytest
import torch
import torch.nn.functional as F
from metric_checks import IMAGES, check_queries_are_independent, configured, error_of_sums, prepared
from plain_reference import network, stored
from tiny_clusters import Clusters

from metadist.algorithms.mann import shuffled
from metadist.errors import ConfigError

WORD = (1 << 64) - 1
READS, SLOTS, CELL, HIDDEN = 2, 7, 5, 6
METHOD = {"name": "mann", "hidden": HIDDEN, "slots": SLOTS, "cell": CELL, "reads": READS, "sharpness": 3.0}


# --- the paper's formulas --------------------------------------------------------


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def order(size, step, classes, stream):
    drawn = mix(0)
    for word in (stream, step, *classes.tolist()):
        drawn = mix(drawn ^ word)
    signed = [value - (1 << 64) if value >> 63 else value for value in (mix((drawn + i) & WORD) for i in range(size))]
    return sorted(range(size), key=signed.__getitem__)


def run(config, theta, xs, ys, without=""):
    """Logits of every step of a sequence; `without` leaves a part of the method out. A label of -1 is none."""
    algorithm, ways = config.algorithm, config.task.ways
    h, c = torch.zeros(HIDDEN, dtype=torch.float64), torch.zeros(HIDDEN, dtype=torch.float64)
    memory = [torch.zeros(CELL, dtype=torch.float64) for _ in range(SLOTS)]
    usage = torch.arange(SLOTS, dtype=torch.float64) * 1e-3 / SLOTS
    before = [torch.zeros(SLOTS, dtype=torch.float64) for _ in range(READS)]
    read, label, told = torch.zeros(READS * CELL, dtype=torch.float64), torch.zeros(ways, dtype=torch.float64), []
    for x, y in zip(xs, ys, strict=True):
        if (without == "late label") != (algorithm.labels == "beside"):
            label = (torch.arange(ways) == y).double()
        inputs = torch.cat([x, label, read])
        gates = inputs @ theta["lstm.input"] + h @ theta["lstm.recurrent"] + theta["lstm.bias"]
        i, f, g, o = gates.split(HIDDEN)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        keys = (h @ theta["key.weight"] + theta["key.bias"]).tanh().split(CELL)
        least = sorted(range(SLOTS), key=lambda slot: float(usage[slot]))[:READS]
        emptied = torch.tensor([1.0 if slot in least else 0.0 for slot in range(SLOTS)], dtype=torch.float64)
        weights, reads = [], []
        for key in keys:
            size = (key @ key + 1e-8).sqrt()
            cosine = torch.stack([key @ cell / size / (cell @ cell + 1e-8).sqrt() for cell in memory])
            weights.append((0 * cosine if without == "addressing" else algorithm.sharpness * cosine).softmax(0))
            reads.append(sum(w * cell for w, cell in zip(weights[-1], memory, strict=True)))
        read = torch.cat(reads) * (without != "reading")
        told.append(torch.cat([h, read]) @ theta["classifier.weight"] + theta["classifier.bias"])
        writes = []
        for head in range(READS):
            alpha = theta["write.alpha"][head].sigmoid()
            used = 0 * emptied if without == "least used" else emptied
            writes.append(used if without == "gate" else alpha * before[head] + (1 - alpha) * used)
        kept = [0.0 if slot in least and without != "erasing" else 1.0 for slot in range(SLOTS)]
        memory = [
            kept[slot] * memory[slot] + sum(write[slot] * key for write, key in zip(writes, keys, strict=True))
            for slot in range(SLOTS)
        ]
        decay = 0.0 if without == "decay" else algorithm.decay
        usage = (decay * usage + sum(weights) + sum(writes)).detach()
        before, label = weights, (torch.arange(ways) == y).double()
    return torch.stack(told)


def plain(config, theta, episode, how, without=""):
    support, seen = network(config.model, theta, episode.support.x)
    queries, seen_too = network(config.model, theta, episode.query.x, seen if how == "support" else None)
    first, then = (order(len(x), 0, episode.classes, stream) for stream, x in enumerate((support, queries)))
    one, two = stored(seen), stored(seen_too)
    statistics = {name: (one[name] + two[name]) / 2 for name in one}
    if config.algorithm.labels == "beside":
        y = [*episode.support.y[first], -1]
        told = torch.stack([run(config, theta, [*support[first], query], y, without)[-1] for query in queries])
        return F.cross_entropy(told, episode.query.y), told, statistics
    y = torch.cat([episode.support.y[first], episode.query.y[then]])
    told = run(config, theta, torch.cat([support[first], queries[then]]), y, without)
    back = [then.index(query) for query in range(len(queries))]
    return F.cross_entropy(told, y), told[len(support) :][back], statistics


@pytest.mark.parametrize("how", ["together", "support", "running"])
@pytest.mark.parametrize("model", ["stride2", "mlp"])
@pytest.mark.parametrize("labels", ["late", "beside"])
def test_loss_gradient_and_statistics(labels, model, how):
    assert error_of_sums(configured({**METHOD, "labels": labels}, model, how), IMAGES[model], plain) < 1e-12


PARTS = ("late label", "addressing", "reading", "least used", "gate", "erasing", "decay")


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_the_method_is_there(part):
    """Without it the formula gives another gradient. Few slots, so that they are used again."""
    config = configured({**METHOD, "decay": 0.5}, "mlp", shots=3)
    assert error_of_sums(config, IMAGES["mlp"], plain, tasks=1) < 1e-12
    assert error_of_sums(config, IMAGES["mlp"], lambda *a: plain(*a, without=part), tasks=1) > 1e-4


# --- at test -------------------------------------------------------------------


@pytest.mark.parametrize("model", ["stride2", "mlp"])
@pytest.mark.parametrize("labels", ["late", "beside"])
def test_each_query_is_the_step_behind_the_support_set(labels, model):
    config = configured({**METHOD, "labels": labels}, model, "support")
    algorithm, theta, state, (support, query, *_) = prepared(config, model)
    features, seen = network(config.model, theta, support.x)
    queries, _ = network(config.model, theta, query.x, seen)
    found = algorithm.adapt(theta, state, support, 4)(query.x)
    for one, logits in zip(queries, found, strict=True):
        told = run(config, theta, torch.cat([features, one[None]]), [*support.y, torch.tensor(-1)])[-1]
        assert (told - logits).abs().max() < 1e-12


@pytest.mark.parametrize("how", ["together", "support", "running"])
@pytest.mark.parametrize("model", ["stride2", "mlp"])
def test_queries_are_independent(model, how):
    check_queries_are_independent(configured(METHOD, model, how), model)


def test_renaming_the_classes_with_their_weights_renames_the_answers():
    """The labels' rows of the controller's input and the classifier's columns go with the classes. The order of the
    support set is part of the input of a sequence model, and stays."""
    algorithm, theta, state, (support, query, *_) = prepared(configured(METHOD, "mlp"), "mlp")
    new = torch.tensor([2, 0, 3, 1])  # class k is now called new[k]
    labels = theta["lstm.input"].shape[0] - 4 - READS * CELL
    renamed = {name: value.clone() for name, value in theta.items()}
    renamed["lstm.input"][labels + new] = theta["lstm.input"][labels : labels + 4]
    for name in ("classifier.weight", "classifier.bias"):
        renamed[name][..., new] = theta[name]
    before = algorithm.adapt(theta, state, support, 4)(query.x)
    after = algorithm.adapt(renamed, state, support._replace(y=new[support.y]), 4)(query.x)
    assert (after[:, new] - before).abs().max() < 1e-10
    assert (algorithm.adapt(theta, state, support._replace(y=new[support.y]), 4)(query.x) - before).abs().max() > 1e-4


def test_the_order_of_the_training_sequence_changes_with_step_and_classes():
    classes = torch.tensor([7, 3, 11])
    first = shuffled(30, 0, classes, 0)
    assert sorted(first.tolist()) == list(range(30))
    assert first.tolist() == order(30, 0, classes, 0)
    for other in (shuffled(30, 1, classes, 0), shuffled(30, 0, classes + 1, 0), shuffled(30, 0, classes, 1)):
        assert not torch.equal(first, other)


def test_other_ways_and_a_memory_too_small_are_refused():
    with pytest.raises(ConfigError, match=r"eval\.ways: mann learns a head of task\.ways=4 classes"):
        configured(METHOD, "mlp").with_values(eval={"ways": 3})
    with pytest.raises(ConfigError, match=r"algorithm\.slots: 2 slots, of which every step empties reads=2"):
        configured({**METHOD, "slots": 2})


@pytest.mark.parametrize("labels", ["late", "beside"])
def test_it_learns(labels):
    """2-way 1-shot from 0.50 to over 0.70 in 150 meta-steps of 64 tasks."""
    config = configured(
        {"name": "mann", "hidden": 24, "slots": 16, "cell": 8, "sharpness": 10.0, "labels": labels}, "mlp", "support",
        ways=2, shots=1, queries=2, width=16, layers=1, norm="none",
    )  # fmt: skip
    config = config.with_values(engine={"dtype": "float32"})
    problem = Clusters(untold=0)
    assert problem.accuracy(config, *problem.initial(config)) < 0.6
    assert problem.accuracy(config, *problem.trained(config, 150, 2e-2, 64)) > 0.7
