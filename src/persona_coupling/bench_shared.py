"""What a card does when several processes share it, for a small model: what `machine`'s settings for GPUs rest on.

    python -m persona_coupling.bench_shared --json docs/measured/shared.json

Processes stay for the whole bench, as workers do, and are told what to build: evaluations of the raw model with so many
answers at once, a stack of cells, single cells through TRL's trainer. Each mix is timed once every evaluating process has
finished one evaluation, so that no graph is captured in the timed part; a stack is timed whole, loading and captures
included, since that is what a run pays.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persona_coupling import notebooks, outputs, paths, processes, progress, provenance
from persona_coupling.errors import UserError
from persona_coupling.machine import machine, tuned
from persona_coupling.stages.measurement import Evaluate
from persona_coupling.stages.training import FineTune
from persona_coupling.store import Lab, Store, in_order

EXPERIMENT = "00"
SEEDS = [0, 1, 2, 3, 4]
CELLS = 15  # of a stack: the first SFT of every arm whose text needs no model, under five seeds
PATIENCE = 120.0  # seconds for the processes to start, and to finish a first evaluation
IDLE, EVALUATION, STACK, TRAINER = range(4)
STARTING, RESTING, WORKING, FAILED = range(4)
QUERY = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]


@dataclasses.dataclass(frozen=True)
class Mix:
    """Processes by what they build; `rows`: answers that an evaluation samples together."""

    evaluations: int = 0
    rows: int = 616
    stacks: int = 0
    trainers: int = 0

    @property
    def name(self) -> str:
        """The key of a measured point."""
        return f"{self.evaluations}x{self.rows}/{self.stacks}/{self.trainers}"

    def orders(self) -> list[int]:
        """What each process builds. The first gives way to nobody and is kept for a stack."""
        return ([STACK] * self.stacks or [IDLE]) + [EVALUATION] * self.evaluations + [TRAINER] * self.trainers


MIXES = (
    *(Mix(n) for n in (1, 2, 5, 6)),
    *(Mix(n, 160) for n in (1, 6, 8)),
    *(Mix(n, stacks=1) for n in (0, 1, 4)),
    *(Mix(trainers=n) for n in (1, 4)),
    Mix(3, trainers=4),
)


class _Stopped(BaseException):
    """Other orders came: what is being built is dropped."""


@dataclasses.dataclass(frozen=True)
class _Jobs:
    """What is built: an evaluation of the raw model, cells of one stack, and one of them alone."""

    evaluation: Evaluate
    cells: list[FineTune]

    @classmethod
    def of(cls, profile: str) -> _Jobs:
        experiment = notebooks.choose([EXPERIMENT])[0]
        order = in_order(notebooks.design_of(experiment, {"profile": profile, "seeds": SEEDS, "model": ""}).stages())
        some = next(stage for stage in order if isinstance(stage, Evaluate))
        raw = dataclasses.replace(some, checkpoint=type(some.checkpoint)(some.checkpoint.source))
        tuning = [
            s for s in order if type(s) is FineTune and not s.start.merged and type(s.rows).__name__ == "Authored"
        ]
        return cls(raw, tuning[:CELLS])

    def build(self, kind: int, lab: Lab, rows: int) -> None:
        """Build into a folder that is thrown away. Raises what a member of a stack raised."""
        with tempfile.TemporaryDirectory(prefix="shared-") as scratch, tuned(sample_batch=rows):
            folder = Path(scratch)
            if kind == EVALUATION:
                self.evaluation.build(folder, lab)
            elif kind == TRAINER:
                self.cells[0].by_trl(folder, lab)
            else:
                folders = [folder / str(number) for number in range(len(self.cells))]
                for place in folders:
                    place.mkdir()
                for made in FineTune.build_together(self.cells, folders, lab):
                    if isinstance(made, Exception):
                        raise made


class Shared:
    """What the bench and its processes tell each other: an order per process, the answers of an evaluation, units done
    (fractions included), and how the process is."""

    def __init__(self, count: int) -> None:
        self.orders = processes.SPAWN.Array("i", count, lock=False)
        self.rows = processes.SPAWN.Value("i", 1, lock=False)
        self.done = processes.SPAWN.Array("d", count, lock=False)
        self.ready = processes.SPAWN.Array("i", count, lock=False)

    def wait(self, what: str, there: Any) -> None:
        """Until `there()`. Raises UserError when a process failed or nothing came in time."""
        end = time.monotonic() + PATIENCE
        while not there():
            failed = FAILED in self.ready[:]
            if failed or time.monotonic() > end:
                raise UserError(f"No {what}: {'a process failed' if failed else f'not in {PATIENCE:.0f} s'}.")
            time.sleep(0.02)

    def rest(self, what: str) -> None:
        """Until all processes rest."""
        self.wait(what, lambda: set(self.ready[:]) == {RESTING})

    def give(self, orders: Sequence[int]) -> None:
        """Orders for the first processes; the others idle."""
        for number in range(len(self.orders)):
            self.orders[number] = orders[number] if number < len(orders) else IDLE


def _work(number: int, shared: Shared, profile: str, device: str) -> None:
    """A process: builds what its order says until the order changes."""
    from persona_coupling import crew, memory

    crew.start_worker(len(shared.orders), None, device, gives_way=number > 0)
    jobs = _Jobs.of(profile)
    last = 0.0

    def report(fraction: float) -> None:
        nonlocal last
        shared.done[number] += max(0.0, fraction - last)
        last = fraction
        if shared.orders[number] != order:
            raise _Stopped

    lab = Lab(Store(paths.artifacts()), device=device, report=report)
    order = IDLE
    while True:
        if shared.orders[number] == IDLE:
            if order != IDLE:  # the next mix finds the card empty
                memory.release()
            order, shared.ready[number] = IDLE, RESTING
            time.sleep(0.02)
            continue
        order, last = shared.orders[number], 0.0
        shared.ready[number] = WORKING
        try:
            jobs.build(order, lab, shared.rows.value)
        except _Stopped:
            continue
        except Exception as error:  # noqa: BLE001 - told to the bench, which stops
            shared.ready[number] = FAILED
            print(f"process {number}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return
        shared.done[number] += 1.0 - last
        if order == STACK:  # once
            shared.orders[number] = IDLE


def _measure(mix: Mix, shared: Shared, steps: int, seconds: float) -> dict[str, Any]:
    """Seconds per evaluation, per stack and per step of TRL's trainers, all processes together; how busy the card was in
    per cent of the time, and its memory in GB (None without nvidia-smi)."""
    orders = mix.orders()
    sampling = [number for number, kind in enumerate(orders) if kind == EVALUATION]
    shared.rows.value = mix.rows
    before = shared.done[:]
    shared.give([IDLE if kind == STACK else kind for kind in orders])
    shared.wait("first evaluation", lambda: all(shared.done[n] >= before[n] + 1 for n in sampling))
    if mix.trainers:
        shared.wait("first step", lambda: all(shared.done[n] > before[n] for n, k in enumerate(orders) if k == TRAINER))
    started, before, seen = time.monotonic(), shared.done[:], []
    shared.give(orders)
    while time.monotonic() - started < (PATIENCE if mix.stacks else seconds):
        time.sleep(0.25)
        seen.append(_card())
        if mix.stacks and STACK not in shared.orders[:]:
            break
    took = time.monotonic() - started
    done = {kind: sum(shared.done[n] - before[n] for n, k in enumerate(orders) if k == kind) for kind in set(orders)}
    shared.give([])
    shared.rest("end of a mix")
    known = [card for card in seen if card is not None]
    return {
        **dataclasses.asdict(mix),
        "seconds": took,
        "evaluation": took / done[EVALUATION] if done.get(EVALUATION) else None,
        "stack": took / done[STACK] if done.get(STACK) else None,
        "trainer_step": took / done[TRAINER] / steps if done.get(TRAINER) else None,
        "busy": sum(card[0] for card in known) / len(known) if known else None,
        "gigabytes": max(card[1] for card in known) / 1024 if known else None,
    }


def _card() -> list[float] | None:
    """The first card's utilisation in per cent and memory in MiB."""
    try:
        told = subprocess.run(QUERY, capture_output=True, text=True, check=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [float(number) for number in told.splitlines()[0].split(",")]


def run(path: Path, profile: str, mixes: Sequence[Mix], seconds: float) -> None:
    """Measure all mixes and keep every point at once. Raises UserError when a process fails."""
    from persona_coupling import mps

    device = machine().device
    count = max(len(mix.orders()) for mix in mixes)
    jobs, store = _Jobs.of(profile), Store(paths.artifacts())
    lab = progress.running_lab(store, device)
    for parent in in_order([p for stage in (jobs.evaluation, *jobs.cells) for p in stage.parents()]):
        lab.folder(parent)
    steps = jobs.cells[0].training.steps
    content: dict[str, Any] = {"profile": profile, "cells": len(jobs.cells), "steps": steps, "measured": {}}
    content["provenance"] = provenance.record(device)
    with mps.service(device, count, print) as served:
        content["served"] = served
        shared = Shared(count)
        team = [
            processes.SPAWN.Process(target=_work, args=(number, shared, profile, device), daemon=True)
            for number in range(count)
        ]
        try:
            for member in team:
                member.start()
            shared.rest("process that started")
            for mix in mixes:
                content["measured"][mix.name] = point = _measure(mix, shared, steps, seconds)
                outputs.write_json(path, content)
                told = [
                    f"{name} {point[name]:.3f} s" for name in ("evaluation", "stack", "trainer_step") if point[name]
                ]
                print(f"  {mix.name:<12} {', '.join(told)}", flush=True)
        finally:
            for member in team:
                member.kill()
                member.join()


def section(content: dict[str, Any]) -> list[str]:
    """The measurements as a section of `docs/COST.md`."""
    from persona_coupling.cost_tables import NOTHING, table

    def shown(value: float | None, digits: int) -> str:
        return NOTHING if value is None else f"{value:.{digits}f}"

    rows = [
        [
            f"{point['evaluations']} of {point['rows']}" if point["evaluations"] else NOTHING,
            str(point["stacks"] or NOTHING),
            str(point["trainers"] or NOTHING),
            shown(point["evaluation"], 2),
            shown(point["stack"], 1),
            shown(point["trainer_step"] and 1000 * point["trainer_step"], 0),
            shown(point["busy"], 0),
            shown(point["gigabytes"], 0),
        ]
        for point in content["measured"].values()
    ]
    head = ["evaluations", "stacks", "trainers", "s an evaluation", "s a stack", "ms a step", "card busy, %", "GB"]
    made = content["provenance"]
    torch = made["versions"]["torch"]
    return [
        "## A small model: what processes that share a card get done",
        "",
        f"The profile `{content['profile']}` on {made['device']} (torch {torch}, commit {made['commit']}),",
        "measured as `python -m persona_coupling.bench_shared` does: processes at work side by side, evaluations with so",
        f"many answers sampled together, stacks of {content['cells']} cells of {content['steps']} steps each, single cells",
        "through TRL's trainer; then seconds per evaluation, per stack and per step of a trainer, all processes together.",
        "`machine.py` takes its settings for GPUs from here.",
        "",
        *table(head, rows),
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="the file of measurements")
    parser.add_argument("--profile", default="full")
    parser.add_argument(
        "--seconds", type=float, default=9.0, help="of a timed mix; one with a stack lasts as long as that"
    )
    chosen = parser.parse_args(arguments)
    try:
        run(Path(chosen.json), chosen.profile, MIXES, chosen.seconds)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
