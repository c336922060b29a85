"""What a run will cost, and how far it is: estimates from measured speeds, one bar with an ETA."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_coupling import memory, mps, processes
from persona_coupling.errors import UserError
from persona_coupling.machine import cpu_has_fast_bf16
from persona_coupling.store import Lab, Stage, Store, Work

if TYPE_CHECKING:
    from persona_coupling.costs import Measured

# tokens per second of SmolLM2-135M: two cores in fp32 and in bf16 where the processor multiplies it, and one H100 (first
# guesses only: every finished stage corrects them for this machine)
SPEEDS = {
    "cpu": {"trained": 220.0, "sampled": 130.0, "scored": 450.0},
    "cpu with bf16": {"trained": 320.0, "sampled": 300.0, "scored": 1_000.0},
    "cuda": {"trained": 4_500.0, "sampled": 15_000.0, "scored": 100_000.0},
}
LARGE = 5  # times SmolLM2-135M: from here on a model fills the card alone
STACKED = 60_000.0  # trained tokens per second of a stack on one H100, its preparation included
TICK = 1.0  # seconds between looks at the workers
PATIENCE, WAIT = 4, 5.0  # tries of a stage that found the card full, and seconds between them
REPORTS: Any = None  # in a worker: the queue to the builder's bar
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
    ) -> None:
        self.measured = measured
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
        return tokens * self.ratio + work.seconds + 0.05

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


@dataclass(frozen=True)
class Plan:
    """What will be built."""

    stages: list[Stage]
    missing: list[Stage]
    seconds: float
    megabytes: float
    shortage: str = ""  # of disk, in a sentence

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


def plan(stages: list[Stage], store: Store, speeds: Speeds, *, check: bool = True) -> Plan:
    """What of `stages` the store lacks, with minutes and disk. Raises UserError if the disk is too small; without
    `check` the plan says so itself."""
    missing = [stage for stage in stages if not store.has(stage)]
    seconds = sum((speeds.seconds(stage) for stage in missing), 0.0)
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
    return Plan(stages, missing, seconds, megabytes, shortage)


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


def build(planned: Plan, store: Store, device: str, speeds: Speeds, *, workers: int = 1, stack: int = 1) -> None:
    """Build what is missing, parents first, under one bar: expected seconds done, stages done, ETA. `stack` is the most
    stages that are built together where they can be; above 1 they are built in processes of their own."""
    from tqdm import tqdm

    if not planned.missing:
        return
    costs = {s.key: speeds.seconds(s) for s in planned.missing}  # fixed now: what is learnt on the way is for later
    layout = "{desc:<26.26} {percentage:3.0f}%|{bar:24}| [{elapsed} < {remaining}]"
    interval = 0.5 if sys.stdout.isatty() else 20.0  # seconds between lines in a log file
    with tqdm(
        total=sum(costs.values()), bar_format=layout, dynamic_ncols=True, file=sys.stdout, mininterval=interval
    ) as bar:
        if workers == stack == 1:
            _one_by_one(planned.missing, costs, store, device, speeds, bar)
        else:
            _side_by_side(planned.missing, costs, store, device, speeds, bar, workers, stack)
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


def _side_by_side(
    missing: list[Stage],
    costs: dict[str, float],
    store: Store,
    device: str,
    speeds: Speeds,
    bar: Any,
    workers: int,
    stack: int,
) -> None:
    """Stages whose parents are made go to a pool of processes, the longest ready ones first, in groups of up to `stack`
    where they can be built together. When one fails, whatever does not rest on it is still built; then the first error
    is raised."""
    waiting = {stage.key: stage for stage in missing}
    running: dict[Any, list[Stage]] = {}
    failed: dict[str, BaseException] = {}
    shares: dict[str, float] = {}  # of running groups, by the key of their first stage
    done = 0.0
    reports = processes.SPAWN.Queue()
    start = (workers, reports, device)
    with mps.service(device, workers, bar.write), processes.pool(workers, _start_worker, start) as pool:
        try:
            while waiting or running:
                for stage in [s for s in waiting.values() if any(parent.key in failed for parent in s.parents())]:
                    failed[stage.key] = RuntimeError("a parent failed")
                    del waiting[stage.key]
                under_way = [stage for group in running.values() for stage in group]
                ready = groups(list(waiting.values()), under_way, stack)
                ready.sort(key=lambda group: -sum(costs[stage.key] for stage in group))
                for group in ready[: workers - len(running)]:
                    for stage in group:
                        del waiting[stage.key]
                    running[pool.submit(_make, group, store.root, device)] = group
                finished, _ = wait(running, timeout=TICK, return_when=FIRST_COMPLETED)
                while not reports.empty():
                    key, fraction = reports.get()
                    shares[key] = fraction
                for future in finished:
                    group = running.pop(future)
                    broken = future.exception()
                    seconds, errors = future.result() if broken is None else (0.0, {s.key: broken for s in group})
                    for stage in group:
                        if stage.key in errors:
                            failed[stage.key] = errors[stage.key]
                            bar.write(f"{stage} failed: {errors[stage.key]}")
                        else:
                            speeds.observe(stage, seconds / len(group))
                        done += costs[stage.key]
                part = sum(shares.get(g[0].key, 0.0) * sum(costs[s.key] for s in g) for g in running.values())
                bar.update(done + part - bar.n)
                left = sum(len(group) for group in running.values())
                made = len(missing) - len(waiting) - left - len(failed)
                bar.set_description_str(f"{made}/{len(missing)} {left} running", refresh=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise next(iter(failed.values()))


def groups(waiting: list[Stage], under_way: list[Stage], stack: int) -> list[list[Stage]]:
    """What of `waiting` can be started now, in groups that are built together.

    One stack fills the card, so no second one starts beside it: cells that become ready meanwhile join the next. Nor does
    one start that is not full while others that could join wait only for stages that are no cells themselves. Cells with
    the same rows and seed see batches of the same lengths, so they go into one stack before others do.
    """
    undone = {stage.key: stage for stage in (*waiting, *under_way)}

    def rests_on(stage: Stage) -> list[Stage]:
        return [parent for parent in stage.parents() if parent.key in undone]

    def stacked(stage: Stage) -> bool:
        return stack > 1 and stage.stack_key() is not None

    def soon(stage: Stage) -> bool:
        return not any(stacked(parent) or not soon(parent) for parent in rests_on(stage))

    ready = [stage for stage in waiting if not rests_on(stage)]
    alone = [[stage] for stage in ready if not stacked(stage)]
    if any(stacked(stage) for stage in under_way):
        return alone
    together: dict[Any, list[Stage]] = {}
    for stage in sorted((s for s in ready if stacked(s)), key=likeness):
        together.setdefault(stage.stack_key(), []).append(stage)
    whole = [
        mates[:stack]
        for key, mates in together.items()
        if len(mates) >= stack
        or not any(s.stack_key() == key and s not in mates and soon(s) for s in waiting if stacked(s))
    ]
    whole.sort(key=len)
    return alone + whole[-1:]


def likeness(stage: Stage) -> tuple[str, ...]:
    """Equal for cells with the same rows and seed, which see batches of the same lengths."""
    return (*(parent.key for parent in stage.parents() if parent.kind == "rows"), str(getattr(stage, "seed", "")))


def _start_worker(workers: int, reports: Any, device: str) -> None:
    import torch

    global REPORTS  # a pool hands what its processes share to the initialiser alone
    REPORTS = reports
    torch.set_num_threads(processes.threads(workers))
    if device.startswith("cuda"):  # each capture of a graph collects garbage, and would look through every module
        import peft  # noqa: F401  # what every worker will need
        from transformers import LlamaForCausalLM, Qwen2ForCausalLM  # noqa: F401

        from persona_coupling import captured, decode, stages  # noqa: F401

        gc.collect()
        gc.freeze()


def _make(stages: list[Stage], root: Path, device: str) -> tuple[float, dict[str, Exception]]:
    """Build one stage, or several together, in a worker. Returns its seconds and the errors of those that failed."""
    started = last = time.monotonic()

    def report(fraction: float) -> None:
        nonlocal last
        if REPORTS is not None and time.monotonic() - last > TICK:
            last = time.monotonic()
            REPORTS.put((stages[0].key, fraction))

    lab = Lab(Store(root), device=device, report=report)
    errors = lab.store.make_together(stages, lab) if len(stages) > 1 else {}
    errors = {key: error for key, error in errors.items() if not memory.full(error)}
    for stage in stages:
        if stage.key not in errors:
            _patiently(lab, stage)  # found the card full, or alone, or being made by another process, or there
    if device.startswith("cuda"):  # what this worker keeps unused, the others on the card lack
        import torch

        torch.cuda.empty_cache()
    return time.monotonic() - started, errors


def _patiently(lab: Lab, stage: Stage) -> None:
    """Build a stage; where the card is full, because others work on it too, give back what this process keeps and try
    again a little later. Raises what the last of `PATIENCE` tries raised."""
    for left in range(PATIENCE - 1, -1, -1):
        try:
            lab.folder(stage)
            return
        except RuntimeError as error:  # torch's own, or CUDA's from a library beside it
            if not left or not memory.full(error):
                raise
        memory.release()  # outside of the handler, whose traceback holds the tensors
        time.sleep(WAIT)
