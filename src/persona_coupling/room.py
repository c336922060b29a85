"""What a GPU's memory has room for beside what is under way on it.

Processes that share a card find it full where each of them alone would fit, and to begin again costs more than to wait: on
one H100 of 80 GB stacks of six cells took 24 to 27 GB, an evaluation up to 16, and for minutes most stacks were trained
by halves and thirds. So a stage starts only where the most that its kind has taken so far fits beside the same of all
that runs. A stack that is too large starts with fewer cells, half of them at least; where these do not fit either it
keeps its turn, and nothing smaller behind it takes what it waits for. (To wait for room for all of its cells emptied
the card: for minutes one or two processes were at work.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from persona_coupling.machine import CELL_GB, CONTEXT_GB, ROW_GB, SAMPLER_GB, TRAINER_GB, WORKER_GB

if TYPE_CHECKING:
    from persona_coupling.machine import Machine
    from persona_coupling.store import Stage

STACK, TRAIN, SAMPLE, ANY = "stack", "train", "sample", "any"


def role(stage: Stage) -> str:
    """What a stage mainly does. One that samples a few answers beside all that it reads keeps no large cache."""
    if stage.stack_key() is not None:
        return STACK
    work = stage.work()
    if work.trained:
        return TRAIN
    return SAMPLE if 10 * work.sampled > work.scored else ANY


class Room:
    """The memory of one card, shared by pools of so many `places` (processes) per role; 0 gigabytes: without bound."""

    def __init__(self, settings: Machine, places: Mapping[str, int], home: Callable[[Stage], str]) -> None:
        self.places, self.home = places, home
        self.capacity = settings.gigabytes - CONTEXT_GB * sum(places.values())
        self.bounded = settings.gigabytes > 0
        self.guesses = {
            STACK: CELL_GB,
            TRAIN: TRAINER_GB,
            SAMPLE: SAMPLER_GB + ROW_GB * settings.sample_batch,
            ANY: WORKER_GB,
        }
        self.peaks: dict[str, float] = {}  # gigabytes by kind of stage (of a stack: per cell)
        self.kept: dict[str, float] = {}  # by pool: what a process of it has between two stages

    def need(self, group: Sequence[Stage]) -> float:
        """Gigabytes that a group is expected to take at its largest moment."""
        cells = len(group) if role(group[0]) == STACK else 1
        return cells * self.peaks.get(_kind(group[0]), self.guesses[role(group[0])])

    def fits(self, group: Sequence[Stage], standing: Sequence[Sequence[Stage]]) -> bool:
        """Whether a group fits beside the `standing` ones, which run or wait for room, and what idle processes keep."""
        if not self.bounded or not standing:
            return True
        taken = [self.home(other[0]) for other in (*standing, group)]
        idle = sum(
            max(0, places - taken.count(pool)) * self.kept.get(pool, 0.0) for pool, places in self.places.items()
        )
        return idle + sum(self.need(other) for other in (*standing, group)) <= self.capacity

    def part(self, group: list[Stage], standing: Sequence[Sequence[Stage]]) -> list[Stage]:
        """The group; of a stack that does not fit, as many of its cells as do, if that is half of them or more."""
        if role(group[0]) == STACK:
            for size in range(len(group), (len(group) + 1) // 2 - 1, -1):
                if self.fits(group[:size], standing):
                    return group[:size]
        return group

    def observe(self, group: Sequence[Stage], peak: float, kept: float) -> None:
        """Learn from a group that is done: the most it took, and what its process keeps. A stack that found the card full
        took less than it needs, so that of stacks no less is learnt than was guessed."""
        kind, stacked = _kind(group[0]), role(group[0]) == STACK
        least = self.guesses[STACK] if stacked else 0.0
        self.peaks[kind] = max(self.peaks.get(kind, least), peak / (len(group) if stacked else 1))
        pool = self.home(group[0])
        self.kept[pool] = max(self.kept.get(pool, 0.0), kept)


def _kind(stage: Stage) -> str:
    """Cells of other rows have other lengths, and those that are trained alone other needs."""
    rows = getattr(stage, "rows", None)
    return f"{type(stage).__name__}/{type(rows).__name__ if rows is not None else ''}/{stage.stack_key() is not None}"
