"""Other runs of the same claims, which are set beside this copy's in the paper's appendix.

`paper/earlier-<profile>.json` is a run of other seeds under a profile that was since designed anew;
`paper/repeat-<profile>.json` and `paper/older-<profile>.json` are runs of the same profile values and seeds, each by this
code or by that of its time; `paper/fresh-<profile>.json` is one of the same values under further seeds. Each is a copy of
the verdicts in the index that a commit of this repository holds, made by

    python -m persona_coupling.earlier repeat COMMIT --profile full

and `nox -s verify` compares it with that commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_coupling import outputs, paths, provenance
from persona_coupling.errors import GuardError, UserError
from persona_coupling.store import canonical_json
from persona_coupling.study import JUDGED

KINDS = ("repeat", "older", "fresh", "earlier")
KEPT = ("id", "statement", "value", "low", "high", "verdict", "why")
FREE = (*JUDGED, "seeds")  # profile values that may differ between runs that are counted up


def path(kind: str, profile: str) -> Path:
    """Where a run's verdicts are kept."""
    return paths.repository() / "paper" / f"{kind}-{profile}.json"


@dataclass(frozen=True)
class Copy:
    """What of this copy other runs are held against: judged claims, the profile's values, keys by experiment."""

    rows: Sequence[Mapping[str, Any]]
    profile: Mapping[str, Any]
    keys: Mapping[str, str]


def read(kind: str, profile: str, copy: Copy) -> dict[str, Any] | None:
    """What such a run gave, beside this copy. None where there was none, where the copy was made under other values of the
    profile, where a repeat is of other seeds and where a fresh run shares one.

    A run under the same values is counted up: verdicts that `agree`, ids of those that `differ`, and values now within the
    interval of then; a repeat says whether it is of the `same_code`. Raises GuardError where it speaks of another claim.
    """
    place = path(kind, profile)
    if not place.is_file():
        return None
    found: dict[str, Any] = outputs.read(place)
    now = {row["id"]: row for row in copy.rows}
    for old in found["claims"]:
        if now.get(old["id"], {}).get("statement") != old["statement"]:
            raise GuardError(f"{place.name}: {old['id']} is not the claim that it was")
    if kind == "earlier":
        return found
    seeds, own = set(found["seeds"]), set(copy.profile.get("seeds", ()))
    if found["values"] != values_of(copy.profile) or (seeds & own if kind == "fresh" else seeds != own):
        return None  # this copy is its reader's own
    pairs = [(old, now[old["id"]]) for old in found["claims"]]
    measured = [(a, b) for a, b in pairs if None not in (a["low"], a["high"], b["value"])]
    same = found["keys"] is not None and all(copy.keys.get(name) == key for name, key in found["keys"].items())
    return found | {
        **({} if kind == "fresh" else {"same_code": same}),
        "agree": sum(a["verdict"] == b["verdict"] for a, b in pairs),
        "differ": [a["id"] for a, b in pairs if a["verdict"] != b["verdict"]],
        "measured": len(measured),
        "within": sum(a["low"] <= b["value"] <= a["high"] for a, b in measured),
    }


def keys_of(contents: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """By experiment, a digest of the keys of all artifacts that its generated file rests on: the same for the same code,
    values and seeds."""
    return {
        content["experiment"]: hashlib.sha256("\n".join(sorted(content.get("stages", {}))).encode()).hexdigest()
        for content in contents
    }


def values_of(profile: Mapping[str, Any]) -> str:
    """A digest of those of a profile's values that observations hang on, seeds and where a local model lies aside."""
    values = {name: value for name, value in profile.items() if name not in FREE}
    values["model"] = {**values.get("model", {}), "path": ""}
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def of_commit(commit: str, profile: str) -> dict[str, Any] | None:
    """The verdicts that a commit's index holds, with its artifacts' keys, its profile's values, seeds and SFT steps
    and the devices and commits that made them; None where git cannot tell."""
    index = provenance.git("show", f"{commit}:paper/generated/{profile}/index.json")
    if index is None:
        return None
    content = json.loads(index)
    made = [
        provenance.git("show", f"{commit}:paper/generated/{profile}/{name}.json") for name in content["experiments"]
    ]
    return {
        "commit": commit,
        "keys": None if None in made else keys_of(json.loads(text) for text in made if text is not None),
        "values": values_of(content["profile"]),
        "seeds": content["profile"]["seeds"],
        "steps": content["profile"]["sft"]["steps"],
        "claims": [{name: row[name] for name in KEPT} for row in content["claims"]],
        "made_by": {
            what: provenance.distinct(content["provenance"].values(), what) for what in ("commit", "device", "made")
        },
    }


def differences(profile: str) -> dict[str, list[str] | None]:
    """By kept run, where it is not what its commit holds, in words; None where git lacks the commit."""
    found: dict[str, list[str] | None] = {}
    for place in (path(kind, profile) for kind in KINDS):
        if place.is_file():
            kept = outputs.read(place)
            there = of_commit(kept["commit"], profile)
            found[place.name] = (
                None
                if there is None
                else [
                    f"{place.name} differs in {name} from {kept['commit']}"
                    for name in kept
                    if kept[name] != there.get(name)
                ]
            )
    return found


def main(arguments: list[str] | None = None) -> None:
    """Keep a commit's verdicts. Raises UserError for a commit without an index of that profile."""
    parser = argparse.ArgumentParser(prog="persona_coupling.earlier", description=main.__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("commit")
    parser.add_argument("--profile", default="full")
    asked = parser.parse_args(arguments)
    found = of_commit(asked.commit, asked.profile)
    if found is None:
        raise UserError(f"git has no paper/generated/{asked.profile}/index.json at {asked.commit}.")
    outputs.write_json(path(asked.kind, asked.profile), found)


if __name__ == "__main__":
    main()
