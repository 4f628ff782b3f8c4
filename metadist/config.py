"""One typed tree for a whole run: YAML in, dotted overrides, resolved YAML out.

A job file is this tree with the defaults left out. `load` reads one, applies
overrides such as `task.shots=5`, and refuses unknown keys, wrong types and
impossible combinations with a line that names the key. `resolve` replaces every
`auto` by a fixed rule, never by timing; what it returns is written into the run
folder and is itself a valid job file.
"""

import difflib
import json
import typing
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, get_origin

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from metadist.errors import ConfigError
from metadist.methods import AnyAlgorithm, InnerLoop, Maml, every_method
from metadist.tree import AtLeastTwo, Count, NonNegative, Number, Positive, Rate, Seed, Tree


def _yaml_off(value: Any) -> Any:
    """YAML reads the word off as false."""
    return "off" if value is False else value


GENERATED = {"sinusoid": "regression tasks y = A sin(x − φ), generated"}
"""Values of `data.name` whose tasks come from a formula: regression tasks, no examples on a disk."""


TURNED = ("omniglot",)
"""Data sets whose rotations are classes of their own."""


class Source(Tree):
    """One data set of a mixture."""

    name: str
    weight: Positive = Field(1, description="relative share of the tasks, an integer")
    root: str | None = Field(None, description="folder that holds the raw files; downloaded without it")
    split: str | None = Field(None, description="named split into meta-train, meta-val and meta-test classes")


class Data(Tree):
    """Where examples come from."""

    name: str | list[Source] = Field("glyphs", description="a data set, or a list of {name, weight, root, split}")
    root: str | None = Field(None, description="folder that holds the raw files; downloaded without it")
    split: str | None = Field(None, description="named split into meta-train, meta-val and meta-test classes")
    shared: str | None = Field(
        None, description="folder or URI (s3://, gs://) from which other hosts take the built tables; else each builds"
    )

    @model_validator(mode="after")
    def _a_list_names_its_own(self) -> "Data":
        if isinstance(self.name, list):
            if not self.name:
                raise ValueError("name: the list of data sets is empty")
            if self.root is not None or self.split is not None:
                raise ValueError("name: with a list of data sets, root and split belong to each entry of the list")
            generated = next((source.name for source in self.name if source.name in GENERATED), None)
            if generated:
                raise ValueError(f"name: {generated} is generated and joins no list; valid is its name alone")
        elif self.name in GENERATED and (self.root is not None or self.split is not None):
            raise ValueError(f"name: {self.name} is generated and takes no root and no split")
        return self

    @property
    def sources(self) -> list[Source]:
        """The data sets that are tables; none where tasks are generated."""
        if isinstance(self.name, str):
            return [] if self.name in GENERATED else [Source(name=self.name, root=self.root, split=self.split)]
        return self.name


class Task(Tree):
    """What an episode is, and how a meta-batch is cut into shards."""

    ways: AtLeastTwo = Field(5, description="classes per episode")
    shots: Positive = Field(1, description="support examples per class")
    queries: Positive = Field(1, description="query examples per class")
    meta_batch: Positive = Field(16, description="tasks per meta-step; with outer.local of one replica")
    shard: Positive | Literal["auto"] = Field("auto", description="tasks per shard; part of the mathematics")
    within_group: bool = Field(False, description="draw all classes of an episode from one group (one alphabet)")
    rotate: bool = Field(False, description="turn each class of a training episode by a random multiple of 90 degrees")
    transductive: bool = Field(True, description="normalise the queries of a task by their own batch statistics")
    seed: Seed | None = Field(None, description="of the sampling of training tasks; the run's seed without it")


class Model(Tree):
    """The network."""

    name: Literal["stride2", "conv4", "conv4-fc", "resnet12", "mlp"] = Field("stride2", description="architecture")
    width: Positive = Field(
        64, description="channels of a convolution (resnet12: of block 1), or units of an MLP layer"
    )
    hidden: Positive = Field(128, description="units of conv4-fc's first, and without head of its second, linear layer")
    layers: Positive = Field(2, description="hidden layers of mlp")
    norm: Literal["batch", "layer", "none"] = Field("batch", description="normalisation behind each hidden layer")
    activation: Literal["relu", "leaky-relu", "softplus", "tanh"] = Field(
        "relu", description="nonlinearity; resnet12's papers have leaky-relu, of slope 0.1"
    )
    pool: Literal["max", "avg"] = Field("max", description="pooling of conv4 and conv4-fc")
    statistics: Literal["support", "running"] = Field(
        "support", description="where a batch norm takes its statistics from when queries are not normalised together"
    )


TOPK = 0.01
"""`outer.topk` of a run with topk that says nothing."""


class Optimizer(Tree):
    """A torch.optim optimizer and the schedule of its rate."""

    steps: Positive
    optimizer: Literal["adam", "adamw", "sgd", "rmsprop"] = Field("adam", description="of torch.optim")
    lr: Rate = Field(1e-3, description="rate at the start of the schedule")
    momentum: Annotated[float, Field(ge=0, lt=1), Number] = Field(0.0, description="of sgd and rmsprop")
    nesterov: bool = Field(False, description="Nesterov's form of sgd's momentum")
    weight_decay: NonNegative = Field(0.0, description="of the optimizer")
    clip: Rate | None = Field(None, description="largest norm of the whole gradient")
    schedule: Literal["constant", "cosine", "linear", "halving"] = Field("constant", description="of the rate")
    final_lr: NonNegative = Field(0.0, description="rate at the end of a cosine or linear schedule")
    halve_every: Positive | None = Field(None, description="meta-steps between halvings of the halving schedule")
    warmup: Count = Field(0, description="meta-steps over which the rate rises linearly to lr")

    section: ClassVar[str]

    @model_validator(mode="after")
    def _schedule_has_its_keys(self) -> "Optimizer":
        here = self.section
        if (self.schedule == "halving") != (self.halve_every is not None):
            raise ValueError(f"halve_every: goes with {here}.schedule=halving, and only with it")
        if self.final_lr and self.schedule not in ("cosine", "linear"):
            raise ValueError(f"final_lr: is read by {here}.schedule=cosine or linear only")
        if self.momentum and self.optimizer not in ("sgd", "rmsprop"):
            raise ValueError(f"momentum: is read by {here}.optimizer=sgd or rmsprop only")
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum):
            raise ValueError(f"nesterov: is a form of momentum; valid with {here}.optimizer=sgd and a momentum above 0")
        return self

    @property
    def stretches(self) -> bool:
        """Whether the rate of a meta-step depends on how many there are."""
        return self.schedule in ("cosine", "linear")


class Local(Optimizer):
    """Meta-steps that replicas of θ take by themselves, each with an optimizer of its own (DiLoCo)."""

    section = "outer.local"
    steps: Positive = Field(description="H: local meta-steps of a replica between two averages")
    replicas: Positive = Field(description="R: replicas of θ; part of the mathematics, whatever the number of workers")


class Outer(Optimizer):
    """The step of the meta-parameters."""

    section = "outer"
    steps: Positive = Field(1000, description="meta-steps; with local, averages of the replicas")
    local: Local | None = Field(
        None, description="replicas take {steps, replicas, optimizer, lr, …} meta-steps of task.meta_batch tasks each; "
        "the optimizer of this section then moves θ by the mean of the differences"
    )  # fmt: skip
    compression: Literal["none", "bf16", "int8", "topk"] = Field(
        "none", description="of what a shard, or a replica, sends; int8 and topk feed back what they left out"
    )
    topk: Annotated[float, Field(gt=0, le=1), Number] | None = Field(
        None, description="of compression=topk: fraction of every tensor's elements that is sent; 0.01 without it"
    )

    @model_validator(mode="after")
    def _compression_has_its_key(self) -> "Outer":
        if self.topk is not None and self.compression != "topk":
            raise ValueError(f"topk: is read by outer.compression=topk only, not by {self.compression}")
        return self

    @property
    def fraction(self) -> float:
        """Of the elements that topk sends."""
        return TOPK if self.topk is None else self.topk

    @property
    def remembers(self) -> bool:
        """Whether lanes carry something from one meta-step to the next: a replica's optimizer, or a residual."""
        return self.local is not None or self.compression in ("int8", "topk")

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """By the section that holds it."""
        return {each.section: each for each in (self, self.local) if each is not None}


class Engine(Tree):
    """How a shard is computed on one device."""

    mode: Literal["auto", "loop", "vectorised", "graph"] = Field(
        "auto", description="one task after the other; all at once; or that as one CUDA graph, for maml"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if a worker has a GPU share")
    dtype: Literal["float32", "float64"] = Field("float32", description="of parameters and examples")
    precision: Literal["full", "tf32", "bf16"] = Field(
        "full", description="of matrix products in float32: tf32, on cuda only, rounds factors, bf16 results as well"
    )

    @model_validator(mode="after")
    def _rounds_float32_only(self) -> "Engine":
        if self.precision != "full" and self.dtype != "float32":
            raise ValueError(f"precision: {self.precision} rounds float32; engine.dtype={self.dtype} goes with full")
        return self

    threads: Positive = Field(1, description="threads of a worker; part of the numeric fingerprint")


class Elastic(Tree):
    """Workers that come and go with the cluster's resources."""

    min: Positive = Field(1, description="the run waits for so many")
    max: Positive = Field(description="and takes in up to so many")

    @model_validator(mode="after")
    def _in_order(self) -> "Elastic":
        if self.min > self.max:
            raise ValueError(f"min: {self.min} is more than max={self.max}")
        return self


STALENESS = 4
"""`cluster.staleness` of a run with async that says nothing."""


class Cluster(Tree):
    """Where the workers run."""

    address: str = Field("local", description="local, auto, HOST:PORT or ray://HOST:PORT")
    workers: Count | Elastic = Field(
        2, description="Ray actors, or {min, max} of them; 0 computes in the driver's process without Ray"
    )
    cpus: NonNegative | Literal["auto"] = Field("auto", description="CPUs a worker reserves; auto: engine.threads")
    gpus: NonNegative | Literal["auto"] = Field("auto", description="GPU share of a worker; auto: 1 on cuda, else 0")
    resources: dict[str, NonNegative] = Field({}, description="custom resources that a worker reserves, by name")
    strategy: Literal["aggregator", "allreduce", "async"] = Field(
        "aggregator",
        description="any shard to any worker; equal workers that sum among themselves; workers of very unequal speed",
    )
    staleness: Count | None = Field(
        None, description="of async: outer steps that a gradient may be behind the one it is applied in; 4 without it"
    )
    placement: Literal["any", "spread", "pack"] = Field(
        "any", description="of the workers, by a placement group: over as many nodes as can be, or as few"
    )
    timeout: Rate = Field(60.0, description="seconds to wait for a cluster, or for its resources")
    backup: Annotated[float, Field(ge=1), Number] | None = Field(
        3.0, description="times the usual that shards may take before an idle worker computes them too; null: for ever"
    )
    aggregators: Positive | Literal["auto"] = Field(
        "auto",
        description="actors that θ is cut into pieces for, at most its tensors; auto: 4 for 8 MB of θ or more, else 1",
    )
    sums: Literal["auto", "flat", "tree"] = Field(
        "auto",
        description="flat: workers' sums go straight to the aggregators; tree: they are added on each node first; "
        "auto: tree from 100 MB of sums a step and 4 workers a host on. Both autos are 1 and flat on one machine",
    )
    lines: bool = Field(
        True,
        description="where all workers and an only aggregator are on the driver's machine (Linux), with flat sums, "
        "they talk by sockets and shared memory, beside Ray; false: by Ray alone",
    )
    ship: bool = Field(True, description="send this package's code to the hosts of another's cluster")
    silence: Rate = Field(30.0, description="seconds after which an aggregator that stands still is replaced")
    linger: NonNegative = Field(
        600.0, description="seconds that aggregators on another's cluster outlive their driver, for --resume; 0: none"
    )

    @model_validator(mode="after")
    def _strategy_has_its_keys(self) -> "Cluster":
        strategy = self.strategy
        if self.staleness is not None and strategy != "async":
            raise ValueError(f"staleness: is read by cluster.strategy=async only, not by {strategy}")
        if strategy == "aggregator":
            return self
        for key in ("silence", "linger", "lines"):
            if getattr(self, key) != Cluster.model_fields[key].default:
                raise ValueError(f"{key}: is read by cluster.strategy=aggregator only, not by {strategy}")
        if self.workers == 0:
            raise ValueError(
                f"workers: 0 computes in the driver's process; cluster.strategy={strategy} needs 1 or more"
            )
        if self.backup != Cluster.model_fields["backup"].default:
            raise ValueError(f"backup: is read by cluster.strategy=aggregator only, not by {strategy}")
        # Once nothing but 1 and flat was: what a run from then has written down is no wish.
        for key, plain in (("aggregators", 1), ("sums", "flat")):
            if getattr(self, key) not in ("auto", plain):
                raise ValueError(f"{key}: is read by cluster.strategy=aggregator only, not by {strategy}")
        if strategy == "allreduce" and self.address.startswith("ray://"):
            raise ValueError(
                f"address: {self.address} keeps the driver outside of the cluster; cluster.strategy=allreduce needs "
                f"it inside: local, auto or HOST:PORT"
            )
        return self

    @property
    def bound(self) -> int:
        """Outer steps that a gradient may be late, with async."""
        return STALENESS if self.staleness is None else self.staleness

    @property
    def least(self) -> int:
        """Workers that the run waits for."""
        return self.workers.min if isinstance(self.workers, Elastic) else self.workers

    @property
    def most(self) -> int:
        """Workers that it may have."""
        return self.workers.max if isinstance(self.workers, Elastic) else self.workers


class Checkpoint(Tree):
    """How often the state becomes durable."""

    every: Positive = Field(100, description="meta-steps between checkpoints")
    keep: Annotated[int, Field(ge=3), Number] = Field(3, description="newest checkpoints kept, and the best one")
    grace: Rate = Field(25.0, description="seconds after SIGTERM in which a checkpoint is written, before the end")


class Eval(Tree):
    """How a run is judged. A key left null is the task's."""

    every: Count = Field(100, description="meta-steps between validations; 0 = never")
    val_episodes: Positive = Field(200, description="episodes of a validation")
    episodes: Positive = Field(1000, description="episodes of the meta-test")
    test: bool = Field(True, description="meta-test at the end")
    ways: AtLeastTwo | None = None
    shots: Positive | None = None
    queries: Positive | None = None
    inner_steps: Count | None = None
    transductive: bool | None = None
    seed: Seed | None = Field(None, description="of the sampling of evaluation tasks; the run's seed without it")
    draw: Count = Field(
        0, description="which of the disjoint streams of evaluation tasks; 0 has the validations' tasks"
    )
    finetune_steps: Count = Field(0, description="gradient steps on the support set for methods without inner loop")
    finetune_lr: Rate = Field(0.01, description="rate of those steps")
    also: list[dict[str, bool | int | float | None]] = Field(
        [], description="further meta-tests, each as overrides of this section, such as {queries: 15}"
    )


class Tracking(Tree):
    """Where a person follows the run."""

    uri: Annotated[str, BeforeValidator(_yaml_off)] = Field(
        "auto", description="MLflow tracking URI; auto: SQLite beside the run folder; off: none"
    )
    experiment: str = Field("metadist", description="MLflow experiment")
    profile: bool = Field(False, description="write profile.json, a Chrome trace, and tell where the time went")


class Jobs(Tree):
    """How `metadist submit` runs this on a cluster."""

    retries: Count = Field(3, description="times that the run's process is started again after it died")
    queue: Positive = Field(16, description="jobs that may wait or run on the cluster; one more is not submitted")


class Stage(Tree):
    """Other values from some meta-step on."""

    at: Positive = Field(description="the first meta-step, counted from 0, that is taken with them")
    set: dict[str, bool | int | float | None] = Field(min_length=1, description="dotted key: value")


STAGED: dict[str, tuple[str, ...] | None] = {
    "algorithm.inner_lr": ("maml", "anil", "boil", "reptile", "imaml"),
    "algorithm.inner_steps": ("maml", "anil", "boil", "reptile", "imaml"),
    "algorithm.order": ("maml", "anil", "boil"),
    "outer.lr": None,
    "outer.final_lr": None,
    "outer.clip": None,
    "outer.weight_decay": None,
}
"""Keys that may change on the way, and the methods that have them as plain numbers of every meta-step; None: all."""


STORAGE = "~/metadist-jobs"
"""`storage` of a job that says nothing: on the disk of the cluster's head."""


class Config(Tree):
    """A whole run."""

    seed: Seed = Field(0, description="of initial θ, and of the sampling of tasks")
    data: Data = Data()
    task: Task = Task()
    model: Model = Model()
    algorithm: AnyAlgorithm = Maml()
    outer: Outer = Outer()
    engine: Engine = Engine()
    cluster: Cluster = Cluster()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    tracking: Tracking = Tracking()
    jobs: Jobs = Jobs()
    storage: str = Field(
        STORAGE,
        description="of `metadist submit`: where results outlive the cluster; a folder of its head, or a URI "
        "(s3://, gs://)",
    )
    stages: list[Stage] = Field([], description="{at: STEP, set: {key: value}}: a schedule of keys by meta-step")

    @model_validator(mode="after")
    def _combinations(self) -> "Config":
        shard, meta_batch = self.task.shard, self.task.meta_batch
        if shard != "auto" and meta_batch % shard:
            raise ValueError(f"task.shard: {shard} does not divide task.meta_batch={meta_batch}")
        method = self.algorithm
        self._also()
        for key, steps in self.judged("finetune_steps"):
            if steps and not method.finetunable:
                loop = "has its own inner loop; set eval.inner_steps instead"
                why = loop if isinstance(method, InnerLoop) else "is not fine-tuned"
                raise ValueError(f"{key}: {method.name} {why}")
        for key, steps in self.judged("inner_steps"):
            if steps is not None and not isinstance(method, InnerLoop):
                instead = "; set eval.finetune_steps instead" if method.finetunable else ""
                raise ValueError(f"{key}: {method.name} has no inner loop{instead}")
        if self.kind == "regression":
            self._regression()
        strategy = self.cluster.strategy
        if strategy != "aggregator" and (self.outer.local or self.outer.compression != "none"):
            key = "local" if self.outer.local else "compression"
            raise ValueError(f"outer.{key}: is read by cluster.strategy=aggregator only, not by {strategy}")
        for key, default, readers in UNREAD:
            if getattr(self.model, key) != default and self.model.name not in readers:
                raise ValueError(f"model.{key}: is read by model.name={' or '.join(readers)} only")
        turned = next((source.name for source in self.data.sources if source.name in TURNED), None)
        if self.task.rotate and turned:
            raise ValueError(
                f"task.rotate: {turned} holds every class in four rotations already; turned again, two classes of an "
                f"episode could be the same images"
            )
        if self.model.statistics == "running" and self.model.norm != "batch":
            raise ValueError("model.statistics: running goes with model.norm=batch")
        for key, ways in self.judged("ways"):
            if self.kind == "classification" and method.class_bound and ways not in (None, self.task.ways):
                raise ValueError(
                    f"{key}: {method.name} learns a head of task.ways={self.task.ways} classes and cannot be judged "
                    f"on {ways}; valid is {self.task.ways}, or a metric method such as protonet"
                )
        if self.engine.mode == "graph" and not self.whole_shards:
            raise ValueError(
                "engine.mode: graph is for algorithm.name=maml without outer.local, outer.compression and "
                "cluster.strategy=async; valid here: auto, loop, vectorised"
            )
        method.check(self)
        self._stages()
        if "@" in self.storage.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "storage: holds a key or password, which would be written into every run folder; name them in the "
                "environment of the cluster, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        return self

    @property
    def whole_shards(self) -> bool:
        """Whether a shard can be one program: nothing but its sums leaves it, and no step's number goes in but for
        sampling."""
        alone = self.outer.local is None and self.outer.compression == "none" and self.cluster.strategy != "async"
        return alone and self.algorithm.name == "maml"

    def _stages(self) -> None:
        before = 0
        for index, stage in enumerate(self.stages):
            here = f"stages.{index}"
            if not before < stage.at < self.outer.steps:
                raise ValueError(
                    f"{here}.at: {stage.at} is not behind {before} and below outer.steps={self.outer.steps}"
                )
            before = stage.at
            for key in stage.set:
                if key not in STAGED:
                    raise ValueError(f"{here}.set: {key} cannot change on the way{_choices(STAGED)}")
                methods = STAGED[key]
                if methods is not None and self.algorithm.name not in methods:
                    raise ValueError(
                        f"{here}.set: {key} of {self.algorithm.name} cannot change on the way; valid with "
                        f"{', '.join(methods)}"
                    )
            if self.outer.local is not None:
                raise ValueError("stages: is not read with outer.local, whose replicas count their own meta-steps")
            try:
                self.at(stage.at)
            except ConfigError as error:
                raise ValueError(f"{error}") from error

    def at(self, step: int) -> "Config":
        """The config that is in force in meta-step `step`, without stages."""
        if not self.stages:
            return self
        raw, here = self.model_dump(), len([stage for stage in self.stages if stage.at <= step])
        raw["stages"] = []
        values = {key: value for stage in self.stages[:here] for key, value in stage.set.items()}
        return validate(with_keys(raw, values), f"stages.{here - 1}.set")

    def _also(self) -> None:
        for index, changes in enumerate(self.eval.also):
            unknown = [key for key in changes if key not in EVAL_EPISODE_KEYS]
            if unknown:
                raise ValueError(
                    f"eval.also.{index}: unknown key {unknown[0]}{_did_you_mean(unknown[0], EVAL_EPISODE_KEYS)}"
                )
            try:
                Eval.model_validate(changes)
            except ValidationError as error:
                problem = error.errors()[0]
                raise ValueError(f"eval.also.{index}.{problem['loc'][0]}: {problem['msg']}") from error

    def _regression(self) -> None:
        name = self.data.name
        if not self.algorithm.regression:
            raise ValueError(f"algorithm.name: {self.algorithm.name} is for classes; data.name={name} asks for numbers")
        if self.model.name != "mlp":
            raise ValueError(f"model.name: {self.model.name} is for images; data.name={name} goes with model.name=mlp")
        for key in ("within_group", "rotate"):
            if getattr(self.task, key):
                raise ValueError(f"task.{key}: is read with images only, not with data.name={name}")
        counted = [("task.ways", None if self.task.ways == Task().ways else self.task.ways), *self.judged("ways")]
        for key, ways in counted:
            if ways is not None:
                raise ValueError(f"{key}: counts classes; data.name={name} has none; leave it out")

    def judged(self, key: str) -> list[tuple[str, Any]]:
        """A key of `eval` as every meta-test has it: where it stands, and its value."""
        also = [(f"eval.also.{n}.{key}", changes.get(key)) for n, changes in enumerate(self.eval.also)]
        return [(f"eval.{key}", getattr(self.eval, key)), *also]

    @property
    def shard(self) -> int:
        """Tasks of a shard, by the fixed rule where `task.shard` is auto."""
        return default_shard(self.task.meta_batch) if self.task.shard == "auto" else self.task.shard

    @property
    def lanes(self) -> int:
        """Summands of an outer step: the shards of its meta-batch, or its replicas."""
        return self.outer.local.replicas if self.outer.local else self.task.meta_batch // self.shard

    @property
    def averaged(self) -> int:
        """What the sum of an outer step is divided by: its tasks, or its replicas."""
        return self.outer.local.replicas if self.outer.local else self.task.meta_batch

    @property
    def step_tasks(self) -> int:
        """Tasks of an outer step, those of all local meta-steps of all replicas."""
        local = self.outer.local
        return self.task.meta_batch * (local.steps * local.replicas if local else 1)

    @property
    def kind(self) -> Literal["classification", "regression"]:
        """What the tasks ask for."""
        return "regression" if isinstance(self.data.name, str) and self.data.name in GENERATED else "classification"

    def with_values(self, **sections: dict[str, Any]) -> "Config":
        """This config with some keys replaced and everything checked again."""
        raw = self.model_dump()
        for section, values in sections.items():
            raw[section].update(values)
        return validate(raw, "config")


UNREAD = (("pool", "max", ("conv4", "conv4-fc")), ("hidden", 128, ("conv4-fc",)), ("layers", 2, ("mlp",)))
"""Keys of `model` that not every network reads: (key, default, networks)."""

EVAL_EPISODE_KEYS = (
    "episodes", "ways", "shots", "queries", "inner_steps", "transductive", "finetune_steps", "finetune_lr",
)  # fmt: skip
"""The keys of `eval` that an entry of `eval.also` may change."""


# --- reading -----------------------------------------------------------------


class _NoDuplicates(yaml.SafeLoader):
    """YAML lets a later key silently win over an earlier one; a job file may not."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    pairs = [(loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value]
    seen = set()
    for (key, _), (key_node, _) in zip(pairs, node.value, strict=True):
        if not isinstance(key, str | int | float | None):
            raise yaml.constructor.ConstructorError(None, None, "a key is a word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return dict(pairs)


_NoDuplicates.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def find_job(job: str) -> Path:
    """The file of a job that is named by its path or by its packaged name."""
    path = Path(job)
    if path.is_file():
        return path
    if job in packaged_files():
        return packaged_files()[job]
    if path.is_dir() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"job file {job} {what}; a packaged job is one of: {', '.join(sorted(packaged_jobs()))}")
    jobs = packaged_jobs()
    raise ConfigError(f"no job file or packaged job is named {job}{_did_you_mean(job, jobs) or _choices(jobs)}")


def packaged_jobs() -> dict[str, Path]:
    """Name → file of the job files that ship with the package; those of searches are not among them."""
    return {name: path for name, path in packaged_files().items() if not name.startswith("search-")}


def packaged_files() -> dict[str, Path]:
    """The same, with those of searches."""
    package = Path(__file__).parent
    for folder in (package / "jobs", package.parent / "jobs"):  # installed, or a checkout
        found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
        if found:
            return found
    return {}


def load(job: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a job file, with `key.path=value` words applied, fully checked."""
    return validate(apply_overrides(read_yaml(find_job(str(job))), overrides), str(job))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping. One line says what is wrong with a file that has none."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _NoDuplicates)  # noqa: S506, a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a job file is a mapping of sections, this is a {type(raw).__name__}")
    return raw


def apply_overrides(raw: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """`raw` with each `key.path=value` set; values are read as YAML."""
    return with_keys(raw, dict(map(parse_override, words)))


def parse_override(word: str) -> tuple[str, Any]:
    """Key path and value of `key.path=value`; the value is read as YAML."""
    key, equals, text = word.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ConfigError(f"override {word!r}: write key.path=value, for example task.shots=5")
    try:
        return key.strip(), yaml.load(text, _NoDuplicates)  # noqa: S506, a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"override {word!r}: the value is not valid YAML") from error


def with_keys(raw: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `raw` with the values of some key paths set."""
    raw = json.loads(json.dumps(raw, default=str))
    # Another method first: the keys of the file's method that it does not have go, given ones stay.
    for key, value in sorted(values.items(), key=lambda item: item[0] != "algorithm.name"):
        path = key.split(".")
        node = raw
        for part in path[:-1]:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{key}: {part} is a value, not a section")
            node = child
        if path == ["algorithm", "name"] and value in algorithm_names():
            known = _tree_at(["algorithm"], value)
            raw["algorithm"] = {k: v for k, v in node.items() if known and k in known.model_fields}
            node = raw["algorithm"]
        node[path[-1]] = value
    return raw


T = TypeVar("T")


class Staged(Generic[T]):
    """Something that is made of the config in force, once for each stage."""

    def __init__(self, config: Config, make: Callable[[Config], T]) -> None:
        self._begin = [0, *(stage.at for stage in config.stages)]
        self._made = [make(config.at(step)) for step in self._begin]

    def at(self, step: int) -> T:
        """That of a meta-step."""
        return self._made[bisect_right(self._begin, step) - 1]


def validate(raw: dict[str, Any], origin: str) -> Config:
    """The typed tree of a raw mapping; `origin` names the file in messages."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {one_line(error, raw)}") from error


def to_yaml(config: Config) -> str:
    """The config as a job file, every key written out, in the tree's order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# --- resolving ---------------------------------------------------------------


def resolve(config: Config) -> Config:
    """Every `auto` replaced by its rule.

    - `task.shard`: the largest divisor of the meta-batch that is at most 8 and, where
      the meta-batch allows, leaves 2 shards or more;
    - `engine.mode`: vectorised;
    - `engine.device`: cuda where a GPU share is declared, or where the workers run on the
      driver's machine and it has a GPU for each of them; else cpu;
    - `cluster.cpus`: `engine.threads`;
    - `cluster.gpus`: 0 on cpu; on cuda 1, or where the workers run on the driver's machine
      an equal share of its GPUs, if that is less.

    `tracking.uri` stays, because its rule needs the run folder; `cluster.sums` and `cluster.aggregators` stay, because
    theirs needs the size of θ (`runtime/cut.py`) and no bit depends on them.
    """
    gpus, device = config.cluster.gpus, config.engine.device
    workers = max(1, config.cluster.most)
    here = config.cluster.workers == 0 or config.cluster.address == "local"
    visible = visible_gpus() if here and device != "cpu" else 0
    if device == "auto":
        device = "cuda" if (gpus != "auto" and gpus > 0) or (gpus == "auto" and visible >= workers) else "cpu"
    share = min(1.0, visible / workers) if here and visible else 1.0
    if device == "cpu" and gpus not in ("auto", 0, 0.0):
        raise ConfigError(f"cluster.gpus: {gpus} reserves GPUs that engine.device=cpu would not use")
    if device == "cpu" and config.engine.precision == "tf32":
        raise ConfigError("engine.precision: tf32 is for engine.device=cuda; on cpu full and bf16 are valid")
    return config.with_values(
        task={"shard": config.shard},
        engine={"mode": "vectorised" if config.engine.mode == "auto" else config.engine.mode, "device": device},
        cluster={
            "cpus": float(config.engine.threads) if config.cluster.cpus == "auto" else config.cluster.cpus,
            "gpus": (share if device == "cuda" else 0.0) if gpus == "auto" else gpus,
        },
    )


def default_shard(meta_batch: int) -> int:
    """The rule behind `task.shard: auto`."""
    most = min(8, max(1, meta_batch // 2))
    return max(size for size in range(1, most + 1) if meta_batch % size == 0)


def visible_gpus() -> int:
    """Of this machine, to this process."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


# --- what a resume may change --------------------------------------------------

FREE_ON_RESUME = ("cluster", "checkpoint", "eval", "tracking", "jobs", "storage", "data.root", "data.shared")
"""Keys and sections that do not touch the meta-parameters; `outer.steps` joins them without a schedule."""


def mathematics(config: Config) -> dict[str, Any]:
    """Dotted key → value of all that determines the final bits."""
    flat = dict(_flatten(config.model_dump(mode="json")))
    free = FREE_ON_RESUME + (
        () if any(each.stretches for each in config.outer.optimizers.values()) else ("outer.steps",)
    )
    return {
        key: value
        for key, value in flat.items()
        if not any(key == f or key.startswith(f + ".") for f in free)
        and not (key.startswith("data.name.") and key.endswith(".root"))
    }


def refuse_changed_mathematics(before: Config, after: Config) -> None:
    """A resumed run keeps its mathematics; one line names the first key that would not."""
    was, becomes = before.cluster.strategy, after.cluster.strategy
    if was != becomes and "async" in (was, becomes):
        raise ConfigError(
            f"cluster.strategy: was {was} and cannot become {becomes} on resume; async takes its steps from other sums"
        )
    old, new = mathematics(before), mathematics(after)
    # Another method has other keys; its name says more than they do.
    for key in sorted(dict.fromkeys([*old, *new]), key=lambda key: not key.endswith(".name")):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{key}: was {old.get(key)} and cannot become {new.get(key)} on resume, it changes the mathematics; "
                f"what may change: {', '.join(FREE_ON_RESUME)}, and outer.steps with a constant or halving schedule"
            )


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and all(isinstance(v, dict) for v in value):
            for index, item in enumerate(value):
                yield from _flatten(item, f"{prefix}{key}.{index}.")
        else:
            yield prefix + key, value


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key → value of the whole tree."""
    return dict(_flatten(config.model_dump(mode="json")))


# --- messages ----------------------------------------------------------------


def one_line(error: ValidationError, raw: dict[str, Any], root: type[Tree] | None = None) -> str:
    """The first problem, told with the key's dotted name and the nearest valid one."""
    # Of a union's alternatives, the one that got furthest is the one that was meant.
    first = max(error.errors(), key=lambda problem: len(problem["loc"]))
    path = [str(part) for part in first["loc"]]
    # A discriminated union puts the chosen tag into the location; a person never wrote it.
    tag = raw.get("algorithm", {}).get("name", "maml") if isinstance(raw.get("algorithm"), dict) else None
    if len(path) > 1 and path[0] == "algorithm" and path[1] == tag:
        del path[1]
    path = [part for part in path if not part.startswith(("list[", "constrained-", "literal[", "function-"))]
    path = [part for part in path if part not in ("str", "int", "float", "bool")]
    key = ".".join(path)
    kind, given = first["type"], first.get("input")
    if kind == "extra_forbidden" and key == "search":
        return "search: is read by `metadist search`; what it finds is trained from best.yaml in its folder"
    if kind == "extra_forbidden":
        owner = _tree_at(path[:-1], tag, root)
        names = list(owner.model_fields) if owner else []
        prefix = ".".join([*path[:-1], ""])
        return f"unknown key {key}{_did_you_mean(path[-1], names, prefix) or _choices([prefix + n for n in names])}"
    if kind == "union_tag_invalid":
        names = sorted(str(first["ctx"]["expected_tags"]).replace("'", "").split(", "))
        instead = "; it is maml with algorithm.order=1" if tag == "fomaml" else _did_you_mean(str(tag), names)
        return f"algorithm.name: {tag!r} is no method{instead or _choices(names)}"
    if kind == "union_tag_not_found":
        return "algorithm.name: says which method; it is missing" + _choices(algorithm_names())
    if kind == "value_error":
        message = str(first["ctx"]["error"])
        return f"{key}.{message}" if key else message
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {message}, not {given!r}"


def algorithm_names() -> list[str]:
    """Every valid `algorithm.name`."""
    return [method.method_name() for method in every_method()]


def _tree_at(path: Sequence[str], tag: str | None, root: type[Tree] | None = None) -> type[Tree] | None:
    """The class of the tree's node at a dotted path, for naming its keys."""
    node: Any = root or Config
    for part in path:
        if part.isdigit():
            continue
        if not (isinstance(node, type) and issubclass(node, Tree)) or part not in node.model_fields:
            return None
        node = node.model_fields[part].annotation
        candidates = [a for a in _leaves(node) if isinstance(a, type) and issubclass(a, Tree)]
        tagged = [c for c in candidates if "name" in c.model_fields and c.model_fields["name"].default == tag]
        node = (tagged or candidates or [None])[0]  # type: ignore[list-item]
    return node if isinstance(node, type) and issubclass(node, Tree) else None


def _leaves(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is None:
        yield annotation
    else:
        for argument in typing.get_args(annotation):
            yield from _leaves(argument)


def _did_you_mean(word: str, names: Any, prefix: str = "") -> str:
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _choices(names: Any) -> str:
    return f"; valid: {', '.join(sorted(names))}"
