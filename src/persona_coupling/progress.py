"""What a run will cost, and how far it is: estimates from measured speeds, one bar with an ETA."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_coupling.errors import UserError
from persona_coupling.store import Lab, Stage, Store, Work

# tokens per second of SmolLM2-135M: two AVX2 cores in fp32, and eager TRL / generate on one H100 (first guesses only:
# every finished stage corrects them for this machine)
SPEEDS = {
    "cpu": {"trained": 220.0, "sampled": 130.0, "scored": 450.0},
    "cuda": {"trained": 4_500.0, "sampled": 15_000.0, "scored": 100_000.0},
}
MEMORY = 0.3  # weight of a new observation in the running correction


class Speeds:
    """Seconds per stage on this machine: first guesses, corrected per kind of stage by what was observed."""

    def __init__(self, root: Path, device: str, parameters_ratio: float = 1.0) -> None:
        self.path = root / "speeds.json"
        self.device = "cuda" if device.startswith("cuda") else "cpu"
        self.ratio = parameters_ratio  # model size relative to SmolLM2-135M
        try:
            self.factors: dict[str, float] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.factors = {}

    def _guess(self, work: Work) -> float:
        speeds = SPEEDS[self.device]
        tokens = work.trained / speeds["trained"] + work.sampled / speeds["sampled"] + work.scored / speeds["scored"]
        return tokens * self.ratio + work.seconds + 0.05

    def _name(self, stage: Stage) -> str:
        return f"{self.device}/{type(stage).__name__}/{self.ratio:.3g}"

    def seconds(self, stage: Stage) -> float:
        """Expected seconds of a stage."""
        return self._guess(stage.work()) * self.factors.get(self._name(stage), 1.0)

    def observe(self, stage: Stage, seconds: float) -> None:
        """Learn from a finished stage; a file that cannot be written only costs accuracy of the next estimate."""
        observed = seconds / self._guess(stage.work())
        before = self.factors.get(self._name(stage))
        self.factors[self._name(stage)] = observed if before is None else (1 - MEMORY) * before + MEMORY * observed
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.factors, indent=1, sort_keys=True), encoding="utf-8")
        except OSError:
            return


def parameters_ratio(model: Any) -> float:
    """Size of a profile's model relative to SmolLM2-135M, from its name or shape; for estimates only."""
    import re

    if model.kind == "tiny":
        return 0.002
    match = re.search(r"(\d+(?:\.\d+)?)\s*([bm])\b", model.name.lower())
    if match is None:
        return 1.0
    return float(match.group(1)) * (1000 if match.group(2) == "b" else 1) / 135


@dataclass(frozen=True)
class Plan:
    """What will be built."""

    stages: list[Stage]
    missing: list[Stage]
    seconds: float
    megabytes: float

    def text(self) -> str:
        """For people: by kind, how many are cached, how many are to be made, and how long that takes."""
        lines = []
        for kind in dict.fromkeys(stage.kind for stage in self.stages):
            total = sum(s.kind == kind for s in self.stages)
            left = sum(s.kind == kind for s in self.missing)
            lines.append(f"  {kind:<12} {total:>4} in all, {total - left:>4} cached, {left:>4} to make")
        time = f"{self.seconds / 60:.0f} min" if self.seconds >= 90 else f"{self.seconds:.0f} s"
        lines.append(f"  estimated: {time}, {self.megabytes:.0f} MB of disk")
        return "\n".join(lines)


def plan(stages: list[Stage], store: Store, speeds: Speeds) -> Plan:
    """What of `stages` the store lacks, with minutes and disk. Raises UserError if the disk is too small."""
    missing = [stage for stage in stages if not store.has(stage)]
    seconds = sum(speeds.seconds(stage) for stage in missing)
    megabytes = sum(stage.work().megabytes for stage in missing)
    place = next(p for p in (store.root, *store.root.parents) if p.exists())
    free = shutil.disk_usage(place).free / 2**20
    if free < 1.2 * megabytes + 100:
        raise UserError(
            f"The run needs about {megabytes:.0f} MB, and the disk that holds {store.root} has {free:.0f} MB free. "
            "Free some space, or set PERSONA_COUPLING_CACHE to a folder on a larger disk."
        )
    return Plan(stages, missing, seconds, megabytes)


def running_lab(store: Store, device: str) -> Lab:
    """A lab that shows one small bar per stage it builds: for notebooks opened by hand."""
    from tqdm.auto import tqdm

    bar = tqdm(total=100, unit="%", leave=False, desc="stage", disable=not sys.stderr.isatty())

    def report(fraction: float) -> None:
        bar.n = round(100 * fraction)
        bar.refresh()

    return Lab(store, device=device, report=report, say=bar.write)


def build(planned: Plan, store: Store, device: str, speeds: Speeds, say: Callable[[str], None] = print) -> None:
    """Build what is missing, parents first, under one bar: expected seconds done, stages done, ETA."""
    import time

    from tqdm import tqdm

    if not planned.missing:
        return
    costs = [speeds.seconds(stage) for stage in planned.missing]  # fixed now: what is learnt on the way is for later
    layout = "{desc:<26.26} {percentage:3.0f}%|{bar:24}| [{elapsed} < {remaining}]"
    interval = 0.5 if sys.stdout.isatty() else 20.0  # seconds between lines in a log file
    with tqdm(total=sum(costs), bar_format=layout, dynamic_ncols=True, file=sys.stdout, mininterval=interval) as bar:
        done = 0.0
        for number, (stage, expected) in enumerate(zip(planned.missing, costs, strict=True), start=1):
            bar.set_description_str(f"{number}/{len(planned.missing)} {type(stage).__name__}", refresh=False)

            def report(fraction: float, done: float = done, expected: float = expected) -> None:
                bar.update(done + min(1.0, fraction) * expected - bar.n)

            started, cached = time.monotonic(), store.has(stage)
            Lab(store, device=device, report=report, say=bar.write).folder(stage)
            if not cached:
                speeds.observe(stage, time.monotonic() - started)
            done += expected
            bar.update(done - bar.n)
    say(f"{len(planned.missing)} stages made.")
