"""Parts of results that others computed: are they complete, and are they what their own record says?

Hashes say that a part arrived as it was written, not that it was written as the study asks: that is looked at here,
against the record's own profile, this package's personas and questions, and the samples that an experiment's design asks
of its cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from persona_coupling import personas, questions
from persona_coupling.errors import UserError
from persona_coupling.study import Results

SHOWN = 3  # faults in a message


def check(results: Results, folder: Path, samples: Mapping[str, int] | None = None) -> None:
    """Raise UserError, naming the first faults, when a part is not what its record says: its personas, questions,
    samples and seeds, each once, under the persona's own system prompt and the question's own words. `samples` are answers
    per persona and question, by condition, where the design asks for others than the profile."""
    try:
        faults = list(_faults(results, samples or {}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'record.json'} or a table beside it is not as `cells` writes it ({type(error).__name__}: {error})."
        ) from error
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise UserError(
            f"{folder} is not what its record says: {'; '.join(faults[:SHOWN])}{more}. Make that part again."
        )


def _faults(results: Results, samples: Mapping[str, int]) -> Iterator[str]:
    record, tables = results.record, results.tables
    seeds = record["profile"]["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        yield f"its seeds are {seeds!r}"
        return
    cells = [(str(cell["condition"]), cell["seed"]) for cell in record["cells"]]
    if len(set(cells)) != len(cells):
        yield "a condition stands twice under a seed"
    for condition, seed in cells:
        if seed not in seeds:
            yield f"{condition} has the seed {seed}, the profile says {seeds}"
    known = {condition for condition, _ in cells} | set(record["observed"])
    for name, table in tables.items():
        if not len(table):
            continue
        if "seed" in table and set(table["seed"]) != set(seeds):
            yield f"{name} has the seeds {sorted(set(table['seed']))}, the profile says {seeds}"
        strange = set(table["condition"]) - known if "condition" in table else set()
        if strange:
            yield f"{name} has the conditions {sorted(strange)}, which are in no record"
    if cells:
        yield from _answers(tables["completions"], record, set(cells), ["persona", "question", "sample"], samples)
        yield from _answers(tables["fixed"], record, set(cells), ["persona", "question"], {})


def _answers(
    table: pd.DataFrame,
    record: dict[str, Any],
    cells: set[tuple[str, int]],
    keys: list[str],
    samples: Mapping[str, int],
) -> Iterator[str]:
    """Every cell has every persona, question and sample once."""
    asked = record["profile"]["evaluation"]
    bank = {question.id: question.text for question in questions.eval_questions(asked["everyday"], asked["values"])}
    people = {persona.id: persona.prompt for persona in personas.personas()}
    name = "completions" if "sample" in keys else "fixed"
    groups = dict(list(table.groupby(["condition", "seed"], sort=False))) if len(table) else {}
    for cell in sorted(cells | set(groups)):
        where = f"{name} of {cell[0]}, seed {cell[1]}"
        if cell not in cells or cell not in groups:
            yield f"{where}: in the {'record' if cell in cells else 'table'} alone"
            continue
        part, count = groups[cell], samples.get(cell[0], asked["samples"])
        wanted = pd.MultiIndex.from_product([list(people), list(bank), range(count)][: len(keys)])
        found = pd.MultiIndex.from_frame(part[keys])
        lacking, strange = wanted.difference(found), found.difference(wanted)
        if found.has_duplicates:
            yield f"{where}: {found[found.duplicated()][0]} stands twice"
        if len(lacking):
            yield f"{where}: {lacking[0]} is missing ({len(lacking)} in all)"
        if len(strange):
            yield f"{where}: {strange[0]} was not asked ({len(strange)} in all)"
        if "sample" not in keys:
            continue
        added = {
            system.removeprefix(people[who]).strip() if system.startswith(people[who]) else None
            for who, system in zip(part["persona"], part["system"], strict=True)
            if who in people
        }
        if None in added or len(added) > 1:  # an experiment may leave out the profile's instruction, for a whole cell
            yield f"{where}: answers under another system prompt than their persona's"
        if (part["prompt"] != part["question"].map(bank)).any():
            yield f"{where}: a question in other words"
