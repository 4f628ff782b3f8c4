"""What a search's ledger says of its trials. The trials as they stand are a fold of the events.

Events, by their `event`; each has `seconds`, those that drivers have spent on the search so far:

- `trial` {id, index, origin, values}: is started;
- `report` {id, step, values, decision, why}: a validation, and what was answered;
- `retry` {id, attempt, reason}: its process died; it goes on from its last checkpoint;
- `end` {id, how, step, reason, facts};
- `held` {id}: a member of a population has come to the end of its generation;
- `generation` {step, moves}: what the members do next, each move {id, donor, values};
- `grafted` {step}: it is done, and all go on;
- `budget` {minutes}: no trial is started any more, unless the budget is raised;
- `exhausted` {reason}: no trial is started any more, the conditions allow none of those that would come.

A number that is not finite stands as a word: nan, inf or -inf. Events of other names say nothing of trials.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from metadist.search.ledger import Event
from metadist.search.state import End, Report, Trial

OWN = ("trial", "report", "retry", "end", "held", "generation", "grafted", "budget", "exhausted")


def trials_of(events: Iterable[Event]) -> list[Trial]:
    """As they stand behind the last event, in the order of their index."""
    trials: list[Trial] = []
    for event in events:
        fold(trials, event)
    return trials


def fold(trials: list[Trial], event: Event) -> None:
    """Let an event happen to the trials."""
    match event:
        case {"event": "trial", "id": id, "index": index, "origin": origin, "values": values}:
            trials.append(Trial(id, index, origin, values))
        case {"event": "report", "id": id, "step": step, "values": told, "decision": decision, "why": why}:
            values = {name: float(value) for name, value in told.items()}
            trials[int(id)].reports.append(Report(step, values, decision, why))
        case {"event": "retry", "id": id, "attempt": attempt}:
            trials[int(id)].attempt = attempt
        case {"event": "held", "id": id}:
            trials[int(id)].held = True
        case {"event": "generation", "step": step, "moves": moves}:
            for move in moves:
                member, donor = trials[int(move["id"])], trials[int(move["donor"])]
                member.drawn = member.drawn or member.values
                changed = {key: value for key, value in move["values"].items() if donor.now[key] != value}
                member.values = donor.values
                member.stages = [*donor.stages, *([(step, changed)] if changed else [])]
        case {"event": "grafted", "step": step}:
            for trial in trials:
                trial.held, trial.released = False, step
        case {"event": "end", "id": id, "how": how, "step": step, "reason": reason, "facts": facts}:
            trials[int(id)].end = End(how, step, reason, facts)


def plain(value: Any) -> Any:
    """As JSON has it, and reads it again."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
