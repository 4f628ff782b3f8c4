"""`python -m tests.faults.chaos`: one run under random faults from a seed, and the same run undisturbed.

The faults are real: signals to processes, hosts of a lab that lose their power or their cable. Nothing in the program
knows of them. A driver that ended is started again with `--resume`, as a service manager would do. At the end of its
minutes the run is ended by SIGTERM at whatever step it is at, and compared with a calm one of as many steps.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from injuries import kill, longest_gap
from places import Driver, Here, InLab, lab_of

from metadist.config import Config, to_yaml, validate
from metadist.run import resume, train
from metadist.runtime.checkpoint import checkpoints

EVERY = 25
JOB: dict[str, Any] = {
    "seed": 1,
    "data": {"name": "glyphs"},
    "task": {"ways": 3, "shots": 1, "queries": 1, "meta_batch": 24, "shard": 2},
    "model": {"name": "mlp", "width": 16, "layers": 1},
    "algorithm": {"name": "maml", "inner_lr": 0.4, "inner_steps": 1},
    "outer": {"steps": 10**7, "lr": 1e-3},
    "engine": {"device": "cpu"},
    "checkpoint": {"every": EVERY},
    "eval": {"every": 0, "test": False},
    "tracking": {"uri": "off"},
}
CALM_SECONDS = (3.0, 15.0)
"""Between two faults; some come while the run still suffers from the one before."""

SILENCE = 8.0
"""Seconds after which an aggregator that stands still is replaced; some are frozen for less, some for longer."""

WAYS = [[f"cluster.sums={sums}", f"cluster.aggregators={pieces}"] for sums in ("flat", "tree") for pieces in (1, 2)]

HANGS = 150.0
"""Seconds without a checkpoint that no fault explains."""

KNOWN_ENDS = {0: "finished", 4: "cluster lost", -9: "killed", 137: "killed", 143: "SIGTERM", -15: "SIGTERM"}
"""Exit codes of a driver that are no defect; after any of them the run can be gone on with."""


class Injected(NamedTuple):
    """A fault as it was done."""

    at: float
    kind: str
    target: str


class Soak:
    """One run, its place and what has been done to it."""

    def __init__(self, folder: Path, seed: int, place: Here | InLab, say: Callable[[str], None]) -> None:
        self.folder, self.place, self.say = folder, place, say
        self.run, self.output = folder / "run", folder / "driver.txt"
        self.drawn = random.Random(seed)
        self.injected: list[Injected] = []
        self.ends: Counter[str] = Counter()
        self.unknown_ends: list[str] = []
        self.frozen: dict[int, float] = {}
        self.cut: dict[str, float] = {}
        self.said = 0
        self.stood = 0, time.time()
        self.job = folder / "chaos.yaml"
        workers = "{min: 1, max: 3}" if isinstance(place, InLab) else "2"
        self.job.write_text(to_yaml(validate(JOB, "chaos")))
        self.words = [
            f"cluster.workers={workers}", f"cluster.address={place.address}", "cluster.timeout=120",
            f"cluster.silence={SILENCE:g}",
        ]  # fmt: skip
        self.driver = self.start()

    # --- the driver ------------------------------------------------------------------

    def start(self) -> Driver:
        begun = (self.run / "config.yaml").exists()
        if not begun:  # killed before the folder was whole
            shutil.rmtree(self.run, ignore_errors=True)
        verb = ["train", "--resume", self.run] if begun else ["train", self.job, "--run-dir", self.run]
        way = self.drawn.choice(WAYS)  # from one to another, which no bit may depend on
        return self.place.start([*verb, *self.words, *way], self.output)

    def keep_going(self) -> None:
        """Start the driver again where it ended."""
        code = self.driver.process.poll()
        if code is None:
            return
        known = KNOWN_ENDS.get(code)
        self.ends[known or f"exit code {code}"] += 1
        if known is None or "Traceback" in self.said_since():
            self.unknown_ends.append(self.said_since()[-2000:])
        self.said = len(self.driver.said)
        self.driver.end()
        self.driver = self.start()

    def notice_a_hang(self) -> None:
        """A run that stands still for minutes, although every cut cable and frozen process is mended by then."""
        if self.step != self.stood[0]:
            self.stood = self.step, time.time()
        elif time.time() - self.stood[1] > HANGS:
            self.unknown_ends.append(f"no step for {HANGS:g} s at step {self.step}:\n{self.said_since()[-2000:]}")
            self.stood = self.step, time.time()
            self.driver.signal(signal.SIGKILL)

    def said_since(self) -> str:
        return self.driver.said[self.said :]

    @property
    def step(self) -> int:
        return next((step for step, _ in checkpoints(self.run / "checkpoints")), 0)

    # --- faults ----------------------------------------------------------------------

    def one(self, name: str) -> list[int]:
        found = self.place.find(self.driver, name)
        return [self.drawn.choice(sorted(found))] if found else []

    def kill_worker(self) -> str:
        pids = self.one("ray::Worker")
        kill(*pids)
        return f"process {pids[0]}" if pids else ""

    def kill_all_workers(self) -> str:
        pids = self.place.find(self.driver, "ray::Worker")
        kill(*pids)
        return f"{len(pids)} processes" if pids else ""

    def kill_aggregator(self) -> str:
        pids = self.one("ray::Aggregator")
        kill(*pids)
        return f"process {pids[0]}" if pids else ""

    def kill_combiner(self) -> str:
        """Where the sums of a node are added, when they are."""
        pids = self.one("ray::Combiner")
        kill(*pids)
        return f"process {pids[0]}" if pids else ""

    def freeze_worker(self) -> str:
        return self._freeze("ray::Worker", 6)

    def freeze_aggregator(self) -> str:
        return self._freeze("ray::Aggregator", 2 * SILENCE)

    def _freeze(self, name: str, longest: float) -> str:
        for pid in self.one(name):
            lab_of.freeze(pid)
            self.frozen[pid] = time.time() + self.drawn.uniform(0.2, longest)
            return f"process {pid}"
        return ""

    def kill_driver(self) -> str:
        told = f"process {self.driver.pid}"
        self.driver.signal(signal.SIGKILL)
        return told

    def preempt_driver(self) -> str:
        told = f"process {self.driver.pid}"
        self.driver.signal(signal.SIGTERM)
        return told

    def damage_checkpoint(self) -> str:
        """One bit of the newest, and the driver with it: only a driver that starts reads it."""
        newest = next((path for _, path in checkpoints(self.run / "checkpoints")), None)
        if newest is None:
            return ""
        self.driver.signal(signal.SIGKILL)
        self.driver.process.wait(30)
        newest = next(path for _, path in checkpoints(self.run / "checkpoints"))
        path = newest / self.drawn.choice(["state.safetensors", "checkpoint.json"])
        content = bytearray(path.read_bytes())
        place = self.drawn.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        return f"{newest.name}/{path.name}"

    def kill_host(self) -> str:
        name = self._other_host()
        if name:
            lab_of.kill(self.lab, name)
            self.cut.pop(name, None)
        return name

    def cut_host(self) -> str:
        name = self._other_host()
        if name:
            lab_of.cut(self.lab, name)
            self.cut[name] = time.time() + self.drawn.uniform(1, 15)
        return name

    def _other_host(self) -> str:
        """Not the head, where the driver is."""
        assert isinstance(self.place, InLab)
        able = [name for name in self.place.up() if name not in {"host-0", *self.cut}]
        return self.drawn.choice(able) if able else ""

    @property
    def lab(self) -> lab_of.Lab:
        assert isinstance(self.place, InLab)
        return self.place.lab

    def mend(self, everything: bool = False) -> None:
        """Thaw, heal and add what has been away for long enough."""
        now = float("inf") if everything else time.time()
        for pid in [pid for pid, until in self.frozen.items() if until < now]:
            del self.frozen[pid]
            if lab_of.alive(pid):
                lab_of.thaw(pid)
        if isinstance(self.place, InLab):
            for name in [name for name, until in self.cut.items() if until < now]:
                del self.cut[name]
                lab_of.heal(self.lab, name)
            for name in [name for name, host in self.lab.hosts.items() if not lab_of.alive(host.pid)]:
                if everything or self.drawn.random() < 0.2:
                    lab_of.add(self.lab, name)

    # --- the soak --------------------------------------------------------------------

    def go(self, seconds: float) -> None:
        """Faults for so long."""
        kinds = [
            self.kill_worker, self.kill_all_workers, self.kill_aggregator, self.freeze_worker, self.freeze_aggregator,
            self.kill_driver, self.preempt_driver, self.damage_checkpoint, self.kill_combiner,
        ]  # fmt: skip
        weights = [4, 1, 2, 3, 1, 1, 0.5, 0.5, 1]
        if isinstance(self.place, InLab):
            kinds, weights = [*kinds, self.kill_host, self.cut_host], [*weights, 2, 2]
        ends = time.time() + seconds
        due, told = time.time() + 15, 0.0
        while time.time() < ends:
            self.keep_going()
            self.notice_a_hang()
            self.mend()
            if time.time() > due and self.step:
                (deed,) = self.drawn.choices(kinds, weights)
                at = time.time()
                if target := deed():
                    kind = deed.__name__.replace("_", " ")
                    self.injected.append(Injected(at, kind, target))
                    self.say(f"{seconds - (ends - at):6.0f} s  step {self.step:>6}  {kind}: {target}")
                due = time.time() + self.drawn.uniform(*CALM_SECONDS)
            if time.time() > told + 60:
                told = time.time()
                self.say(f"{seconds - (ends - told):6.0f} s  step {self.step:>6}")
            time.sleep(0.05)

    def end(self) -> int:
        """Mend everything, wait until the run goes on, end it where it is; the step."""
        self.mend(everything=True)
        before, until = self.step, time.time() + 180
        while self.step <= before:
            self.keep_going()
            if time.time() > until:
                raise SystemExit(f"the run does not go on from step {before}; see {self.output}")
            time.sleep(0.1)
        self.driver.signal(signal.SIGTERM)
        if (code := self.driver.process.wait(60)) != 143:
            self.unknown_ends.append(f"exit code {code} after SIGTERM:\n{self.said_since()[-2000:]}")
        return self.step


def calm(steps: int, folder: Path) -> str:
    """θ of the run that nobody disturbed, in this process."""
    job = {**JOB, "outer": {**JOB["outer"], "steps": steps}, "cluster": {"workers": 0}}
    config: Config = validate(job, "calm")
    return str(train(config, "calm", folder / "calm").result["theta_sha256"])


def stalls(soak: Soak) -> dict[str, list[float]]:
    """Longest gap between two steps after each fault, up to the next one, by kind."""
    times = [fault.at for fault in soak.injected[1:]] + [time.time()]
    found: dict[str, list[float]] = {}
    for fault, until in zip(soak.injected, times, strict=True):
        found.setdefault(fault.kind, []).append(longest_gap(soak.run, fault.at, until))
    return found


def report(
    soak: Soak, seed: int, minutes: float, steps: int, result: dict[str, Any], undisturbed: str
) -> dict[str, Any]:
    """What there is to tell."""
    gaps = stalls(soak)
    return {
        "seed": seed,
        "minutes": minutes,
        "where": f"{len(soak.lab.hosts)} hosts of a lab" if isinstance(soak.place, InLab) else "one machine",
        "cores": len(os.sched_getaffinity(0)),
        "steps": steps,
        "same_bits": result["theta_sha256"] == undisturbed,
        "theta_sha256": result["theta_sha256"],
        "calm_theta_sha256": undisturbed,
        "steps_recomputed": result["steps_recomputed"],
        "reproducible": result["reproducible"],
        "faults": {
            kind: {"times": len(found), "median_gap": sorted(found)[len(found) // 2], "longest_gap": max(found)}
            for kind, found in sorted(gaps.items())
        },
        "driver_ended": dict(soak.ends),
        "defects": soak.unknown_ends,
        "injected": [fault._asdict() for fault in soak.injected],
    }


def as_markdown(told: dict[str, Any]) -> str:
    """The same for a person."""
    lines = [
        f"# Chaos, seed {told['seed']}, {told['minutes']:g} minutes on {told['where']}, {told['cores']} cores",
        "",
        f"{told['steps']:,} meta-steps, {told['steps_recomputed']:,} of them computed again; "
        f"θ {told['theta_sha256'][:12]}, calm {told['calm_theta_sha256'][:12]}: "
        f"{'the same bits' if told['same_bits'] else 'OTHER BITS'}.",
        f"The driver ended: {', '.join(f'{n} × {how}' for how, n in told['driver_ended'].items()) or 'never'}; "
        f"each time it was started again with `--resume`.",
        "",
        "| fault | times | median gap between steps | longest |",
        "|---|---|---|---|",
    ]
    for kind, found in told["faults"].items():
        lines.append(f"| {kind} | {found['times']} | {found['median_gap']:.1f} s | {found['longest_gap']:.1f} s |")
    for defect in told["defects"]:
        lines += ["", "An end that should not be:", "", "```", defect, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """0 where the bits are the calm run's and no driver ended in an unknown way."""
    parser = argparse.ArgumentParser(description="One run under random faults, compared with a calm one.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--hosts", type=int, default=3, help="of a lab, where there can be one; 0: on this machine")
    parser.add_argument("--out", type=Path, default=Path("chaos"), help="folder of report.md and report.json")
    asked = parser.parse_args()
    say: Callable[[str], None] = lambda line: print(line, flush=True)  # noqa: E731
    place: Here | InLab = Here()
    with tempfile.TemporaryDirectory(prefix="chaos") as name:
        folder = Path(name)
        reason = lab_of.missing() if asked.hosts else "no hosts are asked for"
        if reason:
            say(f"on this machine alone: {reason}")
        else:
            place = InLab(lab_of.up(folder / "lab", asked.hosts, 1, {}))
        try:
            soak = Soak(folder, asked.seed, place, say)
            try:
                soak.go(60 * asked.minutes)
                steps = soak.end()
            finally:
                soak.driver.end()
        finally:
            if isinstance(place, InLab):
                lab_of.down(place.lab)
        result = resume(soak.run, ["cluster.workers=0", f"outer.steps={steps}"]).result
        told = report(soak, asked.seed, asked.minutes, steps, result, calm(steps, folder))
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "report.json").write_text(json.dumps(told, indent=1))
        (asked.out / "report.md").write_text(as_markdown(told))
        (asked.out / "driver.txt").write_text(soak.output.read_text())
        say(as_markdown(told))
    return 0 if told["same_bits"] and not told["defects"] else 1


if __name__ == "__main__":
    sys.exit(main())
