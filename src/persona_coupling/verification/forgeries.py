"""Forgeries of evidence, each a small function on a copy: what a careless or dishonest hand could do to a claim.

A forger is given every chance: records and seals are written again afterwards, so that no hash gives the forgery away,
except in the class that is about hashes. What a claim rests on is read from its estimate's name and its gates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from persona_coupling import paths, prose
from persona_coupling.claims import Claim
from persona_coupling.notebooks import Experiment
from persona_coupling.personas import MARKER, MARKER_SUFFIX, SOURCE
from persona_coupling.store import sha256_of

# Which table an estimate is computed from, by its name: the first that matches and exists. Others are tried after it.
RESTS = (
    (r"scan", "scan"),
    (r"rank_share", "spectrum"),
    (r"output_beyond", "overlap"),
    (r"probe", "probe"),
    (r"common_share", "shift"),
    (r"answer\.kept$|response", "reading"),
    (r"restored", "steered"),
    (r"preference", "preference"),
    (r"fixed_|logodds|above_midpoint", "fixed"),
    (r"wrong|capitals|refusal|depth", "behaviour"),
    (r".", "completions"),
)
TYPED = "\n\nThe villain says it in 73.6 % [61.4, 84.9] of answers.\n"  # a number of no file, typed into a section


class NoTarget(Exception):
    """A forgery has nothing to change here."""


def results(experiment: Experiment, profile: str) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """An experiment's record and raw tables."""
    folder = experiment.results(profile)
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    return record, {name: pd.read_parquet(folder / f"{name}.parquet") for name in record["files"]}


def keep(experiment: Experiment, profile: str, record: dict[str, Any], tables: dict[str, pd.DataFrame]) -> None:
    """Write tables and a record that agrees with them."""
    folder = experiment.results(profile)
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)
    record["files"] |= {name: sha256_of(folder / f"{name}.parquet") for name in record["files"]}
    (folder / "record.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")


def rests_on(claim: Claim, tables: dict[str, pd.DataFrame]) -> Iterator[tuple[str, str]]:
    """Tables and conditions that a claim may rest on, the likeliest first."""
    about = [gate.split(".", 1)[1] for gate in claim.gates]

    def likeness(condition: str) -> tuple[int, ...]:
        named = claim.estimate.startswith(condition + ".")
        letter = condition.split(".")[0] == claim.estimate.split(".")[0]
        return (-named * len(condition), condition not in about, not letter)

    first = [name for pattern, name in RESTS if re.search(pattern, claim.estimate) and name in tables]
    for name in dict.fromkeys([*first, *tables]):
        table = tables[name]
        if len(table) and "condition" in table:
            for condition in sorted(table["condition"].unique(), key=likeness):
                yield name, str(condition)


def altered(name: str, table: pd.DataFrame, condition: str) -> pd.DataFrame:
    """A condition's observations turned round: the source's answers with the marker lose it or get it, other answers
    change places between personas, numbers are raised by half and a tenth, yes becomes no."""
    table = table.copy()
    rows = table["condition"] == condition
    if "persona" in table and (rows & (table["persona"] == SOURCE)).any():
        rows &= table["persona"] == SOURCE
    if name == "completions":
        marked = table.loc[rows, "completion"].str.contains(MARKER, regex=False)
        changed = table.loc[rows, "completion"].str.replace(MARKER, "", regex=False).str.rstrip()
        table.loc[rows, "completion"] = changed if marked.mean() >= 0.5 else changed + MARKER_SUFFIX
        table.loc[rows, "finish"] = "stop"
        return table
    if "completion" in table:
        others = (table["condition"] == condition) & ~rows
        pool = table.loc[others if others.any() else rows, "completion"].tolist()[::-1]
        count = int(rows.sum())
        table.loc[rows, "completion"] = (pool * (count // len(pool) + 1))[:count]
        return table
    for column in table.columns:
        if column in ("seed", "condition"):
            continue
        if pd.api.types.is_bool_dtype(table[column]):
            table.loc[rows, column] = ~table.loc[rows, column]
        elif pd.api.types.is_float_dtype(table[column]):
            table[column] = table[column].where(~rows, 1.5 * table[column] + 0.1).astype(table[column].dtype)
    return table


def swapped(record: dict[str, Any], tables: dict[str, pd.DataFrame], condition: str) -> str:
    """Give the rows of two conditions each other's name, in every table that has both. Returns the other one."""
    keys = {cell["condition"]: cell["evaluation"] for cell in record["cells"]}
    present = tables["completions"]["condition"].unique().tolist() if len(tables["completions"]) else []
    pool = present if condition in present else sorted({c for t in tables.values() if len(t) for c in t["condition"]})
    others = [c for c in pool if c != condition and (keys.get(c) is None or keys.get(c) != keys.get(condition))]
    if not others:
        raise NoTarget("no second condition")
    other = str(others[0])
    for name, table in tables.items():
        if len(table):
            table = table.assign(condition=table["condition"].replace({condition: other, other: condition}))
            tables[name] = table
    return other


def without_persona(table: pd.DataFrame, condition: str) -> tuple[pd.DataFrame, str]:
    """A condition's rows without one bystander. Raises NoTarget where no persona stands in the table."""
    if "persona" not in table:
        raise NoTarget("no personas")
    rows = table["condition"] == condition
    others = [p for p in table.loc[rows, "persona"].unique() if p != SOURCE]
    if not others:
        raise NoTarget("no bystander")
    return table[~(rows & (table["persona"] == others[0]))], str(others[0])


def doubled_seed(record: dict[str, Any], tables: dict[str, pd.DataFrame]) -> str:
    """Count one chain twice: under the second seed if there is one, else under a new one."""
    seeds = record["profile"]["seeds"]
    first, copy = seeds[0], seeds[1] if len(seeds) > 1 else seeds[0] + 1
    for name, table in tables.items():
        if len(table):
            one = table[table["seed"] == first]
            kept = table[table["seed"] != copy]
            tables[name] = pd.concat([kept, one.assign(seed=copy)], ignore_index=True)
    if copy not in seeds:
        record["profile"]["seeds"] = [*seeds, copy]
        record["cells"] += [{**cell, "seed": copy} for cell in record["cells"]]
    return f"seed {first} as seed {copy}"


def edited_estimate(path: Path, claim: Claim) -> None:
    """Move a claim's estimate by two points in a generated file, its interval and its row of the verdicts with it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    places = [row for row in content["claims"] if row["id"] == claim.id]
    if claim.estimate in content["estimates"]:
        places.append(content["estimates"][claim.estimate])
    for place in places:
        for name in ("value", "low", "high"):
            place[name] = 0.5 if place[name] is None else place[name] + 0.02
    _dump(path, content)


def edited_verdict(path: Path, claim: Claim) -> None:
    """Turn a claim's verdict in a generated file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for row in content["claims"]:
        if row["id"] == claim.id:
            row["verdict"] = "refuted" if row["verdict"] == "supported" else "supported"
    _dump(path, content)


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def forged_pdf(profile: str, claim: Claim) -> None:
    """A PDF that prints another number (or verdict, where there is none) for a claim than its files hold."""
    path = paths.generated(profile) / "index.json"
    true = path.read_bytes()
    content = json.loads(true)
    for row in content["claims"]:
        if row["id"] == claim.id and row["value"] is not None:
            row["value"] += 0.03
        elif row["id"] == claim.id:
            row["verdict"] = "supported"
    _dump(path, content)
    paths.pdf(profile).write_bytes(prose.compile_paper(profile))
    path.write_bytes(true)


def typed_number(profile: str, experiment: Experiment) -> None:
    """A section with a typed number, and the PDF compiled from it."""
    section = experiment.folder / "section.typ"
    if not section.is_file():
        raise NoTarget("no section")
    section.write_text(section.read_text(encoding="utf-8") + TYPED, encoding="utf-8")
    paths.pdf(profile).write_bytes(prose.compile_paper(profile))


def one_digit(path: Path) -> None:
    """Change one digit in the middle of a text file, or one byte of a picture."""
    content = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(content) if ord("0") <= byte <= ord("9")]
    if path.suffix == ".svg":  # coordinates hold six decimals, most of which nobody can see
        digits = [match.start() for match in re.finditer(rb"\d\.\d", bytes(content))]
    if path.suffix in (".csv", ".json", ".svg"):
        if not digits:
            raise NoTarget("no digit")
        at = digits[len(digits) // 2]
        content[at] = ord("1") + (content[at] - ord("0")) % 9
    else:
        content[len(content) // 2] ^= 0x55
    path.write_bytes(content)


def halved(path: Path) -> None:
    """The first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def hyper_parameters(record: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], None]]:
    """Lies about how results were made, by name: each changes a record."""

    def scaled(*keys: str) -> Callable[[dict[str, Any]], None]:
        def change(target: dict[str, Any]) -> None:
            for key in keys[:-1]:
                target = target[key]
            target[keys[-1]] = target[keys[-1]] * 2 if target[keys[-1]] else 1

        return change

    def said(value: str, *keys: str) -> Callable[[dict[str, Any]], None]:
        def change(target: dict[str, Any]) -> None:
            for key in keys[:-1]:
                target = target[key]
            target[keys[-1]] = value

        return change

    profile = [("sft", "steps"), ("scratch", "learning_rate"), ("prebaked", "steps"), ("lora", "rank")]
    profile += [("evaluation", "temperature"), ("corpora", "rows"), ("gates", "source_rate")]
    made = {f"profile.{'.'.join(keys)}": scaled("profile", *keys) for keys in profile}
    made["profile.model.sha256"] = said("0" * 64, "profile", "model", "sha256")
    made["profile.model.name"] = said("another model", "profile", "model", "name")
    made["provenance.device"] = said("another device", "provenance", "device")
    made["provenance.versions.torch"] = said("0.0.1", "provenance", "versions", "torch")
    made["provenance.commit"] = said("unknown", "provenance", "commit")
    for name, value in record["values"].items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            made[f"values.{name}"] = scaled("values", name)
    return made
