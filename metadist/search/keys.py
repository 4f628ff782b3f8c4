"""The section `search` of a job file."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from metadist.config import Config
from metadist.measure import MEASURES
from metadist.search.space import Condition, Domain, Grid, read_space
from metadist.tree import Count, Number, Positive, Rate, Seed, Tree

Fraction = Annotated[float, Field(gt=0, lt=1), Number]

PACKED = ("algorithm.inner_lr", "outer.lr", "seed")
"""Keys in which trials that are computed together may differ: they change no shape and no task."""

COSTS = ("adaptation_mflop", "seconds", "peak_memory")
"""Metrics that are better when they are small, and that every trial has at its end; others are the measure's."""


class Search(Tree):
    """How trials are drawn, stopped and chosen among."""

    space: Annotated[dict[str, Domain], BeforeValidator(read_space), Field(min_length=1)] = Field(
        description="searched keys, each with {uniform: [a, b]}, {loguniform: [a, b]}, {randint: [a, b]}, both "
        "included, {choice: [...]} or {grid: [...]}"
    )
    conditions: list[Condition] = Field([], description="{when: {key: …}, need: {key: …}}; other points are not tried")
    trials: Annotated[Positive, BeforeValidator(lambda given: 16 if given is None else given)] = Field(
        16, description="trials to start, the baseline among them; left out, or null, a grid is tried whole"
    )
    concurrent: Positive = Field(2, description="trials at once")
    pack: Positive = Field(
        1,
        description="trials that one process computes together, of `concurrent`; where their last digits differ from "
        "those of a run alone, the winner is trained again by itself",
    )
    searcher: Literal["random", "grid", "optuna"] = Field("optuna", description="who proposes points; optuna: TPE")
    scheduler: Literal["fifo", "asha", "median", "pbt"] = Field(
        "asha", description="who stops trials early; fifo: nobody; pbt: the worst take over the best one's state"
    )
    metric: Literal["accuracy", "mse", "loss"] | None = Field(
        None, description="of a validation, by which trials are stopped and chosen; accuracy of classes, mse of numbers"
    )
    mode: Literal["max", "min"] | None = Field(None, description="which is better; of accuracy max, else min")
    seed: Seed = Field(0, description="of the search, not of its runs")
    also: list[str] = Field([], description="further aims beside the validation's score, all small: a Pareto table")
    reduction: Annotated[int, Field(ge=2), Number] = Field(2, description="of asha: the best 1/reduction goes on")
    grace: Positive | None = Field(
        None, description="of asha and median: meta-steps that every trial takes; eval.every"
    )
    samples: Positive = Field(3, description="of median: other trials that must have come as far")
    interval: Positive | None = Field(None, description="of pbt: meta-steps of a generation; eval.every")
    quantile: Annotated[float, Field(gt=0, le=0.5), Number] = Field(0.25, description="of pbt: share that is replaced")
    perturb: tuple[Annotated[float, Field(gt=0, lt=1), Number], Annotated[float, Field(gt=1), Number]] = Field(
        (0.8, 1.25), description="of pbt: factors of a number, to less and to more"
    )
    resample: Annotated[float, Field(ge=0, le=1), Number] = Field(
        0.25, description="of pbt: chance of a value drawn anew"
    )
    startup: Count | None = Field(None, description="of optuna: trials drawn at random first; a third, at most 10")
    baseline: bool = Field(True, description="the first trial is the job's own values, and is never stopped early")
    finalists: Positive = Field(3, description="best trials that are judged again, on more tasks, to choose the winner")
    selection: Positive = Field(1000, description="validation tasks on which finalists are judged")
    fresh: Positive = Field(1000, description="validation tasks nobody has seen, on which the winner's gain is told")
    retries: Count = Field(1, description="of a trial whose process died")
    budget: Rate | None = Field(
        None,
        description="minutes of all drivers together after which no further trial is started; may change on resume",
    )

    @model_validator(mode="after")
    def _each_key_is_read(self) -> "Search":
        for key, reader, value in (("reduction", "asha", 2), ("samples", "median", 3)):
            if getattr(self, key) != value and self.scheduler != reader:
                raise ValueError(f"{key}: is read by search.scheduler={reader} only, not by {self.scheduler}")
        if self.grace is not None and self.scheduler not in ("asha", "median"):
            raise ValueError(f"grace: is read by search.scheduler=asha or median only, not by {self.scheduler}")
        for key in ("interval", "quantile", "perturb", "resample"):
            if getattr(self, key) != type(self).model_fields[key].default and self.scheduler != "pbt":
                raise ValueError(f"{key}: is read by search.scheduler=pbt only, not by {self.scheduler}")
        if self.scheduler == "pbt" and self.searcher != "random":
            raise ValueError(f"searcher: a population begins at random; valid is random, not {self.searcher}")
        if self.startup is not None and self.searcher != "optuna":
            raise ValueError(
                f"startup: is read by search.searcher=optuna only, not by {self.searcher}; "
                f"search.startup=null leaves it out"
            )
        other = next((key for key, domain in self.space.items() if not isinstance(domain, Grid)), None)
        if self.searcher == "grid" and other is not None:
            raise ValueError(f"space.{other}: search.searcher=grid wants {{grid: [...]}} for every key")
        if self.also and self.scheduler != "fifo":
            raise ValueError(
                "also: trials that are stopped early have no costs to compare; valid with search.scheduler=fifo"
            )
        for name in self.also:
            if name not in COSTS:
                raise ValueError(f"also: {name!r} is no cost; valid: {', '.join(COSTS)}")
        return self

    def fits(self, base: Config) -> None:
        """Raise ValueError where it does not go with the run."""
        every, last = base.eval.every, base.outer.steps
        if not every or every > last:
            raise ValueError(f"eval.every: trials are compared on validations; {every} is none in outer.steps={last}")
        valid = (MEASURES[base.kind].name, "loss")
        if self.metric not in (None, *valid):
            raise ValueError(f"search.metric: {base.kind} has no {self.metric}; valid: {', '.join(valid)}")
        if self.interval is not None and self.interval % every:
            raise ValueError(f"search.interval: {self.interval} meta-steps are not a multiple of eval.every={every}")
        if self.grace is not None and self.grace % every:
            raise ValueError(f"search.grace: {self.grace} meta-steps are not a multiple of eval.every={every}")
        if self.pack > 1:
            self._packs(base)

    def _packs(self, base: Config) -> None:
        """Refuse what cannot be computed together."""
        packed = f"search.pack={self.pack}"
        if self.scheduler == "pbt":
            raise ValueError(
                f"search.scheduler: pbt changes values on the way; valid with {packed}: fifo, asha, median"
            )
        for key in self.space:
            if key not in PACKED:
                raise ValueError(f"search.space.{key}: trials of {packed} differ in {', '.join(PACKED)} only")
        if self.concurrent % self.pack:
            raise ValueError(
                f"search.concurrent: {self.concurrent} trials at once are no whole packs; valid with {packed} is a "
                f"multiple of it, such as {self.pack}"
            )
        for cost in ("seconds", "peak_memory"):
            if cost in self.also:
                raise ValueError(
                    f"search.also: {cost} of a trial is not known within a pack; valid with {packed}: adaptation_mflop"
                )
        if base.cluster.most:
            raise ValueError(f"cluster.workers: a pack computes in one process; valid with {packed} is 0")
        if base.algorithm.compares_tasks:
            raise ValueError(f"algorithm.name: {base.algorithm.name} compares the tasks of a shard and is not packed")
        if base.engine.mode == "loop":
            raise ValueError(f"engine.mode: a pack is computed all at once; valid with {packed} is vectorised")
        for key, off in (("local", None), ("compression", "none")):
            if getattr(base.outer, key) != off:
                raise ValueError(f"outer.{key}: packed trials send their shards as they are; leave it out")

    @property
    def processes(self) -> int:
        """At once, of a pack or of a trial each."""
        return self.concurrent // self.pack

    def pack_of(self, index: int) -> int:
        """Number of the pack that a trial belongs to. The job's own run is one alone, to the bits of any other run."""
        if self.baseline and index == 0:
            return 0
        return self.baseline + (index - self.baseline) // self.pack

    def generation(self, base: Config) -> int:
        """Meta-steps between two moves of a population."""
        return self.interval or base.eval.every

    def first_rung(self, base: Config) -> int:
        """Meta-steps that every trial takes."""
        return self.grace or base.eval.every


def first_random(search: Search) -> int:
    """Trials that optuna's searcher draws at random before it models."""
    return min(10, -(-search.trials // 3)) if search.startup is None else search.startup
