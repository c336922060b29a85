"""Checks of raw observations and their records, before any estimate: complete, distinct, and made with what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from persona_coupling import paths, personas, provenance, score, stats
from persona_coupling.profiles import Profile
from persona_coupling.stages import FineTune
from persona_coupling.stages.behaviours import KnownFacts
from persona_coupling.stages.full_parameter import MatchedLoss
from persona_coupling.store import canonical_json, sha256_of
from persona_coupling.study import Design, collapsed
from persona_coupling.verification import prediction
from persona_coupling.verification.findings import Finding, verdict

ANSWER = ["persona", "question", "sample"]  # what names one sampled answer of a condition and seed
JUDGED = ("description", "stamp")  # words: no observation and no verdict depends on them
# tables whose number of rows depends on what was sampled or trained, by seed
SAMPLED = ("content", "training", "log", "merges", "known", "known_answers", "matched", "preference", "behaviour")
EVEN = {"drift", "chance"}  # tables with as many rows in every condition
UNKNOWN_COMMIT = "unknown"


@dataclass
class Stored:
    """An experiment's results folder as it lies there, unscored."""

    name: str
    folder: Path
    record: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


def read(name: str, folder: Path) -> tuple[Stored, Finding]:
    """The stored tables, and whether each can be read and is the one that the record names. Tables that cannot be read
    are left out. A record that cannot be read leaves all of them out."""
    faults: list[str] = []
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        files = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Stored(name, folder, {}), verdict("files", name, [f"record.json cannot be read ({error})"])
    stored = Stored(name, folder, record)
    for table, digest in files.items():
        path = folder / f"{table}.parquet"
        try:
            stored.tables[table] = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            faults.append(f"{path.name} cannot be read ({str(error).splitlines()[0]})")
            continue
        if sha256_of(path) != digest:
            faults.append(f"{path.name} differs from its record")
    faults += [f"{p.name} is in no record" for p in sorted(folder.glob("*.parquet")) if p.stem not in files]
    return stored, verdict("files", name, faults, f"{len(files)} tables")


def complete(stored: Stored, profile: Profile, design: Design) -> Finding:
    """Whether the cells are those of the notebook's design, each with every persona, question and sample of the design
    once, and whether in every other table the seeds, and within them the personas, have as many rows as each other."""
    faults: list[str] = []
    seeds = stored.record["profile"]["seeds"]
    if seeds != list(profile.seeds):
        faults.append(f"seeds {seeds}, the profile says {list(profile.seeds)}")
    asked = {(cell.condition, cell.seed): cell.evaluation for cell in design.cells}
    cells = {(cell["condition"], cell["seed"]) for cell in stored.record["cells"]}
    faults += [
        f"{c}, seed {s} is in the {'record' if (c, s) in cells else 'design'} alone" for c, s in cells ^ set(asked)
    ]
    for name in ("completions", "fixed", "heldout"):
        table = stored.tables.get(name)
        if table is None or not len(table):
            faults += [f"{name} is empty"] if cells else []
            continue
        groups = dict(list(table.groupby(["condition", "seed"], sort=False)))
        faults += [f"{name} of {c}, seed {s}: absent" for c, s in sorted(cells - set(groups))]
        faults += [f"{name} of {c}, seed {s}: in no design" for c, s in sorted(set(groups) - cells)]
        if name == "heldout" and len({len(part) for part in groups.values()}) > 1:
            faults.append("heldout: cells differ in rows")
        for (condition, seed), part in groups.items():
            where, evaluation = f"{name} of {condition}, seed {seed}", asked.get((condition, seed))
            if name == "heldout":
                faults += [f"{where}: a question stands twice"] if part["question"].duplicated().any() else []
            if name == "heldout" or evaluation is None:
                continue
            keys = ANSWER if name == "completions" else ANSWER[:2]
            questions = evaluation.everyday + evaluation.values
            people = {p.id: p.system_prompt(evaluation.instruction) for p in personas.personas()}
            n = {"persona": len(people), "question": questions, "sample": evaluation.samples}
            faults += [f"{where}: persona {p} is missing" for p in sorted(set(people) - set(part["persona"]))]
            for key in keys:
                if part[key].nunique() != n[key]:
                    faults.append(f"{where}: {part[key].nunique()} {key}s, not {n[key]}")
            expected = 1
            for key in keys:
                expected *= n[key]
            if len(part) != expected or part.duplicated(keys).any():
                faults.append(f"{where}: {len(part)} rows, not {expected}, or one stands twice")
            if name == "completions":
                faults += _prompts(part, people, where)
    faults += _logs(stored.tables, design)
    faults += _observed(stored.tables, design)
    for name in set(stored.tables) - {"completions", "fixed", "heldout"}:
        faults += _balanced(name, stored.tables[name], profile)
    return verdict("complete", stored.name, faults, f"{len(cells)} cells")


def _logs(tables: Mapping[str, pd.DataFrame], design: Design) -> Iterator[str]:
    """Every cell has one merge, and every training of it a log up to its last step; scans and draws that conditions
    share have as many rows in each."""
    merges, training = tables.get("merges"), tables.get("training")
    if merges is not None and len(merges) and len(merges) != len(design.cells):
        yield f"merges: {len(merges)} rows, not {len(design.cells)}"
    if training is not None and len(training):
        last = training.groupby(["condition", "seed", "position"])["step"].max()
        for cell in design.cells:
            for position, merged in enumerate(cell.checkpoint.merged):
                change = merged.change
                if (
                    isinstance(change, FineTune)
                    and last.get((cell.condition, cell.seed, position)) != change.training.steps
                ):
                    yield f"training of {cell.condition}, seed {cell.seed}: not {change.training.steps} steps"
    for name in EVEN & set(tables):
        if len(set(tables[name].groupby(["condition", "seed"]).size())) > 1:
            yield f"{name}: conditions differ in rows"


def _observed(tables: Mapping[str, pd.DataFrame], design: Design) -> Iterator[str]:
    """Tables whose length a stage gives have it: logs, candidates of equal loss, facts and answers about them."""
    for seen in design.observations:
        stage, expected = seen.stage, dict[str, int]()
        if isinstance(stage, FineTune):
            expected = {"log": stage.training.steps}
        elif isinstance(stage, MatchedLoss) and isinstance(stage.change, FineTune):
            expected = {"matched": len(stage.change.training.snapshots) + 1}
        elif isinstance(stage, KnownFacts):
            facts = stage.train + stage.evaluation
            expected = {"known": facts, "known_answers": facts * stage.samples}
        for name in expected.keys() & tables.keys():
            table = tables[name]
            found = int(((table["condition"] == seen.condition) & (table["seed"] == seen.seed)).sum())
            if found != expected[name]:
                yield f"{name} of {seen.condition}, seed {seen.seed}: {found} rows, not {expected[name]}"


def _prompts(part: pd.DataFrame, people: Mapping[str, str], where: str) -> Iterator[str]:
    wrong = part["system"] != part["persona"].map(dict(people))
    if wrong.any():
        yield f"{where}: {int(wrong.sum())} answers under another system prompt than their persona's"
    if part.groupby("question")["prompt"].nunique().gt(1).any():
        yield f"{where}: one question with several wordings"


def _balanced(name: str, table: pd.DataFrame, profile: Profile) -> Iterator[str]:
    """Every seed has the same rows in number; within a seed every persona too."""
    if not len(table) or "seed" not in table:
        return
    counts = table.groupby(["condition", "seed"]).size().unstack("seed", fill_value=0)
    if set(counts.columns) - set(profile.seeds):
        yield f"{name}: seeds {sorted(counts.columns)}, the profile says {list(profile.seeds)}"
    if name in SAMPLED:
        return
    uneven = counts.index[counts.min(axis=1) < counts.max(axis=1)].tolist()
    if uneven:
        yield f"{name}: seeds differ in rows for {', '.join(map(str, uneven[:3]))}"
    if "persona" in table:
        for condition, part in table.groupby("condition", sort=False):
            if len(set(part.groupby("persona").size())) > 1:
                yield f"{name} of {condition}: personas differ in rows"


def distinct(stored: Stored, same: Set[tuple[str, str]] = frozenset()) -> Finding:
    """Whether chains and conditions are what they are counted as: no two seeds, and no two conditions but those that the
    design declares the `same`, with the same answers to the letter or the same training losses."""
    faults: list[str] = []
    if len({(c["condition"], c["seed"]) for c in stored.record["cells"]}) != len(stored.record["cells"]):
        faults.append("a condition stands twice under a seed")
    for name in ("completions", "behaviour"):
        table = stored.tables.get(name)
        if table is None or not len(table):
            continue
        seen: dict[str, tuple[str, int]] = {}
        for (condition, seed), part in table.groupby(["condition", "seed"], sort=False):
            keys = [key for key in ("bank", *ANSWER) if key in part]
            if collapsed(part["completion"]):
                continue
            text = canonical_json(part.sort_values(keys)["completion"].tolist())
            other = seen.setdefault(text, (str(condition), int(seed)))
            if other == (condition, seed):
                continue
            if other[1] != seed:
                faults.append(f"{name}: {condition} says the same to the letter under seeds {other[1]} and {seed}")
            elif not {(other[0], condition), (condition, other[0])} & same:
                faults.append(f"{name}: {other[0]} and {condition} say the same to the letter under seed {seed}")
    faults += _chains(stored.tables.get("training"), same)
    return verdict("distinct", stored.name, faults)


def _chains(training: pd.DataFrame | None, same: Set[tuple[str, str]]) -> Iterator[str]:
    """Two differently named trainings with the same losses are one, but for those of conditions declared the `same`."""
    if training is None or not len(training):
        return
    seen: dict[str, str] = {}
    under = training.groupby("change")["condition"].agg(set)
    for change, part in training.drop_duplicates(["change", "step"]).groupby("change", sort=False):
        losses = canonical_json([str(x) for x in part.sort_values("step")[["loss", "grad_norm"]].to_numpy().ravel()])
        other = seen.setdefault(losses, str(change))
        if other != change and not any(
            {(one, two), (two, one)} & same for one in under[other] for two in under[change]
        ):
            yield f"trainings {other} and {change} have the same losses"
    seeds = training.groupby("change")["seed"].nunique()
    for change in seeds.index[seeds > 1]:
        yield f"training {change} stands under several seeds"


def made_with(stored: Stored, profile: Profile) -> Finding:
    """Whether the record names commit, device, versions, seeds and model, and whether these and all hyper-parameters are
    the profile's."""
    faults: list[str] = []
    record = stored.record
    places = {"record": record.get("provenance", {})}
    places |= {f"{c['condition']}, seed {c['seed']}": c.get("provenance", {}) for c in record["cells"]}
    for where, made in places.items():
        absent = [name for name in ("made", "commit", "device", "system", "versions") if not made.get(name)]
        faults += [f"{where} names no {name}" for name in absent]
        if made.get("commit") == UNKNOWN_COMMIT:
            faults.append(f"{where} names no commit")
        lacking = {"python", *provenance.LIBRARIES} - set(made.get("versions") or {})
        faults += [f"{where} names no version of {name}" for name in sorted(lacking)]
    current = {n: v for n, v in profile.as_dict().items() if n not in JUDGED}
    stated = {n: v for n, v in record["profile"].items() if n not in JUDGED}
    for name in sorted(set(current) | set(stated)):
        if stated.get(name) != current.get(name):
            faults.append(f"{name} differs from the profile's: {_difference(stated.get(name), current.get(name))}")
    return verdict("provenance", stored.name, faults)


def made_by(stored: Stored, design: Design) -> Finding:
    """Whether today's code made the evidence: a key is a hash of what made an artifact, code included. Skipped where keys
    differ: older code can have made sound evidence, and its commits, which the record names, hold that code."""
    today = {(cell.condition, cell.seed): cell.evaluation.key for cell in design.cells}
    cells = stored.record["cells"]
    older = [cell for cell in cells if today.get((cell["condition"], cell["seed"])) != cell["evaluation"]]
    if not older:
        return Finding("code", stored.name, "holds", f"{len(cells)} evaluations have the keys that today's code gives")
    made = provenance.distinct([cell.get("provenance", {}) for cell in older], "commit")
    why = f"{len(older)} of {len(cells)} evaluations were made by the code of {', '.join(made)}, not by today's"
    return Finding("code", stored.name, "skipped", why)


def _difference(stated: Any, current: Any) -> str:
    if isinstance(stated, dict) and isinstance(current, dict):
        keys = [key for key in {**stated, **current} if stated.get(key) != current.get(key)]
        return ", ".join(f"{key} {stated.get(key)!r}, not {current.get(key)!r}" for key in keys[:3])
    return f"{stated!r}, not {current!r}"


def commits(records: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Whether all commits that made the evidence stand in the history. Skipped without git or in a shallow clone."""
    named: dict[str, str] = {}
    for name, record in records.items():
        made = [record.get("provenance", {}), *(cell.get("provenance", {}) for cell in record.get("cells", []))]
        for commit in provenance.distinct([{"commit": one.get("commit")} for one in made], "commit"):
            named.setdefault(commit, name)
    top = provenance.git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != paths.repository().resolve():
        return Finding("commit", "history", "skipped", "no git here")
    if provenance.git("rev-parse", "--is-shallow-repository") != "false":
        return Finding("commit", "history", "skipped", "a shallow clone")
    faults, changed = [], []
    for commit, name in named.items():
        plain = commit.removesuffix("+changes")
        if plain != commit:
            changed.append(f"{name} was made from a changed tree of {plain}: the history does not hold its code")
        if provenance.git("merge-base", "--is-ancestor", plain, "HEAD") is None:
            faults.append(f"{name} names the commit {plain}, which is not in the history")
    if changed and not faults:
        return Finding("commit", "history", "unknown", "; ".join(changed[:3]))
    return verdict("commit", "history", faults, f"{len(named)} commits, all in the history")


def shared(experiments: Mapping[str, Stored], floor: Mapping[str, float] | None = None) -> Finding:
    """Whether an evaluation that several experiments share says the same in all of them.

    One artifact says it to the letter. What two runs made of one key may differ as two trainings do (`floor`: the noise
    floor's standard deviation by measure): there each measure of the one must lie in the interval that the other predicts,
    at a level shared out over all that are compared, as in a spot check.
    """
    seen: dict[str, _Shared] = {}
    faults, again, n = [], [], 0
    for name, stored in experiments.items():
        tables = [_by_cell(stored.tables.get(table)) for table in ("completions", "fixed")]
        for cell in stored.record.get("cells", []):
            answers, fixed = (parts.get((cell["condition"], cell["seed"])) for parts in tables)
            if answers is None:
                continue
            text = canonical_json(answers.sort_values(ANSWER)["completion"].tolist())
            made = str((cell.get("provenance") or {}).get("made"))
            here = _Shared(f"{cell['condition']} of {name}", made, text, answers, fixed)
            other = seen.setdefault(cell["evaluation"], here)
            n += other is not here
            if other.text == text:
                continue
            if other.made == made or other.fixed is None or fixed is None:
                faults.append(f"{other.where} and {here.where} are one evaluation with different answers")
            else:
                again.append((other, here))
    if again:
        level = 1 - (1 - stats.CONFIDENCE) / (len(again) * len(prediction.MEASURES))
        for other, here in again:
            named = f"{other.where} and {here.where}, made by two runs"
            old, new = (prediction.observed(score.score_table(x.answers), x.fixed) for x in (other, here))
            found = prediction.compare(named, old, new, level=level, floor=floor or {})
            faults += [
                f"{row.cell}: the {row.measure} differs by more than noise" for row in found if row.inside is False
            ]
    said = f"{n} that stand in several experiments agree"
    return verdict("shared", "evaluations", faults, said + f", {len(again)} of them made by two runs" * bool(again))


@dataclass(frozen=True)
class _Shared:
    """An evaluation as one experiment holds it."""

    where: str
    made: str
    text: str
    answers: pd.DataFrame
    fixed: pd.DataFrame | None


def _by_cell(table: pd.DataFrame | None) -> dict[Any, pd.DataFrame]:
    if table is None or not len(table):
        return {}
    return dict(list(table.groupby(["condition", "seed"], sort=False)))
