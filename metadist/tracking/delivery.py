"""How much of a run has been delivered: `RUN/tracking.json`."""

import dataclasses
import json
import uuid
from pathlib import Path

from metadist import durable


@dataclasses.dataclass
class Delivery:
    """What the tracking server has confirmed, written after each confirmed piece.

    A crash between the confirmation and the file repeats one piece at most; MLflow
    keeps one copy of a metric point that arrives twice.
    """

    uri: str = ""
    experiment: str = ""
    experiment_id: str = ""
    token: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    """A tag of the MLflow run, by which one is found whose creation was not confirmed."""
    run_id: str | None = None
    parent: str | None = None
    """The MLflow run under which this one is shown."""
    delivered: dict[str, int] = dataclasses.field(default_factory=dict)
    """Metric → last delivered step; each its own, because a validation may be written after its row."""
    config_sha256: str | None = None
    result_sha256: str | None = None
    """The result that `model_id`, `model_logged` and `finished` speak of."""
    model_id: str | None = None
    model_logged: bool = False
    finished: bool = False
    closed: int | None = None
    """Where MLflow knows that the run has ended without a result: when its metrics were written, in nanoseconds."""
    problem: str | None = None
    """Why the last attempt did not deliver everything."""

    @property
    def delivered_step(self) -> int:
        """The last meta-step of which anything was delivered; -1 before the first."""
        return max(self.delivered.values(), default=-1)


def read(run_dir: Path) -> Delivery:
    """The delivery of a run; a fresh one where nothing, or nothing readable, was delivered yet."""
    try:
        raw = json.loads((run_dir / "tracking.json").read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(Delivery)}
        return Delivery(**{key: value for key, value in raw.items() if key in known})
    except (OSError, ValueError, AttributeError):
        return Delivery()


def write(run_dir: Path, delivery: Delivery) -> None:
    """Replace `tracking.json` in one step."""
    durable.write(run_dir / "tracking.json", (json.dumps(dataclasses.asdict(delivery), indent=1) + "\n").encode())
