"""The rerun ledger: what became of every claim when everything was made again.

`flipped`: the verdict differs. `within`: the same verdict, and the new value lies no farther from the old one than two
independent runs with these intervals may differ: the arms of both intervals that point at each other, added in
quadrature (Newcombe 1998, Statistics in Medicine 17:873-890). `drifted`: the same verdict, but farther, or a value where
there was none. `new`: the claim had no verdict before, or was not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona_coupling import outputs, paths

PROVENANCE = ("made", "commit", "device", "system", "versions")


def read(profile: str) -> dict[str, Any]:
    """Claims and provenance of the generated files as they stand, by claim id; empty where there are none."""
    found: dict[str, Any] = {}
    for path in sorted(paths.generated(profile).glob("[0-9][0-9]_*.json")):
        content = outputs.read(path)
        if "claims" in content:
            made = {name: content["provenance"].get(name) for name in PROVENANCE}
            for row in content["claims"]:
                kept = {name: row[name] for name in ("value", "low", "high", "verdict", "why")}
                found[row["id"]] = {**kept, "provenance": made}
    return found


def judge(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> str:
    """within, drifted, flipped or new; see above."""
    if old is None or (old["verdict"] == "not run" and new["verdict"] != "not run"):
        return "new"
    if old["verdict"] != new["verdict"]:
        return "flipped"
    if old["value"] is None or new["value"] is None:
        return "within" if old["value"] is new["value"] else "drifted"
    change = new["value"] - old["value"]
    if None in (old["low"], old["high"], new["low"], new["high"]):
        return "within" if change == 0 else "drifted"
    if change > 0:
        arms = (old["high"] - old["value"], new["value"] - new["low"])
    else:
        arms = (old["value"] - old["low"], new["high"] - new["value"])
    return "within" if abs(change) <= (arms[0] ** 2 + arms[1] ** 2) ** 0.5 else "drifted"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry per claim that the new run has."""
    return [
        {"claim": claim, "outcome": judge(old.get(claim), row), "old": old.get(claim), "new": row}
        for claim, row in new.items()
    ]


def write(profile: str, entries: list[dict[str, Any]]) -> Path:
    """Keep the ledger beside the artifacts; it is not committed."""
    path = paths.artifacts() / f"ledger-{profile}.json"
    outputs.write_json(path, entries)
    return path


def text(entries: list[dict[str, Any]]) -> str:
    """The ledger for a terminal: claims that did not stay within are always listed, those within are counted."""
    counts = Counter(entry["outcome"] for entry in entries)
    lines = ["", "rerun ledger: " + (", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "no claims")]
    width = max((len(entry["claim"]) for entry in entries), default=0)
    for entry in entries:
        if entry["outcome"] == "within":
            continue
        old, new = entry["old"], entry["new"]
        before = "-" if old is None else f"{old['verdict']} {_value(old)}"
        lines.append(f"  {entry['claim']:<{width}}  {entry['outcome']:<8} {before} → {new['verdict']} {_value(new)}")
    for title, side in (("before", "old"), ("now", "new")):
        made = {_machine(entry[side]["provenance"]) for entry in entries if entry[side]}
        lines += [f"  {title:<7} {one}" for one in sorted(made)]
    return "\n".join(lines)


def _value(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "-"
    if row["low"] is None:
        return f"{row['value']:.2f}"
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _machine(made: Mapping[str, Any]) -> str:
    versions = made["versions"] or {}
    named = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if name in versions)
    return f"{made['commit']} on {made['device']} ({made['system']}), {named}"
