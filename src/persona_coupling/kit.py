"""The artifact-evaluation kit, written from generated files: the claims in REVIEWERS.md, codecheck.yml, RO-Crate metadata.

All three are functions of the stored evidence: written again they are the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from persona_coupling import crate, notebooks, outline, outputs, paths, provenance
from persona_coupling.errors import GuardError
from persona_coupling.outline import Outline
from persona_coupling.store import sha256_of

REVIEWERS_BEGINS = "<!-- claims: written by `nox -s paper` from the verdicts; do not edit by hand -->"
REVIEWERS_ENDS = "<!-- end of claims -->"
SPECIFICATION = "https://codecheck.org.uk/spec/config/1.0/"
CODECHECK_HEAD = """\
---
# Written by `nox -s paper`; do not edit by hand. What a codechecker adds: codechecker, report, certificate, summary,
# check_time. Version 1.0 of the specification: 2.0 requires ORCIDs and a published reference, and we have neither.
# Beyond the specification, each file has its size in bytes and its SHA-256.
"""
BESIDE = {  # what other commands leave among the generated files, where they were run
    "mutations.json": "What the verifier caught of forged evidence",
    "noise_floor.json": "How far trainings differ that differ in nothing but noise",
}
CELLS = 2  # of a spot check, in the commands and minutes that REVIEWERS.md gives


def write(profile: str) -> list[Path]:
    """Write REVIEWERS.md's claims, codecheck.yml and ro-crate-metadata.json for the stored evidence of a profile.

    Raises GuardError when a figure or table of the paper has no file, or when a file in the folders of figures and tables
    belongs to none; UserError when the paper does not compile.
    """
    root = paths.repository()
    found = outline.read(profile)
    texts = {root / "REVIEWERS.md": reviewers(profile, found), root / "codecheck.yml": codecheck(profile, found)}
    for path, text in texts.items():
        outputs.write(path, text)
    metadata = root / "ro-crate-metadata.json"  # last, since it lists the others
    outputs.write_json(metadata, crate.describe(profile))
    return [*texts, metadata]


def differences() -> list[str]:
    """What codecheck.yml says and the tree does not: a sentence for each missing, changed or unlisted file."""
    root = paths.repository()
    listed = {entry["file"]: entry for entry in yaml.safe_load((root / "codecheck.yml").read_text("utf-8"))["manifest"]}
    found = []
    for name, entry in listed.items():
        path = root / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (path.stat().st_size, sha256_of(path)) != (entry["size"], entry["sha256"]):
            found.append(f"{name} is not the file that codecheck.yml describes")
    folders = {Path(name).parent for name in listed if Path(name).parent != Path("paper")}
    there = {str(path.relative_to(root)) for folder in folders for path in (root / folder).glob("*")}
    return found + [f"{name} is not listed in codecheck.yml" for name in sorted(there - set(listed))]


# -------------------------------------------------------------------------------------------------- codecheck.yml


def codecheck(profile: str, found: Outline) -> str:
    """The CODECHECK configuration: the paper, and each file with the figure or table that it is."""
    root = paths.repository()
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    content = {
        "version": SPECIFICATION,
        "paper": {
            "title": citation["preferred-citation"]["title"],
            "authors": [{"name": author["name"]} for author in citation["authors"]],
        },
        "manifest": [
            {"file": name, "comment": comment, "size": (root / name).stat().st_size, "sha256": sha256_of(root / name)}
            for name, comment in manifest(profile, found).items()
        ],
    }
    return CODECHECK_HEAD + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def manifest(profile: str, found: Outline) -> dict[str, str]:
    """Every file behind the paper, relative to the repository, and what it is; in the paper's order.

    Raises GuardError for an exhibit without its file, and for a file in the folders of figures and tables that belongs
    to no experiment of this run.
    """
    root = paths.repository()
    generated = paths.generated(profile).relative_to(root)
    contents = _contents(profile)
    files = {str(paths.pdf(profile).relative_to(root)): "The paper"}
    drawn: dict[str, list[str]] = {}  # file that several exhibits are set from -> those exhibits
    captions = {
        f"{prefix}-{name}-{key}": entry
        for prefix, group in (("fig", "figures"), ("tab", "tables"))
        for name, content in contents.items()
        for key, entry in content[group].items()
    }
    shown = {exhibit.label: exhibit for exhibit in found.exhibits}
    experiments = {name.split("_")[0]: name for name in contents}
    for label, exhibit in shown.items():
        if label in captions:
            files |= _exhibit(exhibit.number, label, captions.pop(label), generated)
        else:
            name = f"{experiments[exhibit.experiment]}.json" if exhibit.experiment else "index.json"
            drawn.setdefault(str(generated / name), []).append(f"{exhibit.number} ({label})")
    for label, entry in captions.items():
        files |= _exhibit("Not shown in the paper", label, entry, generated)
    for name in contents:
        file = str(generated / f"{name}.json")
        section = found.sections.get(name.split("_")[0], "?")
        files[file] = "; ".join([f"Numbers, gates and verdicts of Section {section}", *drawn.pop(file, [])])
    file = str(generated / "index.json")
    files[file] = "; ".join(["All verdicts, gates and settings", *drawn.pop(file, [])])
    beside = {str(generated / name): what for name, what in BESIDE.items()}
    files |= {name: what for name, what in beside.items() if (root / name).is_file()}

    missing = sorted(name for name in files if not (root / name).is_file())
    if missing:
        raise GuardError(f"the paper shows what has no file: {', '.join(missing)}; run `nox -s paper`")
    there = [*paths.figures(profile).glob("*"), *paths.generated(profile).glob("*")]
    if extra := sorted({str(path.relative_to(root)) for path in there} - set(files)):
        raise GuardError(
            f"no figure or table of the paper is made of {', '.join(extra)}; delete what an earlier run left"
        )
    return files


def _exhibit(number: str, label: str, entry: Mapping[str, str], generated: Path) -> dict[str, str]:
    """The files of one figure (SVG, PNG, CSV) or one table (JSON, CSV)."""
    what = f"{number}: {entry['caption'].split('. ')[0].rstrip('.')}"
    first = entry["path"].removeprefix("/") if label.startswith("fig-") else str(generated / entry["path"])
    if label.startswith("fig-"):
        others = {".png": "as in the lab note", ".csv": "the data it was drawn from"}
    else:
        others = {".csv": "for other programs"}
    return {first: what, **{str(Path(first).with_suffix(end)): f"{number}, {use}" for end, use in others.items()}}


def _contents(profile: str) -> dict[str, dict[str, Any]]:
    """Each experiment's generated file, by name, in order."""
    index = json.loads((paths.generated(profile) / "index.json").read_text(encoding="utf-8"))
    return {
        name: json.loads((paths.generated(profile) / f"{name}.json").read_text(encoding="utf-8"))
        for name in index["experiments"]
    }


# ---------------------------------------------------------------------------------------------------- REVIEWERS.md


def reviewers(profile: str, found: Outline) -> str:
    """REVIEWERS.md with this evidence's claims between its two comments. Raises GuardError without them."""
    path = paths.repository() / "REVIEWERS.md"
    block = "\n" + claim_by_claim(profile, found)
    text = path.read_text(encoding="utf-8")
    return outputs.between(text, REVIEWERS_BEGINS, REVIEWERS_ENDS, block, str(path))


def claim_by_claim(profile: str, found: Outline) -> str:
    """Markdown: the evidence, then each experiment with its claims, commands, minutes and what one should see."""
    index = json.loads((paths.generated(profile) / "index.json").read_text(encoding="utf-8"))
    settings = index["profile"]
    seeds = len(settings["seeds"])
    devices, commits = (provenance.distinct(index["provenance"].values(), field) for field in ("device", "commit"))
    counts = ", ".join(f"{n} {verdict}" for verdict, n in index["counts"].items() if n)
    lines = [
        f"The evidence is of the profile `{profile}`: {settings['model']['name']}, {seeds} seed{'s'[: seeds != 1]}, "
        f"{_minutes(index['compute_minutes'])} of compute, summed over processes, on {' and '.join(devices)} "
        f"at commit {', '.join(commits)}. Minutes below are that machine's; those of spot checks are "
        "upper estimates.",
        "",
        f"{len(index['claims'])} claims: {counts}. In [the paper](paper/paper-{profile}.pdf) they stand in "
        f"{found.named('claims')}, with estimands and predicates in {found.named('claims-detail')}, and each in its "
        "experiment's section. `nox -s verify` must recompute every value and verdict of the third column.",
        "",
    ]
    claims: dict[str, list[Mapping[str, Any]]] = {}
    for row in index["claims"]:
        claims.setdefault(row["experiment"], []).append(row)
    for name in sorted(claims):
        lines += _experiment(name, profile, found, claims[name])
    return "\n".join(lines)


def _experiment(name: str, profile: str, found: Outline, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    number, words = name.split("_", 1)
    lines = [f"### {number} {words.replace('_', ' ')}", ""]
    experiment = notebooks.Experiment(name, paths.experiments() / name / "_")
    record = experiment.record(profile)
    if number in found.sections and record.is_file():
        stored = json.loads(record.read_text(encoding="utf-8"))
        lines += [f"Stands in {found.of(number)}. Lab note: {_link(experiment.lab_note(profile))}.", ""]
        whole, part = _minutes(stored["compute_minutes"]), _minutes(spotcheck_minutes(stored))
        lines += [
            f"- all of it again ({whole} from nothing): `nox -s reproduce -- --profile {profile} --only {number}`; the "
            "ledger at its end should say *within* for each claim",
            f"- {CELLS} cells again ({part}): the last column; each fresh value should lie in the interval that is "
            "predicted for it",
        ]
    else:
        lines += [f"Not run under this profile: `nox -s reproduce -- --profile {profile} --only {number}` runs it."]
    lines += ["", "| claim | says | one should see | spot check |", "|---|---|---|---|"]
    for row in rows:
        check = f"`nox -s spotcheck -- --claim {row['id']} --cells {CELLS} --seed 1`"
        seen = f"**{row['verdict']}**: {row['why']}"
        cells = [f"`{row['id']}`", row["statement"], seen, "–" if row["verdict"] == "not run" else check]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _link(path: Path) -> str:
    """A Markdown link to a file of the repository, or why there is none."""
    name = path.relative_to(paths.repository())
    return f"[{name.name}]({name})" if path.is_file() else "not executed (`nox -s paper -- --notes`)"


def spotcheck_minutes(record: Mapping[str, Any], cells: int = CELLS) -> float:
    """What some of an experiment's cells take from nothing, in minutes, averaged over all choices of them: their own
    training and sampling, what they have in common once, and, as an upper estimate, everything that is no cell's own
    (model, text, rows, observations)."""
    stages = record["stages"]
    own = [{key.split("/")[-1] for key in (cell["evaluation"], *cell["changes"])} for cell in record["cells"]]
    choices = [set().union(*chosen) for chosen in combinations(own, min(cells, len(own)))]
    shared = set(stages) - set().union(*own)
    each = [sum(stages.get(key, 0.0) for key in shared | chosen) for chosen in choices]
    return sum(each) / len(each) / 60


def _minutes(value: float) -> str:
    return "under a minute" if value < 1 else f"about {value:.0f} min"
