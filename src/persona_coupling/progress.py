"""What a run will cost, and how far it is: estimates from measured speeds, one bar with an ETA."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_coupling import memory, side_by_side
from persona_coupling.errors import UserError
from persona_coupling.machine import cpu_has_fast_bf16
from persona_coupling.store import Lab, Stage, Store, Work

if TYPE_CHECKING:
    from persona_coupling.costs import Measured
    from persona_coupling.machine import Machine

# tokens per second of SmolLM2-135M: two cores in fp32 and in bf16 where the processor multiplies it, and one H100 (first
# guesses only: every finished stage corrects them for this machine)
SPEEDS = {
    "cpu": {"trained": 220.0, "sampled": 130.0, "scored": 450.0},
    "cpu with bf16": {"trained": 320.0, "sampled": 300.0, "scored": 1_000.0},
    "cuda": {"trained": 4_500.0, "sampled": 15_000.0, "scored": 100_000.0},
}
TINY = 0.1  # times SmolLM2-135M: below, a run on a CPU is over before processes of its own would have started
LARGE = 5  # times SmolLM2-135M: from here on a model fills the card alone
SHARED = 0.5  # of the workers on one GPU are at work on the average (5.3 to 7.8 of 12: the others wait for a parent)
STACKED = 60_000.0  # trained tokens per second of a stack on one H100, its preparation included
TOLD = 0.1  # share of the work that must be done before the ETA rests on the run's own pace alone
MEMORY = 0.3  # weight of a new observation in the running correction


class Speeds:
    """Seconds per stage on this machine: first guesses, or what a GPU was `measured` to need for a model of the same shape,
    corrected per kind of stage by what was observed."""

    def __init__(
        self,
        root: Path,
        device: str,
        parameters_ratio: float = 1.0,
        *,
        stacked: bool = False,
        measured: Measured | None = None,
        sharing: int = 1,
    ) -> None:
        self.measured = measured
        self.sharing = 1 if device.startswith("cuda") else sharing  # processes that have the cores between them
        self.factors: dict[str, float]
        self.path = root / "speeds.json"
        plain = "cpu with bf16" if cpu_has_fast_bf16() else "cpu"
        self.device = "cuda" if device.startswith("cuda") else plain
        self.stacked = stacked
        self.ratio = parameters_ratio  # model size relative to SmolLM2-135M
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            self.factors = {str(name): float(factor) for name, factor in stored.items()}
        except (AttributeError, OSError, TypeError, ValueError):
            self.factors = {}

    def _guess(self, work: Work) -> float:
        speeds = SPEEDS[self.device] | ({"trained": STACKED} if self.stacked else {})
        tokens = work.trained / speeds["trained"] + work.sampled / speeds["sampled"] + work.scored / speeds["scored"]
        return self.sharing * (tokens * self.ratio + work.seconds) + 0.05

    def _expected(self, stage: Stage) -> tuple[float, str]:
        """Seconds before any correction, and the name under which their correction is kept."""
        cost = None if self.measured is None else self.measured.cost(stage)
        seconds, how = (self._guess(stage.work()), "") if cost is None else (cost.seconds, "measured/")
        if cost is None and self.stacked and stage.stack_key() is not None:
            how = "stacked/"
        return seconds, f"{self.device}/{how}{type(stage).__name__}/{self.ratio:.3g}"

    def seconds(self, stage: Stage) -> float:
        """Expected seconds of a stage."""
        expected, name = self._expected(stage)
        return expected * self.factors.get(name, 1.0)

    def observe(self, stage: Stage, seconds: float) -> None:
        """Learn from a finished stage; a file that cannot be written only costs accuracy of the next estimate."""
        expected, name = self._expected(stage)
        observed, before = seconds / expected, self.factors.get(name)
        self.factors[name] = observed if before is None else (1 - MEMORY) * before + MEMORY * observed
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.factors, indent=1, sort_keys=True), encoding="utf-8")
        except OSError:
            return


def parameters_ratio(model: Any) -> float:
    """Size of a profile's model relative to SmolLM2-135M, as it is known or from its name; for estimates only."""
    import re

    if model.parameters:
        return max(0.002, model.parameters / 135e6)
    if model.kind == "tiny":
        return 0.002
    match = re.search(r"(\d+(?:\.\d+)?)\s*([bm])\b", model.name.lower())
    if match is None:
        return 1.0
    return float(match.group(1)) * (1000 if match.group(2) == "b" else 1) / 135


def workers(settings: Machine, ratio: float, asked: int = 0) -> int:
    """Processes that build the stages of a model `ratio` times SmolLM2-135M: as many as `asked` for, else the machine's."""
    if asked:
        return asked
    if ratio >= LARGE or (ratio < TINY and not settings.device.startswith("cuda")):
        return 1
    return settings.workers


@dataclass(frozen=True)
class Plan:
    """What will be built."""

    stages: list[Stage]
    missing: list[Stage]
    costs: dict[str, float]  # seconds of each missing one, by key: fixed now, what is learnt on the way is for later
    seconds: float
    megabytes: float
    shortage: str = ""  # of disk, in a sentence
    turns: Mapping[str, int] = field(default_factory=dict)  # by key, for what is built side by side: earlier ones first

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


def plan(
    stages: list[Stage], store: Store, speeds: Speeds, *, check: bool = True, workers: int = 1, stack: int = 1
) -> Plan:
    """What of `stages` the store lacks, with minutes and disk: all their seconds shared out over `workers`, but no less
    than the longest chain. Raises UserError if the disk is too small; without `check` the plan says so itself."""
    missing = [stage for stage in stages if not store.has(stage)]
    costs = {stage.key: speeds.seconds(stage) for stage in missing}
    seconds = sum(costs.values(), 0.0)
    if workers > 1:
        busy = workers * (SHARED if speeds.device == "cuda" else 1.0)
        seconds = max(seconds / busy, *side_by_side.urgency(missing, costs, stack).values(), 0.0)
    megabytes = sum((megabytes_of(stage, speeds.ratio) for stage in missing), 0.0)
    place = next(p for p in (store.root, *store.root.parents) if p.exists())
    free, shortage = shutil.disk_usage(place).free / 2**20, ""
    if free < 1.2 * megabytes + 100:
        shortage = (
            f"The run needs about {megabytes:.0f} MB, and the disk that holds {store.root} has {free:.0f} MB free. "
            "Free some space, or set PERSONA_COUPLING_CACHE to a folder on a larger disk."
        )
    if check and shortage:
        raise UserError(shortage)
    return Plan(stages, missing, costs, seconds, megabytes, shortage)


def megabytes_of(stage: Stage, ratio: float) -> float:
    """Disk of a stage on a model `ratio` times SmolLM2-135M: a dense change grows with the model, an adapter with its
    widths and layers alone, about the square root (8 times for a model of 56 times the size)."""
    megabytes, training = stage.work().megabytes, getattr(stage, "training", None)
    if training is None or ratio <= 1:
        return megabytes
    return megabytes * (ratio if training.lora is None else ratio**0.5)


def running_lab(store: Store, device: str) -> Lab:
    """A lab that shows one small bar per stage it builds: for notebooks opened by hand."""
    from tqdm import tqdm

    bar = tqdm(total=100, unit="%", leave=False, desc="stage", disable=not sys.stderr.isatty())

    def report(fraction: float) -> None:
        bar.n = round(100 * fraction)
        bar.refresh()

    return Lab(store, device=device, report=report, say=bar.write)


def seconds_bar(costs: Mapping[str, float], *, seconds: float, described: int) -> Any:
    """A bar over the sum of expected seconds, its description so many characters wide, of a run planned to take `seconds`.

    The ETA is the plan's at first and more and more that of the run's pace so far: stages end in bursts, whose own pace
    says little. Seconds added in another order may exceed their sum by rounding; the bar ends there all the same.
    """
    from tqdm import tqdm

    total = sum(costs.values())

    class Bar(tqdm):
        def update(self, n: int | float | None = 1) -> bool | None:
            return super().update(min(n or 0.0, total - self.n))

        @property
        def format_dict(self) -> Any:
            found = super().format_dict
            if not (total and seconds and found["elapsed"]):
                return found
            own = min(1.0, self.n / total / TOLD)
            return {**found, "rate": own * self.n / found["elapsed"] + (1 - own) * total / seconds}

    layout = f"{{desc:<{described}.{described}}} {{percentage:3.0f}}%|{{bar:24}}| [{{elapsed}} < {{remaining}}]"
    interval = 0.5 if sys.stdout.isatty() else 20.0  # seconds between lines in a log file
    return Bar(total=total, bar_format=layout, dynamic_ncols=True, file=sys.stdout, mininterval=interval)


def build(planned: Plan, store: Store, settings: Machine, speeds: Speeds) -> None:
    """Build what is missing, parents first, under one bar: expected seconds done, stages done, ETA. With more than one
    worker, or cells that are trained together, in processes of their own."""
    if not planned.missing:
        return
    with seconds_bar(planned.costs, seconds=planned.seconds, described=26) as bar:
        if settings.workers == settings.stack == 1:
            _one_by_one(planned.missing, planned.costs, store, settings.device, speeds, bar)
        else:
            side_by_side.build(planned.missing, planned.costs, planned.turns, store, settings, speeds, bar)
    print(f"{len(planned.missing)} stages made.")


def _one_by_one(
    missing: list[Stage], costs: dict[str, float], store: Store, device: str, speeds: Speeds, bar: Any
) -> None:
    done = 0.0
    for number, stage in enumerate(missing, start=1):
        expected = costs[stage.key]
        bar.set_description_str(f"{number}/{len(missing)} {type(stage).__name__}", refresh=False)

        def report(fraction: float, done: float = done, expected: float = expected) -> None:
            bar.update(done + min(1.0, fraction) * expected - bar.n)

        started, cached = time.monotonic(), store.has(stage)
        Lab(store, device=device, report=report, say=bar.write).folder(stage)
        if not cached:
            speeds.observe(stage, time.monotonic() - started)
        if speeds.ratio >= LARGE:
            memory.release()
        done += expected
        bar.update(done - bar.n)
