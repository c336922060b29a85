"""Stages built side by side on one machine: which start next, in groups where they can be built together, and the
processes that build them."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_coupling import memory, mps, processes
from persona_coupling.room import ANY, SAMPLE, STACK, TRAIN, Room, role
from persona_coupling.store import Lab, Stage, Store

if TYPE_CHECKING:
    from persona_coupling.machine import Machine
    from persona_coupling.progress import Speeds

TICK = 1.0  # seconds between looks at the workers
PATIENCE, WAIT = 4, 5.0  # tries of a stage that found the card full, and seconds between them
REPORTS: Any = None  # in a worker: the queue to the builder's bar


def build(
    missing: list[Stage],
    costs: Mapping[str, float],
    turns: Mapping[str, int],
    store: Store,
    settings: Machine,
    speeds: Speeds,
    bar: Any,
) -> None:
    """Stages whose parents are made go to a pool of processes, those of the first of `turns` first and among them those
    with the most behind them, in groups where they can be built together. When one fails, whatever does not rest on it is
    still built; then the first error is raised."""
    waiting = {stage.key: stage for stage in missing}
    stack, stacks, device = settings.stack, settings.stacks, settings.device
    ranks = {key: (turns.get(key, 0), -seconds) for key, seconds in urgency(missing, costs, stack).items()}
    running: dict[Any, list[Stage]] = {}
    failed: dict[str, BaseException] = {}
    shares: dict[str, float] = {}  # of running groups, by the key of their first stage
    done = 0.0
    reports = processes.SPAWN.Queue()
    with _pools(settings, reports, bar.write) as pools:
        for pool, places in pools.values():  # workers import while the first stages, on which all rest, are built
            for _ in range(min(places, len(missing))):
                pool.submit(_ready)
        room = Room(settings, {name: places for name, (_, places) in pools.items()}, lambda stage: _pool(stage, pools))
        while waiting or running:
            for stage in [s for s in waiting.values() if any(parent.key in failed for parent in s.parents())]:
                failed[stage.key] = RuntimeError("a parent failed")
                del waiting[stage.key]
            standing = list(running.values())
            for group in groups(list(waiting.values()), list(running.values()), stack, stacks, ranks):
                pool, places = _home(group, pools)
                if sum(_home(other, pools)[0] is pool for other in standing) >= places:
                    continue
                group = room.part(group, standing)
                if room.fits(group, standing):
                    running[pool.submit(_make, group, store.root, device)] = group
                    for stage in group:
                        del waiting[stage.key]
                elif role(group[0]) != STACK:
                    continue
                standing.append(group)
            finished, _ = wait(running, timeout=TICK, return_when=FIRST_COMPLETED)
            while not reports.empty():
                key, fraction = reports.get()
                shares[key] = fraction
            for future in finished:
                group = running.pop(future)
                broken = future.exception()
                made = future.result() if broken is None else Made(0.0, dict.fromkeys((s.key for s in group), broken))
                room.observe(group, made.peak, made.kept)
                for stage in group:
                    if stage.key in made.errors:
                        failed[stage.key] = made.errors[stage.key]
                        bar.write(f"{stage} failed: {made.errors[stage.key]}")
                    else:
                        speeds.observe(stage, made.seconds / len(group))
                    done += costs[stage.key]
            part = sum(shares.get(g[0].key, 0.0) * sum(costs[s.key] for s in g) for g in running.values())
            bar.update(done + part - bar.n)
            left = sum(len(group) for group in running.values())
            there = len(missing) - len(waiting) - left - len(failed)
            bar.set_description_str(f"{there}/{len(missing)} {left} running", refresh=False)
    if failed:
        raise next(iter(failed.values()))


def urgency(missing: list[Stage], costs: Mapping[str, float], stack: int) -> dict[str, float]:
    """Seconds from the start of each stage to the end of the longest chain that rests on it: what should start first
    (parents come first in `missing`). A stage of a stack lasts as long as the stack."""
    behind: dict[str, float] = {}
    for stage in reversed(missing):
        seconds = costs[stage.key] * (stack if _stacked(stage, stack) else 1)
        behind[stage.key] = seconds + behind.get(stage.key, 0.0)
        for parent in stage.parents():
            behind[parent.key] = max(behind.get(parent.key, 0.0), behind[stage.key])
    return behind


def _stacked(stage: Stage, stack: int) -> bool:
    return stack > 1 and stage.stack_key() is not None


def groups(
    waiting: list[Stage],
    running: list[list[Stage]],
    stack: int,
    stacks: int = 1,
    ranks: Mapping[str, tuple[int, float]] | None = None,
) -> list[list[Stage]]:
    """What of `waiting` can be started now beside the `running` groups, in groups that are built together, by the lowest
    of their members' ranks: turn, and seconds that rest on it, negative.

    Stacks fill the card, so no more than `stacks` are under way: cells that become ready meanwhile join the next. Nor does
    one start that is not full while others that could join wait only for stages that are no cells themselves.
    """
    undone = {stage.key: stage for stage in (*waiting, *(stage for group in running for stage in group))}

    def rests_on(stage: Stage) -> list[Stage]:
        return [parent for parent in stage.parents() if parent.key in undone]

    def soon(stage: Stage) -> bool:
        return not any(_stacked(parent, stack) or not soon(parent) for parent in rests_on(stage))

    def rank(group: list[Stage]) -> tuple[tuple[int, float], int]:
        return min(of(stage) for stage in group), -len(group)

    def of(stage: Stage) -> tuple[int, float]:
        return (ranks or {}).get(stage.key, (0, 0.0))

    ready = [stage for stage in waiting if not rests_on(stage)]
    made = [[stage] for stage in ready if not _stacked(stage, stack)]
    room = stacks - sum(any(_stacked(stage, stack) for stage in group) for group in running)
    if room > 0:
        together: dict[Any, list[Stage]] = {}
        for stage in ready:
            if _stacked(stage, stack):
                together.setdefault(stage.stack_key(), []).append(stage)
        whole: list[list[Stage]] = []
        for key, mates in together.items():
            pieces = cut(mates, stack, {stage.key: of(stage)[0] for stage in mates})
            joining = any(s.stack_key() == key and s not in mates and soon(s) for s in waiting if _stacked(s, stack))
            whole += [part for part in pieces if len(part) == stack or not joining]
        made += sorted(whole, key=rank)[:room]
    return sorted(made, key=rank)


def cut(mates: list[Stage], stack: int, turns: Mapping[str, int] | None = None) -> list[list[Stage]]:
    """Cells that can be trained together, in stacks. A stack lasts as long as its longest cell, and the card works for the
    others all the while: so cells of one length go together, and shorter ones only fill up what is left of the longer.
    Then cells of one turn, and of these, cells with the same rows and seed, which see batches of the same lengths."""
    turns = turns or {}
    ordered = sorted(mates, key=lambda s: (-s.work().trained, turns.get(s.key, 0), *likeness(s)))
    return [ordered[first : first + stack] for first in range(0, len(ordered), stack)]


Pool = tuple[ProcessPoolExecutor, int]  # and its processes


@contextmanager
def _pools(settings: Machine, reports: Any, say: Callable[[str], object]) -> Iterator[dict[str, Pool]]:
    """The workers. Where the card can tell processes apart, some are a pool for stacks alone, which the others give way to.
    `samplers` and `trainers` are others: the cache of all answers that are sampled at once, and a cell that is trained
    alone with all its activations, take several times the memory of any other stage. Where too many processes did, stacks
    found the card full and were trained again by halves."""
    workers, device = settings.workers, settings.device
    stacks = settings.stacks if settings.stack > 1 else 0
    with mps.service(device, workers, say) as shared, contextlib.ExitStack() as opened:
        sizes = {STACK: stacks if shared and stacks < workers else 0}
        for role, asked in ((TRAIN, settings.trainers), (SAMPLE, settings.samplers)):
            sizes[role] = asked if asked < workers - sum(sizes.values()) else 0
        sizes[ANY] = workers - sum(sizes.values())

        def pool(size: int, *, gives_way: bool) -> Pool:
            start = (workers, reports, device, gives_way)
            return opened.enter_context(processes.pool(size, _start_worker, start, beside=workers - size)), size

        behind = sizes[STACK] > 0
        yield {role: pool(size, gives_way=behind and role != STACK) for role, size in sizes.items() if size}


def _pool(stage: Stage, pools: Mapping[str, Pool]) -> str:
    return role(stage) if role(stage) in pools else ANY


def _home(group: list[Stage], pools: Mapping[str, Pool]) -> Pool:
    """The pool that builds a group."""
    return pools[_pool(group[0], pools)]


def likeness(stage: Stage) -> tuple[str, ...]:
    """Equal for cells with the same rows and seed, which see batches of the same lengths."""
    return (*(parent.key for parent in stage.parents() if parent.kind == "rows"), str(getattr(stage, "seed", "")))


def _start_worker(workers: int, reports: Any, device: str, gives_way: bool = False) -> None:
    if gives_way:
        mps.give_way()
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


def _ready() -> None:
    """What a worker answers once it has been started."""


@dataclass(frozen=True)
class Made:
    """What a worker did: seconds, errors of the stages that failed, by key, and gigabytes of a GPU's memory: the most that
    it had of it meanwhile, and what it keeps."""

    seconds: float
    errors: Mapping[str, BaseException]
    peak: float = 0.0
    kept: float = 0.0


def _make(stages: list[Stage], root: Path, device: str) -> Made:
    """Build one stage, or several together, in a worker."""
    started = last = time.monotonic()

    def report(fraction: float) -> None:
        nonlocal last
        if REPORTS is not None and time.monotonic() - last > TICK:
            last = time.monotonic()
            REPORTS.put((stages[0].key, fraction))

    memory.watch(device)
    lab = Lab(Store(root), device=device, report=report)
    errors = lab.store.make_together(stages, lab) if len(stages) > 1 else {}
    errors = {key: error for key, error in errors.items() if not memory.full(error)}
    for stage in stages:
        if stage.key not in errors:
            _patiently(lab, stage)  # found the card full, or alone, or being made by another process, or there
    peak = memory.peak(device)
    memory.watch(device)  # what this worker keeps unused, the others on the card lack
    return Made(time.monotonic() - started, errors, peak, memory.peak(device))


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
