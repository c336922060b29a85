"""What a run will cost, and how far it is: estimates from measured speeds, one bar with an ETA."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
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
        self.factors: dict[str, float]
        self.path = root / "speeds.json"
        self.device = "cuda" if device.startswith("cuda") else "cpu"
        self.ratio = parameters_ratio  # model size relative to SmolLM2-135M
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            self.factors = {str(name): float(factor) for name, factor in stored.items()}
        except (AttributeError, OSError, TypeError, ValueError):
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
    seconds = sum((speeds.seconds(stage) for stage in missing), 0.0)
    megabytes = sum((stage.work().megabytes for stage in missing), 0.0)
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
    from tqdm import tqdm

    bar = tqdm(total=100, unit="%", leave=False, desc="stage", disable=not sys.stderr.isatty())

    def report(fraction: float) -> None:
        bar.n = round(100 * fraction)
        bar.refresh()

    return Lab(store, device=device, report=report, say=bar.write)


def build(planned: Plan, store: Store, device: str, speeds: Speeds, *, workers: int = 1) -> None:
    """Build what is missing, parents first, under one bar: expected seconds done, stages done, ETA."""
    from tqdm import tqdm

    if not planned.missing:
        return
    costs = {s.key: speeds.seconds(s) for s in planned.missing}  # fixed now: what is learnt on the way is for later
    layout = "{desc:<26.26} {percentage:3.0f}%|{bar:24}| [{elapsed} < {remaining}]"
    interval = 0.5 if sys.stdout.isatty() else 20.0  # seconds between lines in a log file
    with tqdm(
        total=sum(costs.values()), bar_format=layout, dynamic_ncols=True, file=sys.stdout, mininterval=interval
    ) as bar:
        make = _one_by_one if workers == 1 else _side_by_side
        make(planned.missing, costs, store, device, speeds, bar, workers)
    print(f"{len(planned.missing)} stages made.")


def _one_by_one(
    missing: list[Stage], costs: dict[str, float], store: Store, device: str, speeds: Speeds, bar: Any, _workers: int
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
        done += expected
        bar.update(done - bar.n)


def _side_by_side(
    missing: list[Stage], costs: dict[str, float], store: Store, device: str, speeds: Speeds, bar: Any, workers: int
) -> None:
    """Stages whose parents are made go to a pool of processes, the longest ready one first. When one fails, whatever
    does not rest on it is still built; then the first error is raised."""
    waiting = {stage.key: stage for stage in missing}
    running: dict[Any, Stage] = {}
    failed: dict[str, BaseException] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(workers,)) as pool:
        try:
            while waiting or running:
                for stage in [s for s in waiting.values() if any(parent.key in failed for parent in s.parents())]:
                    failed[stage.key] = RuntimeError("a parent failed")
                    del waiting[stage.key]
                undone = waiting.keys() | {stage.key for stage in running.values()}
                ready = [s for s in waiting.values() if not any(parent.key in undone for parent in s.parents())]
                for stage in sorted(ready, key=lambda s: -costs[s.key])[: workers - len(running)]:
                    del waiting[stage.key]
                    running[pool.submit(_make, stage, store.root, device)] = stage
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    stage = running.pop(future)
                    error = future.exception()
                    if error is None:
                        speeds.observe(stage, future.result())
                    else:
                        failed[stage.key] = error
                        bar.write(f"{stage} failed: {error}")
                    bar.update(costs[stage.key])
                made = len(missing) - len(waiting) - len(running) - len(failed)
                bar.set_description_str(f"{made}/{len(missing)} {len(running)} running", refresh=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise next(iter(failed.values()))


def _start_worker(workers: int) -> None:
    import os

    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def _make(stage: Stage, root: Path, device: str) -> float:
    """Build one stage in a worker. Returns its seconds."""
    started = time.monotonic()
    Lab(Store(root), device=device).folder(stage)
    return time.monotonic() - started
