"""Stages built side by side on one machine: which start next, in groups where they can be built together, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from persona_coupling import memory, processes
from persona_coupling.crew import Crew, Made, Worker, crew, make, tidy
from persona_coupling.errors import UserError
from persona_coupling.room import Room
from persona_coupling.store import Stage, Store

if TYPE_CHECKING:
    from persona_coupling.machine import Machine
    from persona_coupling.progress import Speeds

TICK = 1.0  # seconds between looks at the workers
TRIES = 3  # processes that a stage is given to which finds the card full
TRIFLE = 1.0  # gigabytes of a GPU that an idle process may keep: the source that all checkpoints are made of


def build(
    missing: list[Stage],
    costs: Mapping[str, float],
    turns: Mapping[str, int],
    store: Store,
    settings: Machine,
    speeds: Speeds,
    bar: Any,
) -> None:
    """Stages whose parents are made go to processes of their own, those of the first of `turns` first and among them those
    with the most behind them, in groups where they can be built together. When one fails, whatever does not rest on it is
    still built; then the first error is raised."""
    reports = processes.SPAWN.Queue()
    ranks = {key: (turns.get(key, 0), -seconds) for key, seconds in urgency(missing, costs, settings.stack).items()}
    with crew(settings, len(missing), reports, bar.write) as hired:
        run = _Run(missing, costs, ranks, store, settings, hired)
        while run.waiting or run.running:
            run.start()
            for stage, seconds in run.look(bar.write):
                speeds.observe(stage, seconds)
            while not reports.empty():
                key, fraction = reports.get()
                run.shares[key] = fraction
            bar.update(run.done() - bar.n)
            bar.set_description_str(run.said(), refresh=False)
    if run.failed:
        raise next(iter(run.failed.values()))


class _Run:
    """What waits, what runs where, and what failed."""

    def __init__(
        self,
        missing: list[Stage],
        costs: Mapping[str, float],
        ranks: Mapping[str, tuple[int, float]],
        store: Store,
        settings: Machine,
        hired: Crew,
    ) -> None:
        self.costs, self.ranks, self.root, self.settings, self.hired = costs, ranks, store.root, settings, hired
        self.room = Room(settings, len(hired.workers))
        self.waiting = {stage.key: stage for stage in missing}
        self.running: dict[Future[Made], tuple[Worker, list[Stage]]] = {}
        self.tidying: dict[Future[float], Worker] = {}
        self.failed: dict[str, BaseException] = {}
        self.tries: Counter[str] = Counter()  # by key, of stages that found the card full
        self.shares: dict[str, float] = {}  # of running groups, by the key of their first stage
        self.total, self.ended = len(missing), 0.0

    def start(self) -> None:
        """Give free workers what can start now and has room. What others lack of the card's memory, idle workers give
        back; they keep it as long as nobody does."""
        if self.failed:
            for stage in list(self.waiting.values()):
                if any(parent.key in self.failed for parent in stage.parents()):
                    self.failed[stage.key] = RuntimeError("a parent failed")
                    del self.waiting[stage.key]
        standing = [group for _, group in self.running.values()]  # what runs, and what keeps its turn
        busy = {worker for worker, _ in self.running.values()}
        resting = [worker for worker in self.hired.workers if worker not in busy]
        free, refused = list(resting), False
        stacks_wait = any(_stacked(stage, self.settings.stack) for stage in self.waiting.values())
        stack, stacks = self.settings.stack, self.settings.stacks
        for group in groups(list(self.waiting.values()), list(standing), stack, stacks, self.ranks):
            worker = self.hired.choose(group[0], free, stacks_wait=stacks_wait)
            if worker is None:
                continue
            idle = sum((other.kept for other in free if other is not worker), 0.0)
            group = self.room.part(group, standing, idle)
            if self.room.fits(group, standing, idle):
                other_kind = worker.last not in (None, type(group[0]))
                at, future = self.hired.give(worker, make, group, self.root, self.settings.device, other_kind)
                self.running[future] = (at, group)
                resting.remove(worker)
                for stage in group:
                    del self.waiting[stage.key]
            else:
                refused = True
                if not self.room.keeps_its_turn(group):
                    continue
            free.remove(worker)
            standing.append(group)
        for worker in resting if refused else []:
            if worker.kept > TRIFLE and worker not in self.tidying.values():
                at, told = self.hired.give(worker, tidy, self.settings.device)
                self.tidying[told] = at

    def look(self, say: Callable[[str], object]) -> list[tuple[Stage, float]]:
        """Wait a moment; stages that were made meanwhile, and each one's seconds."""
        futures: list[Future[Any]] = [*self.running, *self.tidying]
        finished, _ = wait(futures, timeout=TICK, return_when=FIRST_COMPLETED)
        made: list[tuple[Stage, float]] = []
        for future in finished:
            if future not in self.tidying:
                made += self._end(future, say)
                continue
            worker = self.tidying.pop(future)
            if future.exception() is None:
                worker.kept = future.result()
            else:  # it can use the card no more, or is gone
                self.hired.replace(worker)
        return made

    def _end(self, future: Future[Made], say: Callable[[str], object]) -> list[tuple[Stage, float]]:
        worker, group = self.running.pop(future)
        broken = future.exception()
        if broken is None:
            outcome = future.result()
        else:
            gone = isinstance(broken, BrokenProcessPool)
            outcome = Made(0.0, dict.fromkeys((stage.key for stage in group), killed(group) if gone else broken))
        worker.kept, worker.last = outcome.kept, type(group[0])
        if broken is not None or any(map(memory.full, outcome.errors.values())):
            self.hired.replace(worker)
        self.room.observe(group, outcome.peak, crowded=outcome.crowded)
        made = []
        for stage in group:
            error = outcome.errors.get(stage.key)
            if error is None:
                made.append((stage, outcome.seconds / len(group)))
            elif memory.full(error) and self.tries[stage.key] + 1 < TRIES:
                self.tries[stage.key] += 1
                self.waiting[stage.key] = stage
                say(f"{stage} found the card full, and goes to another process: {error}")
                continue
            else:
                self.failed[stage.key] = error
                say(f"{stage} failed: {error}")
            self.ended += self.costs[stage.key]
        return made

    def done(self) -> float:
        """Expected seconds of all that has ended, and of the parts of what runs."""
        under_way = [group for _, group in self.running.values()]
        return self.ended + sum(self.shares.get(g[0].key, 0.0) * sum(self.costs[s.key] for s in g) for g in under_way)

    def said(self) -> str:
        """For the bar: stages that were made, all, and those under way."""
        under_way = sum(len(group) for _, group in self.running.values())
        there = self.total - len(self.waiting) - under_way - len(self.failed)
        return f"{there}/{self.total} {under_way} running"


def killed(group: list[Stage]) -> UserError:
    """What to say of a group whose process is gone."""
    return UserError(
        f"The process that built {', '.join(map(str, group))} was killed, as systems do whose memory is used up. What was "
        "made is kept: start the command again, with fewer --workers if it happens twice."
    )


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


def likeness(stage: Stage) -> tuple[str, ...]:
    """Equal for cells with the same rows and seed, which see batches of the same lengths."""
    return (*(parent.key for parent in stage.parents() if parent.kind == "rows"), str(getattr(stage, "seed", "")))
