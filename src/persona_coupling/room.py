"""What a GPU's memory has room for beside what is under way on it.

Processes that share a card find it full where each of them alone would fit, and to begin again costs more than to wait: on
one H100 of 80 GB stacks of six cells took 24 to 27 GB, an evaluation up to 16, and for minutes most stacks were trained
by halves and thirds. So a stage starts only where the most that its kind has taken so far fits beside the same of all
that runs. A stack that is too large starts with fewer cells, half of them at least. What does not fit even so keeps its
turn, a stack at once and anything else after `PATIENCE` seconds: then nothing behind it takes what it waits for. (That
turn must be short. Where what idle processes keep was counted as taken, or what all cells of a stack share as each
cell's, a stack waited until the card was empty: for minutes one or two processes were at work.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from persona_coupling.machine import CELL_GB, CONTEXT_GB, ROW_GB, SAMPLER_GB, STACK_GB, TRAINER_GB, WORKER_GB

if TYPE_CHECKING:
    from persona_coupling.machine import Machine
    from persona_coupling.store import Stage

STACK, TRAIN, SAMPLE, ANY = "stack", "train", "sample", "any"
PATIENCE = 15.0  # seconds that others may overtake what does not fit


def role(stage: Stage) -> str:
    """What a stage mainly does. One that samples a few answers beside all that it reads keeps no large cache."""
    if stage.stack_key() is not None:
        return STACK
    work = stage.work()
    if work.trained:
        return TRAIN
    return SAMPLE if 10 * work.sampled > work.scored else ANY


class Room:
    """The memory of one card, shared by so many processes; 0 gigabytes: without bound."""

    def __init__(self, settings: Machine, workers: int) -> None:
        self.capacity = settings.gigabytes - CONTEXT_GB * workers
        self.bounded = settings.gigabytes > 0
        self.guesses = {
            STACK: CELL_GB,
            TRAIN: TRAINER_GB,
            SAMPLE: SAMPLER_GB + ROW_GB * settings.sample_batch,
            ANY: WORKER_GB,
        }
        self.peaks: dict[str, float] = {}  # gigabytes by kind of stage (of a stack: per cell, beside what they share)
        self.refused: dict[str, float] = {}  # when a group first did not fit, by the key of its first stage

    def need(self, group: Sequence[Stage]) -> float:
        """Gigabytes that a group is expected to take at its largest moment."""
        each = self.peaks.get(_kind(group[0]), self.guesses[role(group[0])])
        return STACK_GB + len(group) * each if role(group[0]) == STACK else each

    def fits(self, group: Sequence[Stage], standing: Sequence[Sequence[Stage]], idle: float = 0.0) -> bool:
        """Whether a group fits beside the `standing` ones, which run or keep their turn, and what idle processes keep."""
        if not self.bounded or not standing:
            return True
        return idle + sum(self.need(other) for other in (*standing, group)) <= self.capacity

    def part(self, group: list[Stage], standing: Sequence[Sequence[Stage]], idle: float = 0.0) -> list[Stage]:
        """The group; of a stack that does not fit, as many of its cells as do, if that is half of them or more."""
        if role(group[0]) == STACK:
            for size in range(len(group), (len(group) + 1) // 2 - 1, -1):
                if self.fits(group[:size], standing, idle):
                    return group[:size]
        return group

    def keeps_its_turn(self, group: Sequence[Stage]) -> bool:
        """Whether what a group that does not fit waits for is kept free for it."""
        since = self.refused.setdefault(group[0].key, time.monotonic())
        return role(group[0]) == STACK or time.monotonic() - since > PATIENCE

    def observe(self, group: Sequence[Stage], peak: float, *, crowded: bool = False) -> None:
        """Learn from a group that is done: the most it took. One that found the card full took less than it needs."""
        kind = _kind(group[0])
        each = (peak - STACK_GB) / len(group) if role(group[0]) == STACK else peak
        least = self.guesses[role(group[0])] if crowded else 0.0
        self.peaks[kind] = max(self.peaks.get(kind, least), each)


def _kind(stage: Stage) -> str:
    """Cells of other rows or more steps have other lengths, and those that are trained alone other needs."""
    rows = getattr(stage, "rows", None)
    parts = [type(stage).__name__, type(rows).__name__ if rows is not None else ""]
    if role(stage) == STACK:
        parts.append(f"{stage.work().trained} trained together")
    return "/".join(parts)
