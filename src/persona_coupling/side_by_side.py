"""Stages built side by side on one machine: which start next, in groups where they can be built together, and where."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from persona_coupling import processes
from persona_coupling.crew import Made, Worker, crew, make, tidy
from persona_coupling.errors import UserError
from persona_coupling.room import Room
from persona_coupling.store import Stage, Store

if TYPE_CHECKING:
    from persona_coupling.machine import Machine
    from persona_coupling.progress import Speeds

TICK = 1.0  # seconds between looks at the workers
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
    waiting = {stage.key: stage for stage in missing}
    parents = {stage.key: list(stage.parents()) for stage in missing}  # once: it looks through all parts of a stage
    stack, stacks, device = settings.stack, settings.stacks, settings.device
    ranks = {key: (turns.get(key, 0), -seconds) for key, seconds in urgency(missing, costs, stack).items()}
    running: dict[Any, tuple[Worker, list[Stage]]] = {}
    tidying: dict[Any, Worker] = {}
    failed: dict[str, BaseException] = {}
    shares: dict[str, float] = {}  # of running groups, by the key of their first stage
    done = 0.0
    reports = processes.SPAWN.Queue()
    with crew(settings, len(missing), reports, bar.write) as hired:
        room = Room(settings, len(hired.workers))
        while waiting or running:
            for stage in [s for s in waiting.values() if failed and any(p.key in failed for p in parents[s.key])]:
                failed[stage.key] = RuntimeError("a parent failed")
                del waiting[stage.key]
            standing = [group for _, group in running.values()]  # what runs, and what keeps its turn
            resting = [worker for worker in hired.workers if all(worker is not other for other, _ in running.values())]
            free, refused = list(resting), False
            for group in groups(list(waiting.values()), list(standing), stack, stacks, ranks, parents):
                worker = hired.choose(group[0], free)
                if worker is None:
                    continue
                idle = sum((other.kept for other in free if other is not worker), 0.0)
                group = room.part(group, standing, idle)
                if room.fits(group, standing, idle):
                    running[worker.submit(make, group, store.root, device)] = (worker, group)
                    resting.remove(worker)
                    for stage in group:
                        del waiting[stage.key]
                else:
                    refused = True
                    if not room.keeps_its_turn(group):
                        continue
                free.remove(worker)
                standing.append(group)
            if refused:  # what idle processes keep is given back; they keep it as long as nobody lacks it
                for worker in resting:
                    if worker.kept > TRIFLE and worker not in tidying.values():
                        tidying[worker.submit(tidy, device)] = worker
            finished, _ = wait([*running, *tidying], timeout=TICK, return_when=FIRST_COMPLETED)
            while not reports.empty():
                key, fraction = reports.get()
                shares[key] = fraction
            for future in finished & tidying.keys():
                tidying.pop(future).kept = 0.0 if future.exception() else future.result()
            for future in finished & running.keys():
                worker, group = running.pop(future)
                broken = future.exception()
                made = future.result() if broken is None else Made(0.0, dict.fromkeys((s.key for s in group), broken))
                worker.kept, worker.last = made.kept, type(group[0]).__name__
                if isinstance(broken, BrokenProcessPool):
                    hired.replace(worker)
                    made = Made(0.0, dict.fromkeys(made.errors, killed(group)))
                room.observe(group, made.peak, crowded=made.crowded)
                for stage in group:
                    if stage.key in made.errors:
                        failed[stage.key] = made.errors[stage.key]
                        bar.write(f"{stage} failed: {made.errors[stage.key]}")
                    else:
                        speeds.observe(stage, made.seconds / len(group))
                    done += costs[stage.key]
            part = sum(shares.get(g[0].key, 0.0) * sum(costs[s.key] for s in g) for _, g in running.values())
            bar.update(done + part - bar.n)
            left = sum(len(group) for _, group in running.values())
            there = len(missing) - len(waiting) - left - len(failed)
            bar.set_description_str(f"{there}/{len(missing)} {left} running", refresh=False)
    if failed:
        raise next(iter(failed.values()))


def killed(group: list[Stage]) -> UserError:
    """What to say of a group whose process is gone."""
    return UserError(
        f"The process that built {', '.join(map(str, group))} was killed, as systems do that run out of memory. What was "
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
    parents: Mapping[str, list[Stage]] | None = None,
) -> list[list[Stage]]:
    """What of `waiting` can be started now beside the `running` groups, in groups that are built together, by the lowest
    of their members' ranks: turn, and seconds that rest on it, negative. `parents` by key, where they are known already.

    Stacks fill the card, so no more than `stacks` are under way: cells that become ready meanwhile join the next. Nor does
    one start that is not full while others that could join wait only for stages that are no cells themselves.
    """
    undone = {stage.key: stage for stage in (*waiting, *(stage for group in running for stage in group))}

    def rests_on(stage: Stage) -> list[Stage]:
        known = list(stage.parents()) if parents is None else parents[stage.key]
        return [parent for parent in known if parent.key in undone]

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
