"""What is submitted: a person's words become one job for a cluster, checked, with an id of its own.

The entry point on the cluster reads its own words by the same function. It stays there as long as the job does, so a
training, most of all jobs, brings no torch with it.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from metadist.config import (
    Config,
    Data,
    apply_overrides,
    find_job,
    load,
    one_line,
    parse_override,
    read_yaml,
    resolve,
    to_yaml,
    validate,
    with_keys,
)
from metadist.data.sources import check as check_source
from metadist.errors import ConfigError
from metadist.submit.package import JOB, code_hash
from metadist.tracking.destination import check_uri, masked

VERBS = ("train", "search", "evaluate", "reproduce")
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "file")
LOCAL = "file"
"""Of SCHEMES, the one that is a disk of whoever reads it."""
LAST_COPY = 60
"""Seconds beyond `checkpoint.grace` that a job that is stopped has for storing its last checkpoint."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Options(NamedTuple):
    """Of `evaluate` and `reproduce`, as on their own command lines."""

    best: bool = False
    split: str = "test"
    methods: str | None = None
    settings: str | None = None
    budget: str = "short"

    @property
    def words(self) -> list[str]:
        """Those that are not as they would be anyway."""
        given = [(name, value) for name, value in self._asdict().items() if value != Options._field_defaults[name]]
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given]


NO_OPTIONS = Options()


class Submission(NamedTuple):
    """One job.

    run: the id of what is stored, a run's or a search's folder; id: of this job, the same but for an evaluation;
    job: the resolved job file, of a training or a search; words: for the entry point on the cluster; identity: hash
    of everything that determines what is computed, the code among it; config: `jobs`, `storage` and `checkpoint` of it.
    """

    verb: str
    id: str
    run: str
    job: str | None
    words: list[str]
    identity: str
    config: Config

    @property
    def stop_seconds(self) -> int:
        """From SIGTERM to the end of a job that is stopped, at most."""
        return math.ceil(self.config.checkpoint.grace) + LAST_COPY

    @property
    def environment(self) -> dict[str, str]:
        """Of the entry point; Ray reads it."""
        return {"RAY_JOB_STOP_WAIT_TIME_S": str(self.stop_seconds)}


def submission(words: Sequence[str], options: Options = NO_OPTIONS, id: str | None = None) -> Submission:
    """The job that `[VERB] JOB [KEY=VALUE]…` asks for. Raises ConfigError and DataError, before anything is sent.

    Without a verb it is a training, or a search where the job file is one of a search. JOB is a job file or a packaged
    job's name; of `evaluate` the id of a run, of `reproduce` a table.
    """
    named = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    verb = named.pop(0) if named and named[0] in VERBS else ""
    if len(named) != 1:
        told = f"{' and '.join(named)} are {len(named)}" if named else "none is named"
        raise ConfigError(f"one job at a time: {told}; `metadist submit [{'|'.join(VERBS)}] JOB [KEY=VALUE]...`")
    (name,) = named
    if not verb:
        verb = "search" if "search" in read_yaml(find_job(name)) else "train"
    _refuse_unread(verb, options)
    _refuse_another_cluster(overrides)
    job, rest = None, [name, *options.words]
    if verb == "train":
        config = _training(name, overrides)
        job = to_yaml(config)
    elif verb == "search":
        job, config = _search(name, overrides)
    else:
        ours = [word for word in overrides if _is_ours(word)]
        theirs = [word for word in overrides if not _is_ours(word)]
        config = validate(apply_overrides({}, ours), "override")
        rest = [name, *theirs, *options.words]
        (_check_evaluation if verb == "evaluate" else _check_table)(name, theirs, options)
        rest += ours
    _check_storage(config.storage)
    what = [verb, job] if job is not None else [verb, *rest]
    identity = hashlib.sha256(json.dumps([what, code_hash()]).encode()).hexdigest()
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(name).stem if job is not None else f"{verb}-{name}")
    named_so = id or f"{stem.lstrip('.-_')[:80]}-{identity[:12]}"
    if not NAME.fullmatch(named_so):
        raise ConfigError(
            f"--id: {named_so!r} is no id; valid are letters, digits, '.', '_' and '-', at most a hundred"
        )
    run = name if verb == "evaluate" else named_so
    return Submission(verb, named_so, run, job, [verb, *([JOB] if job is not None else rest)], identity, config)


def outlives_a_host(storage: str) -> bool:
    """Whether a storage is the same one wherever it is read: a bucket is, a folder or `file://` is a host's disk."""
    scheme, found, _ = storage.partition("://")
    return bool(found) and scheme != LOCAL


def _refuse_another_cluster(overrides: Sequence[str]) -> None:
    """A file's address is of where `train` runs it; a word that is said here would be passed over."""
    for key, value in map(parse_override, overrides):
        if key == "cluster" and isinstance(value, dict):
            key, value = "cluster.address", value.get("address", "auto")
        if key == "cluster.address" and value != "auto":
            raise ConfigError(
                f"cluster.address: {value!r}: a job runs on the cluster that it is sent to, which --address names; "
                f"valid: auto, or leave it out"
            )


def _training(name: str, overrides: Sequence[str]) -> Config:
    config = resolve(_on_the_cluster(load(name, overrides)))
    _check_run(config)
    return config


def _search(name: str, overrides: Sequence[str]) -> tuple[str, Config]:
    from metadist.search import job as searches
    from metadist.search.run import refuse_place

    asked = dict(map(parse_override, overrides))
    raw = with_keys(read_yaml(find_job(name)), asked)
    there = _on_the_cluster(validate({key: value for key, value in raw.items() if key != "search"}, name))
    raw = with_keys(raw, {"cluster.address": there.cluster.address, "engine.device": there.engine.device})
    job = searches.checked(raw, name)
    refuse_place(job)
    _check_run(job.base)
    return searches.to_yaml(job), job.base


def _on_the_cluster(config: Config) -> Config:
    """The config with its driver inside of the cluster; `auto` says nothing of the machine that submits."""
    alone = config.cluster.most == 0 and config.engine.device == "auto"
    return config.with_values(cluster={"address": "auto"}, engine={"device": "cpu"} if alone else {})


def _check_run(config: Config) -> None:
    for source in config.data.sources:
        check_source(source)
    _check_places(config.data)
    uri = config.tracking.uri
    if masked(uri) != uri or re.search(r"[?&](password|passwd|pwd)=", uri, re.IGNORECASE):
        raise ConfigError(
            "tracking.uri: holds a password, which would be sent in the job file; valid is the URI without it, and "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment of the cluster (on Kubernetes "
            "in the secret metadist-credentials)"
        )
    check_uri(uri)


def _check_places(data: Data) -> None:
    """Refuse folders that would be another one on each host."""
    places = {f"data.root of {source.name}": source.root for source in data.sources}
    for key, place in (places | {"data.root": data.root, "data.shared": data.shared}).items():
        if place is not None and "://" not in place and not place.startswith(("/", "~/")):
            raise ConfigError(f"{key}: {place!r} is relative to nothing on a cluster; valid: /FOLDER of every host")


def _check_evaluation(run: str, overrides: Sequence[str], options: Options) -> None:
    """What can be known without the run's own config."""
    from metadist.evaluate import OVERRIDABLE

    if not NAME.fullmatch(run):
        raise ConfigError(f"{run!r} is no id of a run; `metadist jobs list` has them")
    if options.split not in ("test", "val"):
        raise ConfigError(f"--split: {options.split!r} is no split to judge on; valid: test, val")
    for key, _ in map(parse_override, overrides):
        known = key.partition(".")[0] in Config.model_fields
        if known and not any(key == free or key.startswith(f"{free}.") for free in OVERRIDABLE):
            raise ConfigError(f"{key}: belongs to the training; an evaluation may change {', '.join(OVERRIDABLE)}")
    raw = apply_overrides({}, overrides)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        # Whether values go together, only the run's own config tells.
        if any(problem["type"] != "value_error" for problem in error.errors()):
            raise ConfigError(one_line(error, raw)) from error
    else:
        _check_places(config.data)


def _check_table(name: str, overrides: Sequence[str], options: Options) -> None:
    from metadist.reproduce.published import chosen, read_table
    from metadist.reproduce.rows import overrides_of

    table = read_table(name)
    for line in chosen(table, options.budget, options.methods, options.settings):
        _training(line.job, overrides_of(table, line, options.budget, overrides))


def _refuse_unread(verb: str, options: Options) -> None:
    readers = {"best": "evaluate", "split": "evaluate"}
    for key, default in Options._field_defaults.items():
        reader = readers.get(key, "reproduce")
        if getattr(options, key) != default and verb != reader:
            raise ConfigError(f"--{key}: is read by `metadist submit {reader}` only, not by {verb}")


def _is_ours(word: str) -> bool:
    key = parse_override(word)[0]
    return key == "storage" or key.partition(".")[0] == "jobs"


def _check_storage(storage: str) -> None:
    scheme, found, _ = storage.partition("://")
    if found and scheme in SCHEMES:
        return
    if found:
        raise ConfigError(f"storage: no file system is known for {scheme}://; valid: a folder, {', '.join(SCHEMES)}")
    if not storage.startswith(("/", "~/")):
        raise ConfigError(f"storage: {storage!r} is relative to nothing on a cluster; valid: /FOLDER, ~/FOLDER, a URI")
