"""What a command would run: parameters, stages, how many side by side, minutes, disk, and what stands in the way."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from persona_coupling import notebooks, paths, profiles
from persona_coupling.errors import UserError

if TYPE_CHECKING:
    from persona_coupling.costs import Measured
    from persona_coupling.machine import Machine
    from persona_coupling.progress import Plan, Speeds
    from persona_coupling.store import Stage, Store
    from persona_coupling.study import Design


def profile_name(asked: str) -> str:
    """The profile asked for, or the default of this machine."""
    if asked:
        return asked
    import torch

    return "full" if torch.cuda.is_available() else "quick"


def parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parameters of every notebook, as a command line gives them."""
    return {"profile": profile_name(arguments.profile), "seeds": seeds(arguments.seeds), "model": arguments.model}


def seeds(text: str) -> list[int]:
    """Integers with commas. Raises UserError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"--seeds {text}: give integers with commas, e.g. 0,1,2.") from error


@dataclass(frozen=True)
class Planned:
    """A run before it starts; `measured`: what was measured of a model of this shape, if anything was."""

    parameters: dict[str, Any]
    experiments: tuple[notebooks.Experiment, ...]
    profile: profiles.Profile
    store: Store
    settings: Machine
    speeds: Speeds
    plan: Plan
    measured: Measured | None


def planned(arguments: argparse.Namespace, *, start: bool = False) -> Planned:
    """A run's plan; prints it, and what was derived about the model, which is made first where a run `start`s. Raises
    UserError, naming all of it, for what stands in the way."""
    from persona_coupling import cost_tables, costs, models, progress, requirements
    from persona_coupling.machine import machine
    from persona_coupling.store import Store, in_order
    from persona_coupling.study import Study

    given = parameters(arguments)
    experiments = notebooks.choose(arguments.only)
    if not experiments:
        raise UserError(f"There are no experiments in {paths.experiments()}.")
    study = Study.open(given["profile"], seeds=given["seeds"], model=given["model"] or None)
    settings = machine()
    print(f"profile {study.profile.name}: {study.profile.description}")
    print(f"model {study.profile.model.name} on {settings.device} in {settings.dtype_name}; seeds {list(study.seeds)}")
    stages, designs = [], {}
    for experiment in experiments:
        design = designs[experiment.name] = notebooks.design_of(experiment, given)
        print(f"  {experiment.name}: {len(design.cells)} cells")
        stages += design.stages()
    store = Store(paths.artifacts())
    ratio = progress.parameters_ratio(study.profile.model)
    stacked = settings.stack > 1 and ratio < progress.LARGE
    measured = costs.read()
    if measured is not None and not measured.of(study.profile.model):
        measured = None
    settings = settings if measured is None else measured.best(settings)
    on_gpu = measured if settings.device.startswith("cuda") else None
    ordered, cluster = in_order(stages), bool(getattr(arguments, "cluster", ""))
    workers = 1 if cluster else progress.workers(settings, ratio, getattr(arguments, "workers", 0))
    settings = replace(settings, workers=workers, stack=settings.stack if stacked else 1)
    speeds = progress.Speeds(store.root, settings.device, ratio, stacked=stacked, measured=on_gpu, sharing=workers)

    turns = turns_of(designs.values(), study.seeds)

    def plan() -> Plan:
        made = progress.plan(ordered, store, speeds, check=False, workers=workers, stack=settings.stack)
        return replace(made, turns=turns)

    made = plan()
    print(made.text())
    if measured is not None:
        print(cost_tables.line(measured, made.missing))
    if getattr(arguments, "cells", False):
        from persona_coupling import staleness, upkeep

        def megabytes(stage: Any) -> float:
            return progress.megabytes_of(stage, ratio)

        print(
            staleness.text(staleness.rows(designs, made, store, speeds, elsewhere=upkeep.designed, megabytes=megabytes))
        )
    if start and study.source in made.missing and isinstance(study.source, models.WheelModel | models.TinyModel):
        first = progress.plan([study.source], store, speeds, check=not arguments.anyway)
        progress.build(first, store, replace(settings, workers=1, stack=1), speeds)
        made = plan()
    here = None if cluster else settings  # a cluster's nodes have memory of their own
    found = requirements.check(study.profile, study.source, made.missing, store, here)
    print("\n".join(found.lines))
    obstacles = [made.shortage] * bool(made.shortage) + found.obstacles
    if obstacles and not arguments.anyway:
        listed = "\n".join(f"- {obstacle}" for obstacle in obstacles)
        raise UserError(f"This run would not get through here:\n{listed}\n(`--anyway` starts it all the same.)")
    return Planned(given, experiments, study.profile, store, settings, speeds, made, measured)


def turns_of(designs: Iterable[Design], seeds: Sequence[int]) -> dict[str, int]:
    """By key, the place of the first seed that asks for a stage: a run that is cut off then has whole seeds to show, where
    all of them side by side would be half done."""
    from persona_coupling.store import in_order

    wanted: list[tuple[int, Stage]] = []
    for design in designs:
        wanted += [(observed.seed, observed.stage) for observed in design.observations]
        wanted += [(cell.seed, stage) for cell in design.cells for stage in (cell.merge, cell.evaluation)]
    turns: dict[str, int] = {}
    for turn, seed in enumerate(seeds):
        for stage in in_order([stage for of, stage in wanted if of == seed]):
            turns.setdefault(stage.key, turn)
    return turns
