"""The config tree: what it refuses and how it says so, overrides, rules behind `auto`, round trips."""

from pathlib import Path

import pytest
import yaml

from metadist import config as module
from metadist.config import (
    FREE_ON_RESUME,
    Config,
    algorithm_names,
    apply_overrides,
    default_shard,
    find_job,
    flatten,
    load,
    mathematics,
    packaged_jobs,
    read_yaml,
    refuse_changed_mathematics,
    resolve,
    to_yaml,
    validate,
)
from metadist.errors import ConfigError
from metadist.methods import Maml, ProtoNet, Reptile


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(module, "visible_gpus", lambda: 0)


@pytest.fixture
def job(tmp_path):
    def write(text):
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    return write


def config_of(*words):
    """From overrides alone; the method is MAML where no word says otherwise."""
    return validate(apply_overrides({"algorithm": {"name": "maml"}}, words), "job.yaml")


def refusal(*words):
    with pytest.raises(ConfigError) as error:
        config_of(*words)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("job.yaml: ")
    return message.removeprefix("job.yaml: ")


# --- keys ----------------------------------------------------------------------


@pytest.mark.parametrize(("word", "key", "nearest"), [
    ("sed=1", "sed", "seed"),
    ("tasks.ways=5", "tasks", "task"),
    ("task.way=5", "task.way", "task.ways"),
    ("task.metabatch=5", "task.metabatch", "task.meta_batch"),
    ("model.nam=mlp", "model.nam", "model.name"),
    ("algorithm.inner_step=3", "algorithm.inner_step", "algorithm.inner_steps"),
    ("outer.optimiser=sgd", "outer.optimiser", "outer.optimizer"),
    ("engine.thread=2", "engine.thread", "engine.threads"),
    ("outer.compresion=int8", "outer.compresion", "outer.compression"),
    ("outer.local={steps: 2, replicas: 2, replica: 3}", "outer.local.replica", "outer.local.replicas"),
    ("cluster.worker=2", "cluster.worker", "cluster.workers"),
    ("checkpoint.evry=2", "checkpoint.evry", "checkpoint.every"),
    ("eval.episode=2", "eval.episode", "eval.episodes"),
    ("tracking.url=x", "tracking.url", "tracking.uri"),
    ("data.splits=x", "data.splits", "data.split"),
])  # fmt: skip
def test_an_unknown_key_is_named_with_the_nearest_valid_one(word, key, nearest):
    assert refusal(word) == f"unknown key {key}; did you mean {nearest}?"


def test_an_unknown_key_that_resembles_none_gets_them_all():
    message = refusal("checkpoint.zzz=1")
    assert message == "unknown key checkpoint.zzz; valid: checkpoint.every, checkpoint.grace, checkpoint.keep"


def test_keys_of_other_methods_are_unknown():
    for name, key in [("reptile", "order=1"), ("protonet", "inner_lr=0.1"), ("maml", "temperature=2")]:
        message = refusal(f"algorithm.name={name}", f"algorithm.{key}")
        assert message.startswith(f"unknown key algorithm.{key.split('=')[0]}; ")
        assert name not in message.split(";")[0]


def test_an_unknown_key_inside_a_list_of_data_sets():
    message = refusal("data.name=[{name: glyphs, wieght: 2}]")
    assert message == "unknown key data.name.0.wieght; did you mean data.name.0.weight?"


def test_an_unknown_key_in_also():
    message = refusal("eval.also=[{}, {query: 3}]")
    assert message == "eval.also.1: unknown key query; did you mean queries?"
    assert "unknown key every" in refusal("eval.also=[{every: 3}]")


# --- values --------------------------------------------------------------------


@pytest.mark.parametrize(("word", "key"), [
    ("seed=-1", "seed"), ("seed=x", "seed"), ("seed=9223372036854775808", "seed"), ("seed=1.5", "seed"),
    ("task.ways=1", "task.ways"), ("task.shots=0", "task.shots"), ("task.shots=two", "task.shots"),
    ("task.shots=1.5", "task.shots"), ("task.shots=[1]", "task.shots"), ("task.shots=null", "task.shots"),
    ("task.shots=true", "task.shots"), ("task.shard=0", "task.shard"), ("task.shard=many", "task.shard"),
    ("task.transductive=maybe", "task.transductive"), ("task=5", "task"), ("task=null", "task"),
    ("model.name=resnet", "model.name"), ("model.norm=3", "model.norm"), ("model=[1]", "model"),
    ("algorithm.inner_lr=0", "algorithm.inner_lr"), ("algorithm.inner_lr=-1", "algorithm.inner_lr"),
    ("algorithm.inner_lr=.nan", "algorithm.inner_lr"), ("algorithm.inner_lr=.inf", "algorithm.inner_lr"),
    ("algorithm.inner_lr=fast", "algorithm.inner_lr"), ("algorithm.inner_lr=true", "algorithm.inner_lr"),
    ("algorithm.order=3", "algorithm.order"), ("algorithm.inner_steps=-1", "algorithm.inner_steps"),
    ("algorithm.support_loss_weight=-0.1", "algorithm.support_loss_weight"),
    ("outer.lr=0", "outer.lr"), ("outer.steps=0", "outer.steps"), ("outer.momentum=1", "outer.momentum"),
    ("outer.clip=0", "outer.clip"), ("outer.schedule=step", "outer.schedule"),
    ("outer.compression=zip", "outer.compression"), ("outer.nesterov=3", "outer.nesterov"),
    ("outer.local=5", "outer.local"), ("outer.local.steps=2", "outer.local.replicas"),
    ("outer.local={steps: 0, replicas: 2}", "outer.local.steps"),
    ("outer.local={steps: 2, replicas: 0}", "outer.local.replicas"),
    ("outer.local={steps: 2, replicas: 2, lr: 0}", "outer.local.lr"),
    ("engine.mode=fast", "engine.mode"), ("engine.device=tpu", "engine.device"), ("engine.dtype=half", "engine.dtype"),
    ("engine.threads=0", "engine.threads"), ("cluster.workers=-1", "cluster.workers"),
    ("cluster.gpus=-1", "cluster.gpus"), ("cluster.timeout=0", "cluster.timeout"),
    ("cluster.address=7", "cluster.address"),
    ("checkpoint.every=0", "checkpoint.every"), ("checkpoint.keep=2", "checkpoint.keep"),
    ("eval.episodes=0", "eval.episodes"), ("eval.ways=1", "eval.ways"), ("eval.also=3", "eval.also"),
    ("eval.also=[3]", "eval.also.0"), ("eval.also=[{queries: many}]", "eval.also.0.queries"),
    ("data.name=3", "data.name"), ("data.name=[{weight: 1}]", "data.name.0.name"),
    ("data.name=[{name: glyphs, weight: 0}]", "data.name.0.weight"), ("tracking.uri=3", "tracking.uri"),
])  # fmt: skip
def test_a_wrong_value_is_refused_under_its_key(word, key):
    assert refusal(word).startswith(f"{key}: ")


@pytest.mark.parametrize(("word", "told"), [
    ("model.name=resnet", "'stride2', 'conv4', 'conv4-fc', 'resnet12' or 'mlp'"),
    ("task.ways=1", "greater than or equal to 2, not 1"),
    ("seed=x", "valid integer"),
    ("engine.threads=0", "greater than or equal to 1, not 0"),
])  # fmt: skip
def test_what_would_be_valid_is_said(word, told):
    assert told in refusal(word)


@pytest.mark.parametrize(("name", "nearest"), [("mamll", "maml"), ("prototypes", "protonet"), ("reptil", "reptile")])
def test_an_unknown_method_with_the_nearest(name, nearest):
    assert refusal(f"algorithm.name={name}") == f"algorithm.name: '{name}' is no method; did you mean {nearest}?"


METHODS = [
    "maml", "anil", "boil", "reptile", "meta-sgd", "maml++", "imaml", "protonet", "matching", "siamese", "relation",
    "mann", "metanet", "lstm-optimizer", "lstm-learner", "r2d2", "task-conditioned", "scratch", "baseline++",
]  # fmt: skip


def test_an_unknown_method_with_all_of_them():
    assert refusal("algorithm.name=xyz").endswith(f"valid: {', '.join(sorted(METHODS))}")
    assert algorithm_names() == METHODS


def test_a_method_without_a_name():
    message = refusal("algorithm={inner_lr: 0.1}")
    assert message.startswith("algorithm.name: ")
    assert message.endswith(f"valid: {', '.join(sorted(METHODS))}")


# --- combinations --------------------------------------------------------------


@pytest.mark.parametrize(("words", "key", "told"), [
    (["task.meta_batch=10", "task.shard=4"], "task.shard", "4 does not divide task.meta_batch=10"),
    (["outer.schedule=halving"], "outer.halve_every", "outer.schedule=halving"),
    (["outer.halve_every=10"], "outer.halve_every", "outer.schedule=halving"),
    (["outer.final_lr=0.1"], "outer.final_lr", "cosine or linear"),
    (["outer.momentum=0.9"], "outer.momentum", "sgd or rmsprop"),
    (["outer.nesterov=true", "outer.optimizer=sgd"], "outer.nesterov", "a momentum above 0"),
    (["outer.nesterov=true", "outer.optimizer=rmsprop", "outer.momentum=0.9"], "outer.nesterov", "outer.optimizer=sgd"),
    (["outer.topk=0.1"], "outer.topk", "outer.compression=topk only, not by none"),
    (["outer.topk=0.1", "outer.compression=int8"], "outer.topk", "outer.compression=topk only, not by int8"),
    (["outer.topk=0", "outer.compression=topk"], "outer.topk", "greater than 0"),
    (["outer.topk=1.1", "outer.compression=topk"], "outer.topk", "less than or equal to 1"),
    (["outer.local={steps: 2, replicas: 2, momentum: 0.9}"], "outer.local.momentum", "outer.local.optimizer=sgd"),
    (["outer.local={steps: 2, replicas: 2, schedule: halving}"], "outer.local.halve_every", "outer.local.schedule"),
    (
        ["algorithm.name=scratch", "outer.local={steps: 2, replicas: 2, weight_decay: 0.1}"],
        "outer.local.weight_decay", "valid is 0",
    ),
    (["eval.finetune_steps=2"], "eval.finetune_steps", "maml has its own inner loop"),
    (["algorithm.name=protonet", "eval.inner_steps=2"], "eval.inner_steps", "protonet has no inner loop"),
    (["algorithm.name=reptile", "model.statistics=running"], "model.statistics", "valid is support"),
    (["model.statistics=running", "model.norm=layer"], "model.statistics", "model.norm=batch"),
    (["data.name=[]"], "data.name", "empty"),
    (["data.name=[{name: glyphs}]", "data.root=/x"], "data.name", "root and split belong to each entry"),
])  # fmt: skip
def test_an_impossible_combination_names_its_key(words, key, told):
    message = refusal(*words)
    assert message.startswith(f"{key}: ")
    assert told in message


SINUSOID = ("data.name=sinusoid", "model.name=mlp")


@pytest.mark.parametrize(("words", "key", "told"), [
    (["data.name=sinusoid"], "model.name", "goes with model.name=mlp"),
    ([*SINUSOID, "model.name=conv4"], "model.name", "conv4 is for images"),
    ([*SINUSOID, "algorithm.name=protonet"], "algorithm.name", "protonet is for classes; data.name=sinusoid"),
    (["data.name=omniglot", "task.rotate=true"], "task.rotate", "omniglot holds every class in four rotations already"),
    ([*SINUSOID, "task.rotate=true"], "task.rotate", "not with data.name=sinusoid"),
    ([*SINUSOID, "task.within_group=true"], "task.within_group", "not with data.name=sinusoid"),
    ([*SINUSOID, "eval.ways=5"], "eval.ways", "data.name=sinusoid has none"),
    ([*SINUSOID, "data.root=/x"], "data.name", "sinusoid is generated and takes no root and no split"),
    ([*SINUSOID, "data.split=vinyals"], "data.name", "sinusoid is generated and takes no root and no split"),
    (["data.name=[{name: sinusoid}]"], "data.name", "sinusoid is generated and joins no list"),
    (["data.name=[{name: glyphs}, {name: sinusoid}]"], "data.name", "sinusoid is generated and joins no list"),
])  # fmt: skip
def test_what_does_not_go_with_sinusoids(words, key, told):
    message = refusal(*words)
    assert message.startswith(f"{key}: ")
    assert told in message


def test_what_goes_with_sinusoids():
    for method in ("maml", "reptile"):
        config = resolve(config_of(*SINUSOID, f"algorithm.name={method}"))
        assert config.kind == "regression"
        assert config.data.sources == []
        assert resolve(validate(yaml.safe_load(to_yaml(config)), "again")) == config
    assert config_of().kind == config_of("data.name=[{name: glyphs}]").kind == "classification"


def test_combinations_that_are_possible():
    config_of("task.meta_batch=12", "task.shard=4")
    config_of("outer.schedule=halving", "outer.halve_every=10")
    config_of("outer.schedule=linear", "outer.final_lr=0.1")
    config_of("outer.optimizer=sgd", "outer.momentum=0.9")
    config_of("outer.optimizer=sgd", "outer.momentum=0.9", "outer.nesterov=true")
    config_of("outer.compression=topk", "outer.topk=1")
    config_of("algorithm.name=protonet", "eval.finetune_steps=2")
    config_of("model.statistics=running")
    assert [s.weight for s in config_of("data.name=[{name: glyphs}, {name: omniglot, weight: 3}]").data.sources] == [
        1,
        3,
    ]


# --- YAML ----------------------------------------------------------------------


def test_a_key_that_stands_twice(job):
    with pytest.raises(ConfigError, match=r"job\.yaml line 3: .*'task' stands twice"):
        load(job("seed: 1\ntask: {ways: 5}\ntask: {ways: 6}\n"))
    with pytest.raises(ConfigError, match=r"line 2: .*'ways' stands twice"):
        load(job("seed: 1\ntask: {ways: 5, ways: 6}\n"))
    with pytest.raises(ConfigError, match=r"'ways' stands twice|not valid YAML"):
        apply_overrides({}, ["task={ways: 5, ways: 6}"])


@pytest.mark.parametrize("text", ["task: {ways: 5", "a: b: c", "\tseed: 1", "seed: 1\n- 2"])
def test_what_is_no_yaml(job, text):
    with pytest.raises(ConfigError, match=r"job\.yaml line \d+: not valid YAML") as error:
        load(job(text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- seed", "seed", "3"])
def test_what_is_no_mapping(job, text):
    with pytest.raises(ConfigError, match=r"a job file is a mapping of sections, this is a (list|str|int)"):
        load(job(text))


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xff\xfe\x00seed")
    with pytest.raises(ConfigError, match=r"job\.yaml.*not valid YAML") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_key_that_is_no_word(job):
    with pytest.raises(ConfigError) as error:
        load(job("3: 4\n"))
    assert "\n" not in str(error.value)
    for key in ("? [1, 2]\n", "2020-01-01"):
        with pytest.raises(ConfigError, match=r"job\.yaml line 2: not valid YAML: a key is a word"):
            load(job(f"seed: 1\n{key}: 4\n"))


def test_an_empty_file_is_the_defaults(job):
    assert load(job("")) == Config()
    assert load(job("# nothing\n")) == Config()


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", ".001", "1E-3"])
def test_numbers_as_people_write_them(job, text):
    """YAML 1.1 takes 1e-3 for a word."""
    assert load(job(f"outer: {{lr: {text}}}")).outer.lr == 0.001
    assert config_of(f"algorithm.inner_lr={text}").algorithm.inner_lr == 0.001
    assert config_of(f"cluster.timeout={text}").cluster.timeout == 0.001
    assert config_of(f"cluster.gpus={text}").cluster.gpus == 0.001
    assert config_of(f"outer.clip={text}").outer.clip == 0.001
    assert config_of("algorithm.name=protonet", f"eval.also=[{{finetune_lr: {text}}}]").eval.also[0] == {
        "finetune_lr": 0.001
    }


def test_off_is_a_word_for_tracking():
    assert config_of("tracking.uri=off").tracking.uri == "off"
    assert config_of("tracking.uri=OFF").tracking.uri == "off"
    assert config_of("tracking.uri=sqlite:///x.db").tracking.uri == "sqlite:///x.db"


# --- overrides -----------------------------------------------------------------


def test_overrides_win_over_the_file_and_later_ones_over_earlier(job):
    path = job("task: {ways: 7, shots: 3}\n")
    config = load(path, ["task.shots=4", "task.shots=5", "seed=9", "eval.test=false", "outer.clip=null"])
    assert (config.task.ways, config.task.shots, config.seed, config.eval.test) == (7, 5, 9, False)
    assert config.outer.clip is None


def test_a_whole_section_can_be_given():
    config = config_of("algorithm={name: reptile, inner_steps: 7}", "algorithm.inner_batch=10")
    assert config.algorithm == Reptile(inner_steps=7, inner_batch=10)


def test_a_value_may_hold_an_equals_sign():
    assert config_of("tracking.uri=http://x/?a=b").tracking.uri == "http://x/?a=b"


def test_overrides_leave_the_mapping_alone():
    raw = {"task": {"ways": 5}}
    assert apply_overrides(raw, ["task.ways=6"]) == {"task": {"ways": 6}}
    assert raw == {"task": {"ways": 5}}


@pytest.mark.parametrize("word", ["task.shots", "=5", "task.=5", ".shots=5", "task..shots=5", "task.shots={"])
def test_a_malformed_override_is_quoted(word):
    with pytest.raises(ConfigError) as error:
        apply_overrides({"seed": 1}, [word])
    assert repr(word) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_below_a_value_is_told():
    with pytest.raises(ConfigError, match=r"seed\.x: seed is a value, not a section"):
        apply_overrides({"seed": 1}, ["seed.x=3"])


def test_the_method_is_chosen_by_name():
    assert isinstance(config_of().algorithm, Maml)
    assert isinstance(config_of("algorithm.name=protonet").algorithm, ProtoNet)
    assert config_of("algorithm.name=reptile").algorithm.inner_lr == 1e-3


# --- resolving -----------------------------------------------------------------


@pytest.mark.parametrize(("meta_batch", "shard"), [
    (1, 1), (2, 1), (3, 1), (4, 2), (5, 1), (6, 3), (8, 4), (9, 3), (12, 6), (16, 8), (25, 5), (32, 8), (20, 5), (7, 1),
])  # fmt: skip
def test_the_rule_for_shards(meta_batch, shard):
    assert default_shard(meta_batch) == shard
    assert resolve(config_of(f"task.meta_batch={meta_batch}")).task.shard == shard


def test_shards_divide_and_leave_two_where_they_can():
    for meta_batch in range(1, 200):
        shard = default_shard(meta_batch)
        assert meta_batch % shard == 0
        assert shard <= 8
        assert meta_batch == 1 or meta_batch // shard >= 2
        assert not any(meta_batch % s == 0 and meta_batch // s >= 2 for s in range(shard + 1, 9))


def test_every_auto_is_resolved():
    config = resolve(Config())
    assert (config.task.shard, config.engine.mode, config.engine.device) == (8, "vectorised", "cpu")
    assert (config.cluster.cpus, config.cluster.gpus) == (1.0, 0.0)
    left = {key: value for key, value in flatten(config).items() if value == "auto"}
    # Their rules need the run folder, and the size of θ.
    assert left == {"tracking.uri": "auto", "cluster.sums": "auto", "cluster.aggregators": "auto"}


def test_what_is_given_stays():
    given = [
        "task.shard=2",
        "engine.mode=loop",
        "engine.device=cpu",
        "cluster.cpus=3",
        "cluster.gpus=0",
        "engine.threads=2",
    ]
    config = config_of(*given)
    assert resolve(config) == config
    assert resolve(config_of("engine.threads=2")).cluster.cpus == 2.0


@pytest.mark.parametrize(("words", "gpus_here", "device", "gpus"), [
    ([], 0, "cpu", 0), ([], 2, "cuda", 1), ([], 1, "cpu", 0),  # one GPU is not enough for two workers
    (["engine.device=cuda"], 1, "cuda", 0.5),
    (["cluster.workers=0"], 2, "cuda", 1),
    (["cluster.address=auto"], 2, "cpu", 0),  # the driver's GPU says nothing about a cluster's workers
    (["cluster.address=auto", "cluster.gpus=0.5"], 0, "cuda", 0.5),
    (["cluster.gpus=0"], 2, "cpu", 0),
    (["engine.device=cpu"], 2, "cpu", 0),
    (["engine.device=cuda"], 0, "cuda", 1),
    (["engine.device=cuda", "cluster.gpus=0.25"], 0, "cuda", 0.25),
])  # fmt: skip
def test_the_rule_for_the_device(words, gpus_here, device, gpus, monkeypatch):
    monkeypatch.setattr(module, "visible_gpus", lambda: gpus_here)
    config = resolve(config_of(*words))
    assert (config.engine.device, config.cluster.gpus) == (device, gpus)


def test_a_gpu_share_that_the_cpu_would_not_use():
    with pytest.raises(ConfigError, match=r"^cluster\.gpus: 1"):
        resolve(config_of("engine.device=cpu", "cluster.gpus=1"))


EXAMPLES = [
    [], ["algorithm.name=reptile", "algorithm.inner_batch=10"],
    ["algorithm.name=protonet", "eval.finetune_steps=3", "eval.ways=9", "eval.also=[{queries: 15, finetune_lr: 1e-3}]"],
    ["data.name=[{name: glyphs, weight: 2}, {name: omniglot, root: 'C:\\x y', split: finn}]", "tracking.uri=off"],
    ["outer.schedule=halving", "outer.halve_every=5", "outer.lr=1e-7", "outer.clip=1e9"],
    ["seed=9223372036854775807", "tracking.experiment='é: #1'", "cluster.address='ray://[::1]:10001'", "task.shard=1"],
]  # fmt: skip


@pytest.mark.parametrize("words", EXAMPLES, ids=str)
def test_a_resolved_config_is_a_job_that_resolves_to_itself(words, job):
    resolved = resolve(config_of(*words))
    again = load(job(to_yaml(resolved)))
    assert again == resolved
    assert resolve(again) == resolved
    assert to_yaml(again) == to_yaml(resolved)


def test_the_yaml_has_every_key_in_the_trees_order():
    text = to_yaml(Config())
    assert list(yaml.safe_load(text)) == list(Config.model_fields)
    assert set(yaml.safe_load(text)["eval"]) == set(type(Config().eval).model_fields)


def test_with_values_checks_again():
    config = Config().with_values(task={"ways": 7}, outer={"lr": 0.5})
    assert (config.task.ways, config.outer.lr, Config().task.ways) == (7, 0.5, 5)
    with pytest.raises(ConfigError, match=r"task\.shard"):
        Config().with_values(task={"shard": 5})


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError):
        Config().task.ways = 3


LOCAL = "outer.local={steps: 5, replicas: 3, lr: 0.01}"


def test_what_local_meta_steps_count():
    plain, local = (config_of("task.meta_batch=8", "task.shard=2", *words) for words in ([], [LOCAL]))
    assert (plain.lanes, plain.averaged, plain.step_tasks) == (4, 8, 8)
    assert (local.lanes, local.averaged, local.step_tasks) == (3, 3, 5 * 3 * 8)
    assert local.outer.local.optimizer == "adam"
    assert resolve(validate(yaml.safe_load(to_yaml(local)), "again")) == resolve(local)


@pytest.mark.parametrize(("words", "remembers"), [
    ([], False), (["outer.compression=bf16"], False), (["outer.compression=int8"], True),
    (["outer.compression=topk"], True), ([LOCAL], True),
])  # fmt: skip
def test_which_lanes_remember(words, remembers):
    assert config_of(*words).outer.remembers is remembers


# --- resuming ------------------------------------------------------------------


@pytest.mark.parametrize(("word", "key"), [
    ("seed=1", "seed"), ("task.ways=6", "task.ways"), ("task.shard=4", "task.shard"), ("model.width=32", "model.width"),
    ("algorithm.inner_lr=0.3", "algorithm.inner_lr"), ("algorithm.order=1", "algorithm.order"),
    ("algorithm.name=protonet", "algorithm.name"), ("outer.lr=0.1", "outer.lr"), ("outer.clip=3", "outer.clip"),
    ("engine.threads=2", "engine.threads"), ("engine.mode=loop", "engine.mode"),
    ("engine.dtype=float64", "engine.dtype"),
    ("data.name=omniglot", "data.name"), ("data.split=x", "data.split"), ("data.name=[{name: glyphs}]", "data.name"),
    ("task.meta_batch=32", "task.meta_batch"), ("task.transductive=false", "task.transductive"),
    ("outer.compression=int8", "outer.compression"), ("outer.local={steps: 2, replicas: 2}", "outer.local"),
])  # fmt: skip
def test_a_resume_keeps_the_mathematics(word, key):
    before = resolve(Config())
    after = resolve(validate(apply_overrides(before.model_dump(mode="json"), [word]), "x") if "name=" not in word
                    else config_of(word))  # fmt: skip
    with pytest.raises(ConfigError) as error:
        refuse_changed_mathematics(before, after)
    message = str(error.value)
    assert message.startswith(f"{key}")
    assert "\n" not in message
    assert all(free in message for free in FREE_ON_RESUME)


@pytest.mark.parametrize("words", [
    ["cluster.workers=7"], ["cluster.address=auto", "cluster.gpus=0"], ["checkpoint.every=7"], ["eval.every=0"],
    ["eval.also=[{queries: 3}]"], ["tracking.uri=off"], ["data.root=/elsewhere"], ["outer.steps=5000"], [],
    ["cluster.cpus=0.5"],
])  # fmt: skip
def test_what_a_resume_may_change(words):
    refuse_changed_mathematics(resolve(Config()), resolve(config_of(*words)))


@pytest.mark.parametrize(("schedule", "free"), [
    (["outer.schedule=constant"], True), (["outer.schedule=halving", "outer.halve_every=9"], True),
    (["outer.schedule=cosine"], False), (["outer.schedule=linear"], False),
    ([LOCAL], True), (["outer.local={steps: 5, replicas: 3, schedule: cosine}"], False),
])  # fmt: skip
def test_steps_may_change_where_no_schedule_depends_on_them(schedule, free):
    before, after = resolve(config_of(*schedule)), resolve(config_of(*schedule, "outer.steps=5000"))
    assert ("outer.steps" in mathematics(before)) is not free
    if free:
        refuse_changed_mathematics(before, after)
    else:
        with pytest.raises(ConfigError, match=r"^outer\.steps: was 1000 and cannot become 5000"):
            refuse_changed_mathematics(before, after)


def test_the_root_of_a_data_set_in_a_list_is_free_too():
    before = resolve(config_of("data.name=[{name: omniglot, root: /a}]"))
    after = resolve(config_of("data.name=[{name: omniglot, root: /b}]"))
    refuse_changed_mathematics(before, after)


def test_mathematics_is_flat_and_leaves_out_what_is_free():
    found = mathematics(resolve(Config()))
    assert found["task.ways"] == 5
    assert not any(key.startswith(("cluster.", "eval.", "checkpoint.", "tracking.")) for key in found)
    assert "data.root" not in found
    assert {"seed", "data.name", "outer.lr", "engine.threads", "algorithm.inner_lr"} <= set(found)


# --- jobs ----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(packaged_jobs()))
def test_every_packaged_job_loads_and_resolves(name):
    config = resolve(load(name))
    assert config.task.meta_batch % config.task.shard == 0
    assert load(packaged_jobs()[name]) == load(name)


def test_there_are_packaged_jobs():
    assert "quickstart" in packaged_jobs()
    assert find_job("quickstart") == packaged_jobs()["quickstart"]


def test_a_job_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"named quickstrat; did you mean quickstart\?"):
        find_job("quickstrat")
    with pytest.raises(ConfigError, match=r"named zzz; valid: .*quickstart"):
        find_job("zzz")
    for missing in ("no.yaml", "jobs/no.yaml", "jobs/no"):
        with pytest.raises(ConfigError, match=f"job file {missing} does not exist; .* one of: .*quickstart"):
            find_job(missing)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="job file folder is a folder"):
        find_job("folder")


def test_a_file_goes_before_a_packaged_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("seed: 77\n")
    assert load("quickstart").seed == 77


def test_reading_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: No such file"):
        read_yaml(tmp_path / "gone.yaml")


# --- strategies ------------------------------------------------------------------


@pytest.mark.parametrize(("words", "told"), [
    (["cluster.strategy=gossip"], "cluster.strategy: "),
    (["cluster.staleness=2"], "cluster.staleness: is read by cluster.strategy=async only, not by aggregator"),
    (["cluster.strategy=allreduce", "cluster.staleness=2"], "cluster.staleness: is read by cluster.strategy=async"),
    (["cluster.strategy=async", "cluster.staleness=-1"], "cluster.staleness: "),
    (["cluster.strategy=async", "cluster.backup=2"], "cluster.backup: is read by cluster.strategy=aggregator only"),
    (["cluster.strategy=allreduce", "cluster.backup=2"], "cluster.backup: is read by cluster.strategy=aggregator only"),
    (["cluster.strategy=allreduce", "cluster.workers=0"], "cluster.workers: 0 computes in the driver's process"),
    (["cluster.strategy=async", "cluster.workers=0"], "cluster.workers: 0 computes in the driver's process"),
    (["cluster.strategy=allreduce", "cluster.aggregators=2"], "cluster.aggregators: is read by cluster.strategy=aggr"),
    (["cluster.strategy=async", "cluster.sums=tree"], "cluster.sums: is read by cluster.strategy=aggregator only"),
    (["cluster.strategy=async", "outer.compression=bf16"], "outer.compression: is read by cluster.strategy=aggr"),
    (["cluster.strategy=allreduce", "outer.local={steps: 2, replicas: 2}"], "outer.local: is read by cluster.strategy"),
    (["cluster.strategy=allreduce", "cluster.address=ray://a:1"], "cluster.address: ray://a:1 keeps the driver out"),
])  # fmt: skip
def test_a_strategy_has_its_keys(words, told):
    assert refusal(*words).startswith(told)


def test_the_bound_of_a_run_that_names_none():
    assert config_of("cluster.strategy=async").cluster.bound == 4
    assert config_of("cluster.strategy=async", "cluster.staleness=0").cluster.bound == 0


def test_a_resume_may_change_to_allreduce_and_not_to_async():
    aggregator, allreduce, late = (
        config_of(f"cluster.strategy={name}") for name in ("aggregator", "allreduce", "async")
    )
    refuse_changed_mathematics(resolve(aggregator), resolve(allreduce))
    for before, after in ((aggregator, late), (late, allreduce)):
        with pytest.raises(ConfigError, match=r"^cluster\.strategy: was \w+ and cannot become"):
            refuse_changed_mathematics(resolve(before), resolve(after))
