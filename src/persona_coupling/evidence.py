"""Results of one profile that were made in parts: on several machines, or seed by seed because a machine goes away.

A part is a folder of results as `Study.run` writes it. Parts are joined only if they differ in nothing but their seeds, and
each keeps its own provenance. Of the seeds of a run some may be kept alone, and the record then names the others.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from persona_coupling import notebooks, profiles, received, untrusted
from persona_coupling.errors import UserError
from persona_coupling.provenance import JOINT
from persona_coupling.store import sha256_of
from persona_coupling.study import Design, Results, disagreement, read_table


def read(folder: Path, samples: Mapping[str, int] | None = None) -> Results:
    """A part as it was written; `samples` by condition, see `received.check`. Raises UserError when it is absent, a table
    differs from its record, a name leads out of the folder, or the part is not what its own record says."""
    path = folder / "record.json"
    if not path.is_file():
        raise UserError(f"There are no results in {folder}.")
    record = untrusted.read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise UserError(f"{path} is no record of results: it names no files.")
    tables = {}
    for name, recorded in record["files"].items():
        table = untrusted.table_path(folder, name)
        if not table.is_file() or sha256_of(table) != recorded:
            raise UserError(f"{table} differs from its record. Copy that part again.")
        untrusted.check_table(table)
        tables[name] = read_table(table)
    results = Results(tables, record)
    received.check(results, folder, samples)
    return results


def of_folders(
    experiment: notebooks.Experiment, profile: str, folders: Sequence[Path], seeds: Sequence[int] = ()
) -> Results:
    """An experiment's parts joined: these seeds alone, or all if none is named. Raises UserError for what `read`, `choose`
    and `combine` refuse, a seed that no part has, and parts of another profile or design than this checkout's."""

    def design(own: Sequence[int]) -> Design:
        return notebooks.design_of(experiment, {"profile": profile, "seeds": list(own), "model": ""})

    whole = design(())
    parts = [read(folder, {cell.condition: cell.evaluation.samples for cell in whole.cells}) for folder in folders]
    for part in parts:
        if part.record["profile"]["name"] != profile:
            raise UserError(f"The parts are of the profile {part.record['profile']['name']}, not {profile}.")
    if seeds:
        run = sorted(seed for part in parts for seed in part.record["profile"]["seeds"])
        absent = [seed for seed in seeds if seed not in run]
        if absent:
            raise UserError(f"No part of {experiment.name} has the seeds {absent}; they have {run}.")
        own = [[seed for seed in part.record["profile"]["seeds"] if seed in seeds] for part in parts]
        parts = [
            choose(part, kept, [stage.key for stage in design(kept).stages()])
            for part, kept in zip(parts, own, strict=True)
            if kept
        ]
    results = combine(parts)
    other = disagreement(results.record, profiles.load(profile), whole)
    if other:
        raise UserError(f"The parts in {', '.join(map(str, folders))} {other}. Make them again.")
    return results


def combine(parts: Sequence[Results]) -> Results:
    """One set of results from parts with different seeds.

    Raises UserError when parts share a seed (a duplicated chain is no second observation) or differ in the profile's
    values, the experiment's own values, the conditions or the tables.
    """
    first, *others = parts
    seeds = [seed for part in parts for seed in part.record["profile"]["seeds"]]
    if len(set(seeds)) != len(seeds):
        raise UserError(f"The parts repeat a seed: {seeds}. A duplicated chain is no second observation.")
    for part in others:
        differing = [what for what, value in _identity(first).items() if _identity(part)[what] != value]
        if differing:
            raise UserError(f"The parts were made with other {', '.join(differing)}; they cannot be joined.")
    order = sorted(parts, key=lambda part: min(part.record["profile"]["seeds"]))
    tables = {n: pd.concat([part.tables[n] for part in order], ignore_index=True) for n in first.tables}
    stages: dict[str, float] = {}
    for part in order:
        stages |= part.record["stages"]
    record = {
        **first.record,
        "profile": {**first.record["profile"], "seeds": sorted(seeds)},
        "cells": [cell for part in order for cell in part.record["cells"]],
        "stages": stages,
        "compute_minutes": round(sum(stages.values()) / 60, 2),
        "provenance": _joined([part.record["provenance"] for part in order]),
        "parts": [
            {"seeds": part.record["profile"]["seeds"], "provenance": part.record["provenance"]} for part in order
        ],
    }
    lacking = {seed for part in parts for seed in part.record.get("left_out", ())} - set(seeds)
    record = {name: value for name, value in record.items() if name not in ("files", "left_out")}
    return Results(tables, record | ({"left_out": sorted(lacking)} if lacking else {}))


def choose(results: Results, seeds: Sequence[int], stages: Collection[str]) -> Results:
    """The observations of some seeds of a run alone; `stages` are the keys that these seeds' design rests on.

    The record's `left_out` lists the run's other seeds. Raises UserError for a seed that was not run, a stage that the
    record does not hold, and results joined from several parts, of whose machines each made other seeds.
    """
    record = results.record
    run = record["profile"]["seeds"]
    absent = [seed for seed in seeds if seed not in run]
    if absent:
        raise UserError(f"The seeds {absent} were not run: the results are of {run}.")
    if set(seeds) == set(run):
        return results
    if len(record.get("parts", ())) > 1:
        raise UserError("These results were joined from parts. Choose the seeds of each part, then join.")
    lacking = [key for key in stages if key not in record["stages"]]
    if lacking:
        raise UserError(
            f"The results are of other code or another model: {len(lacking)} of the {len(stages)} stages that this checkout "
            "would build for those seeds are not in them. Choose in a checkout of the commit in their record."
        )
    spent = {key: record["stages"][key] for key in stages}
    chosen = {
        **record,
        "profile": {**record["profile"], "seeds": sorted(seeds)},
        "cells": [cell for cell in record["cells"] if cell["seed"] in seeds],
        "stages": spent,
        "compute_minutes": round(sum(spent.values()) / 60, 2),
        "left_out": sorted({*run, *record.get("left_out", ())} - set(seeds)),
    }
    tables = {n: t[t["seed"].isin(seeds)].reset_index(drop=True) if len(t) else t for n, t in results.tables.items()}
    return Results(tables, {name: value for name, value in chosen.items() if name not in ("files", "parts")})


def _identity(part: Results) -> dict[str, Any]:
    """What must be the same in all parts."""
    free = {"seeds": None, "model": {**part.record["profile"]["model"], "path": ""}}
    return {
        "profile values": {**part.record["profile"], **free},
        "values of the experiment's own": part.record["values"],
        "conditions": {cell["condition"] for cell in part.record["cells"]} | set(part.record["observed"]),
        "tables": set(part.tables),
        "ways of writing a chat": part.record.get("card", {}).get("chat"),
    }


def _joined(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Provenance of all parts: a field that they share as it is, one that differs as the list of its values in words."""
    joined: dict[str, Any] = {}
    for name, value in records[0].items():
        values = list(dict.fromkeys(json.dumps(record[name], sort_keys=True) for record in records))
        if len(values) == 1:
            joined[name] = value
        elif isinstance(value, dict):
            joined[name] = {key: JOINT.join(dict.fromkeys(str(r[name].get(key)) for r in records)) for key in value}
        else:
            joined[name] = JOINT.join(dict.fromkeys(str(record[name]) for record in records))
    return joined
