"""The processes that build stages side by side on one machine, and what each of them does."""

from __future__ import annotations

import contextlib
import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_coupling import memory, mps, processes
from persona_coupling.room import ANY, SAMPLE, STACK, TRAIN, role
from persona_coupling.store import Lab, Stage, Store

if TYPE_CHECKING:
    from persona_coupling.machine import Machine

TICK = 1.0  # seconds between two reports of one stage
PATIENCE, WAIT = 4, 5.0  # tries of a stage that found the card full, and seconds between them
REPORTS: Any = None  # in a worker: the queue to the builder's bar


@dataclass(eq=False)
class Worker:
    """One process, for stages of its role; `kept`: gigabytes of a GPU's memory that it has between two stages; `last`: the
    class of what it built last, which its buffers fit."""

    role: str
    executor: ProcessPoolExecutor
    kept: float = 0.0
    last: type[Stage] | None = None

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have the process do it, behind all that it was given before."""
        return self.executor.submit(call, *arguments)


@dataclass
class Crew:
    """All workers of a run."""

    hire: Callable[[str], Worker]
    workers: list[Worker] = field(default_factory=list)

    def choose(self, stage: Stage, free: list[Worker], *, stacks_wait: bool = True) -> Worker | None:
        """Of the `free` workers the one for a stage: of its role, if there are such, and once no stack waits, of stacks',
        since their part of the card is free then. Best one that just built a stage of its class, or else one that keeps
        little."""
        asked = role(stage)
        if all(worker.role != asked for worker in self.workers):
            asked = ANY
        fitting = [worker for worker in free if worker.role == asked or (worker.role == STACK and not stacks_wait)]
        return min(fitting, key=lambda worker: (worker.last is not type(stage), worker.kept), default=None)

    def give(self, worker: Worker, call: Callable[..., Any], *arguments: Any) -> tuple[Worker, Future[Any]]:
        """Have a worker do it, or a new one in its place if it was killed while it had nothing to do; who does."""
        try:
            return worker, worker.submit(call, *arguments)
        except BrokenProcessPool:
            fresh = self.replace(worker)
            return fresh, fresh.submit(call, *arguments)

    def replace(self, worker: Worker) -> Worker:
        """A new process for one that was killed or can use the card no more, if that is not done already."""
        if worker not in self.workers:
            return worker
        worker.executor.shutdown(wait=False)
        fresh = self.hire(worker.role)
        self.workers[self.workers.index(worker)] = fresh
        return fresh


@contextmanager
def crew(settings: Machine, stages: int, reports: Any, say: Callable[[str], object]) -> Iterator[Crew]:
    """The workers for so many stages. Where the card can tell processes apart, some are for stacks alone, which the others
    give way to. `samplers` and `trainers` are others: the cache of all answers that are sampled at once, and a cell that
    is trained alone with all its activations, take several times the memory of any other stage. Where too many processes
    did, stacks found the card full and were trained again by halves."""
    workers, device = settings.workers, settings.device
    stacks = settings.stacks if settings.stack > 1 else 0
    with mps.service(device, workers, say) as shared, contextlib.ExitStack() as opened:
        sizes = {STACK: stacks if shared and stacks < workers else 0}
        for name, asked in ((TRAIN, settings.trainers), (SAMPLE, settings.samplers)):
            sizes[name] = asked if asked < workers - sum(sizes.values()) else 0
        sizes[ANY] = workers - sum(sizes.values())
        behind = sizes[STACK] > 0

        def hire(name: str) -> Worker:
            start = (workers, reports, device, behind and name != STACK)
            executor = opened.enter_context(processes.pool(1, start_worker, start, beside=workers - 1))
            executor.submit(ready)  # it imports while the first stages, on which all rest, are built
            return Worker(name, executor)

        made = Crew(hire)
        for name, size in sizes.items():
            made.workers += [hire(name) for _ in range(min(size, stages))]
        yield made


def start_worker(workers: int, reports: Any, device: str, gives_way: bool = False) -> None:
    """What a process does first; `workers`: in all, which have the cores between them."""
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


def ready() -> None:
    """What a worker answers once it has been started."""


def tidy(device: str) -> float:
    """In a worker: give back the buffers that it keeps for the next stage of a class; gigabytes that are left."""
    memory.release()
    memory.watch(device)
    return memory.peak(device)


@dataclass(frozen=True)
class Made:
    """What a worker did: seconds, errors of the stages that failed, by key, and gigabytes of a GPU's memory: the most that
    it had of it meanwhile, and what it keeps; `crowded`: others left less of it than was asked for."""

    seconds: float
    errors: Mapping[str, BaseException]
    peak: float = 0.0
    kept: float = 0.0
    crowded: bool = False


def make(stages: list[Stage], root: Path, device: str, other_kind: bool = False) -> Made:
    """Build one stage, or several together, in a worker; `other_kind`: its last was of another class, whose buffers are of
    no use and would count as memory that this one needs."""
    started = last = time.monotonic()

    def report(fraction: float) -> None:
        nonlocal last
        if REPORTS is not None and time.monotonic() - last > TICK:
            last = time.monotonic()
            REPORTS.put((stages[0].key, fraction))

    if other_kind and device.startswith("cuda"):
        memory.release()
    memory.watch(device)
    short = memory.shortages(device)
    lab = Lab(Store(root), device=device, report=report)
    errors = lab.store.make_together(stages, lab) if len(stages) > 1 else {}
    errors = {key: error for key, error in errors.items() if not memory.full(error)}
    for stage in stages:
        if stage.key not in errors:
            try:
                patiently(lab, stage)  # found the card full, or alone, or being made by another process, or there
            except Exception as error:  # noqa: BLE001  # whatever it is, it is the stage's, and the others are made
                error.add_note(f"(in the process that built {stage})\n{traceback.format_exc()}")
                errors[stage.key] = error.with_traceback(None)  # its frames hold the stage's tensors
    peak = memory.peak(device)
    memory.watch(device)  # what this worker keeps unused, the others on the card lack
    return Made(time.monotonic() - started, errors, peak, memory.peak(device), memory.shortages(device) > short)


def patiently(lab: Lab, stage: Stage) -> None:
    """Build a stage; where the card is full, because others work on it too, give back what this process keeps and try
    again a little later. Raises what the last of `PATIENCE` tries raised, or at once what only another process can mend."""
    for left in range(PATIENCE - 1, -1, -1):
        try:
            lab.folder(stage)
            return
        except RuntimeError as error:  # torch's own, or CUDA's from a library beside it
            if not left or not memory.full(error) or memory.unfit(error):
                raise
        memory.release()  # outside of the handler, whose traceback holds the tensors
        time.sleep(WAIT)
