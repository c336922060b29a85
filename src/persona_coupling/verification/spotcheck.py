"""`spotcheck`: some cells that a claim rests on, picked by the reviewer's seed, trained and sampled again from nothing.

Each fresh value is held against the interval that the committed one predicts, see `prediction`; the level is shared out
over all values compared.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from persona_coupling import claims, notebooks, outputs, paths, profiles, stats
from persona_coupling.claims import Claim
from persona_coupling.errors import UserError
from persona_coupling.notebooks import Experiment
from persona_coupling.store import Lab, Stage, Store, in_order
from persona_coupling.study import Cell, Design, read_table
from persona_coupling.verification.findings import FAILS, HOLDS, UNKNOWN
from persona_coupling.verification.prediction import MEASURES, Comparison, compare, noise_floor, observed


def cells_of(claim: Claim, design: Design) -> list[Cell]:
    """The evaluated cells that a claim's estimate rests on: conditions that its name starts with, and those that its gates
    are about; where neither names one (a role, a mean of draws), all cells of the same arm, else all."""
    about = {gate.split(".", 1)[1] for gate in claim.gates}
    named = [c for c in design.cells if claim.estimate.startswith(c.condition + ".") or c.condition in about]
    if any(claim.estimate.startswith(cell.condition + ".") for cell in named):
        return named
    arm = claim.estimate.split(".")[0]
    more = [c for c in design.cells if c.condition.split(".")[0] == arm and c not in named]
    return named + more or list(design.cells)


def pick(cells: Sequence[Cell], count: int, seed: int) -> list[Cell]:
    """`count` cells by the reviewer's seed, in the order of the design."""
    ordered = sorted(cells, key=lambda cell: (cell.condition, cell.seed))
    chosen = random.Random(seed).sample(ordered, min(count, len(ordered)))
    return [cell for cell in cells if cell in chosen]


def reusable(stages: Sequence[Stage]) -> Iterator[Stage]:
    """The artifacts that a spot check takes as they are: the converted model and authored corpora; nothing sampled or
    trained."""
    from persona_coupling.stages import UltraChat
    from persona_coupling.stages.rows import Authored

    for stage in stages:
        if stage.kind == "model" or isinstance(stage, Authored | UltraChat):
            yield stage


def stored(experiment: Experiment, profile: str) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Committed answers, scored from their text, fixed-answer log-probabilities, and the record. Raises UserError."""
    folder = experiment.results(profile)
    if not experiment.record(profile).is_file():
        raise UserError(f"There are no stored results of {experiment.name} under {profile}: nothing to check against.")
    tables = [read_table(folder / f"{name}.parquet") for name in ("completions", "fixed")]
    return tables[0], tables[1], outputs.read(experiment.record(profile))


def run(profile: str, identity: str, *, count: int, seed: int, folder: Path | None = None) -> int:
    """Spot-check a claim and print the outcome. `folder` keeps the fresh artifacts (default: a temporary folder).

    Returns 0 when every fresh value lies inside its interval, 1 when one does not, 2 when there was nothing to compare.
    Raises UserError for an unknown claim or absent results.
    """
    from persona_coupling import progress
    from persona_coupling.machine import machine

    claim = next((c for c in claims.read() if c.id == identity), None)
    if claim is None:
        raise UserError(f"There is no claim {identity!r}. `nox -s claims` lists them.")
    experiment = notebooks.choose([claim.experiment])[0]
    completions, fixed, record = stored(experiment, profile)
    parameters = {"profile": profile, "seeds": record["profile"]["seeds"], "model": ""}
    design = notebooks.design_of(experiment, parameters)
    chosen = pick(cells_of(claim, design), count, seed)
    if not chosen:
        print(f"{identity} rests on no evaluated cell: there is nothing to sample again.")
        return UNKNOWN
    floor, said = noise_floor(profile)
    print(f"claim {claim.id}: {claim.statement}")
    print(f"seed {seed} picks {', '.join(f'{c.condition} (seed {c.seed})' for c in chosen)}. {said}")
    with tempfile.TemporaryDirectory(prefix="spotcheck-") as temporary:
        store = Store(folder or Path(temporary))
        if any(store.root.glob("change/*/manifest.json")):
            raise UserError(
                f"{store.root} holds trained artifacts: a spot check starts from nothing. Name another folder."
            )
        stages = in_order([stage for cell in chosen for stage in (cell.merge, cell.evaluation)])
        _bring(reusable(stages), Store(paths.artifacts()), store)
        settings = machine()
        ratio = progress.parameters_ratio(profiles.load(profile).model)
        workers = progress.workers(settings, ratio)
        speeds = progress.Speeds(store.root, settings.device, ratio, stacked=False, sharing=workers)
        planned = progress.plan(stages, store, speeds, workers=workers)
        print(planned.text())
        started = time.monotonic()
        progress.build(planned, store, replace(settings, workers=workers, stack=1), speeds)
        minutes = (time.monotonic() - started) / 60
        lab = Lab(store, device=settings.device)
        level = 1 - (1 - stats.CONFIDENCE) / (len(chosen) * len(MEASURES))
        rows, letters = [], []
        for cell in chosen:
            fresh = lab.folder(cell.evaluation)
            mine = (completions["condition"] == cell.condition) & (completions["seed"] == cell.seed)
            theirs = (fixed["condition"] == cell.condition) & (fixed["seed"] == cell.seed)
            table = read_table(fresh / "completions.parquet")
            name = f"{cell.condition}, seed {cell.seed}"
            old = observed(completions[mine], fixed[theirs])
            new = observed(table, read_table(fresh / "fixed.parquet"))
            rows += compare(name, old, new, level=level, floor=floor)
            same = completions.loc[mine, "completion"].tolist() == table["completion"].tolist()
            letters.append(f"{name}: the fresh answers are {'the same to the letter' if same else 'other answers'}")
    print(text(rows, level))
    print("\n".join(letters))
    made = record["provenance"]
    print(f"committed on {made['device']}, checked on {settings.device}, {os.cpu_count()} cores, in {minutes:.1f} min")
    return verdict(rows)


def verdict(rows: Sequence[Comparison]) -> int:
    """0 all inside, 1 one outside, 2 nothing could be compared."""
    outcomes = [row.inside for row in rows]
    return FAILS if False in outcomes else HOLDS if True in outcomes else UNKNOWN


def text(rows: Sequence[Comparison], level: float) -> str:
    """The comparisons as a table."""
    lines = ["", f"{'cell':<36} {'measure':<17} {'committed':>9}  {'predicted':<18} {'fresh':>8}  outcome"]

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    for row in rows:
        interval = f"[{number(row.low)}, {number(row.high)}]"
        outcome = {True: "inside", False: "OUTSIDE", None: "not comparable"}[row.inside]
        lines.append(
            f"{row.cell:<36} {row.measure:<17} {number(row.committed):>9}  {interval:<18} {number(row.fresh):>8}  {outcome}"
        )
    together = f"{100 * stats.CONFIDENCE:.0f} %"
    lines.append(f"prediction intervals at {level:.2%} each, {together} for all of them together")
    return "\n".join(lines)


def _bring(stages: Iterator[Stage], source: Store, target: Store) -> None:
    """Copy artifacts that are there, checked against their manifests."""
    for stage in stages:
        if source.has(stage) and not target.has(stage):
            folder = target.folder(stage)
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source.fetch(stage), folder)
