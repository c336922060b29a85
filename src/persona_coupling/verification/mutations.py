"""`mutate`: the verifier tested by forgeries. Every claim and every class of evidence is forged in a copy, sealed again,
and verified with the checks of its experiment; what survives is named, here and in the paper's appendix."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Any

from persona_coupling import claims, notebooks, outputs, paths, processes
from persona_coupling.claims import Claim
from persona_coupling.errors import UserError
from persona_coupling.notebooks import Experiment
from persona_coupling.store import sha256_of
from persona_coupling.verification import forgeries, journal, redrawing, seal, trace, verify
from persona_coupling.verification.findings import Finding
from persona_coupling.verification.forgeries import NoTarget
from persona_coupling.verification.journal import Journal, Mutant, Outcome

CLASSES = (
    "answers or observations altered",
    "two conditions swapped",
    "a persona dropped",
    "an estimate edited",
    "a verdict edited",
    "a file cut in half",
    "a row lost",
    "a seed counted twice",
    "a record that lies",
    "a table or figure edited",
    "the PDF edited",
    "a number typed into a section",
    "evidence changed under its seal",
)
FRESH = 60  # forgeries of a process before it is replaced
TRIES = 4  # tables and conditions that are altered, one after the other, until the claim's own estimate moves


def mutants(profile: str) -> list[Mutant]:
    """All forgeries of a profile's evidence, in the order of claims and files."""
    made: list[Mutant] = []
    for experiment in notebooks.stored(profile):
        name, folder = experiment.name, experiment.results(profile)
        content = json.loads((paths.generated(profile) / f"{name}.json").read_text(encoding="utf-8"))
        run = [row["id"] for row in content["claims"] if row["verdict"] != "not run"]
        for claim in run:
            made += [Mutant(kind, name, claim) for kind in (*CLASSES[:5], "the PDF edited")]
        tables = sorted(folder.glob("*.parquet"))
        drawn = [p for group in (paths.figures(profile), paths.generated(profile)) for p in group.glob(f"{name}-*")]
        files = [*tables, experiment.record(profile), paths.generated(profile) / f"{name}.json", *sorted(drawn)]
        relative = [p.relative_to(paths.repository()).as_posix() for p in files]
        made += [Mutant("a file cut in half", name, target=path) for path in relative]
        made += [Mutant("a row lost", name, target=path) for path in relative[: len(tables)]]
        made += [Mutant("a table or figure edited", name, target=path) for path in relative[len(tables) + 2 :]]
        made.append(Mutant("a seed counted twice", name))
        record = outputs.read(experiment.record(profile))
        made += [Mutant("a record that lies", name, target=lie) for lie in forgeries.hyper_parameters(record)]
        made.append(Mutant("a number typed into a section", name))
        made += [Mutant("evidence changed under its seal", name, target=path) for path in relative[:2]]
    return made


def attempt(mutant: Mutant, profile: str, repository: Path, scratch: Path) -> Outcome:
    """Forge in a copy, seal it again, verify with the checks of the experiment."""
    outcome = Outcome(mutant, None, why="nothing to forge")
    for candidate in range(TRIES if mutant.kind == CLASSES[0] else 1):
        with tempfile.TemporaryDirectory(dir=scratch) as temporary:
            root = Path(temporary)
            _copy(repository, root, mutant, profile)
            with processes.environment({redrawing.ROOT: str(root)}):
                experiment = next(e for e in notebooks.discover() if e.name == mutant.experiment)
                seal.write(profile)
                try:
                    target = _forge(mutant, experiment, profile, candidate)
                except NoTarget:
                    break
                if mutant.kind != "evidence changed under its seal":
                    seal.write(profile)
                outcome = _verified(mutant, profile, scratch, target)
        if outcome.moved is not False:
            break
    return outcome


def _copy(repository: Path, root: Path, mutant: Mutant, profile: str) -> None:
    """What the checks of one experiment read; all that the PDF is made of where the PDF is forged."""
    whole = mutant.kind in ("the PDF edited", "a number typed into a section")
    own = repository / "experiments" / mutant.experiment
    shutil.copytree(own, root / "experiments" / own.name, ignore=shutil.ignore_patterns("lab_notes", "results"))
    shutil.copytree(own / "results" / profile, root / "experiments" / own.name / "results" / profile)
    (root / "paper" / "generated" / profile).mkdir(parents=True)
    (root / "figures" / profile).mkdir(parents=True)
    for path in (repository / "paper").iterdir():
        if path.is_file() and (path.suffix != ".pdf" or path.name == f"paper-{profile}.pdf"):
            shutil.copyfile(path, root / "paper" / path.name)
    for folder in (f"paper/generated/{profile}", f"figures/{profile}"):
        for path in (repository / folder).iterdir():
            if whole or path.name.startswith(mutant.experiment) or path.name == "index.json":
                shutil.copyfile(path, root / folder / path.name)
    if whole:
        for section in (repository / "experiments").glob("*/section.typ"):
            (root / "experiments" / section.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(section, root / "experiments" / section.parent.name / "section.typ")
            for source in section.parent.glob("*.py"):
                shutil.copyfile(source, root / "experiments" / section.parent.name / source.name)


def _forge(mutant: Mutant, experiment: Experiment, profile: str, candidate: int) -> str:
    """Do it. Returns what was changed, in words. Raises NoTarget."""
    kind, target = mutant.kind, paths.repository() / mutant.target
    generated = paths.generated(profile) / f"{experiment.name}.json"
    if mutant.claim:
        claim = next(c for c in claims.read() if c.id == mutant.claim)
        if kind in CLASSES[:3]:
            return _forge_results(kind, claim, experiment, profile, candidate)
        change: Callable[[], None] = {
            "an estimate edited": partial(forgeries.edited_estimate, generated, claim),
            "a verdict edited": partial(forgeries.edited_verdict, generated, claim),
            "the PDF edited": partial(forgeries.forged_pdf, profile, claim),
        }[kind]
        change()
    elif kind == "a file cut in half":
        forgeries.halved(target)
        if target.suffix == ".parquet":
            _recorded(experiment, profile, target)
    elif kind == "a table or figure edited" or kind == "evidence changed under its seal":
        forgeries.one_digit(target)
    elif kind == "a number typed into a section":
        forgeries.typed_number(profile, experiment)
    else:
        record, tables = forgeries.results(experiment, profile)
        if kind == "a row lost":
            if not len(tables[target.stem]):
                raise NoTarget("an empty table")
            tables[target.stem] = tables[target.stem].iloc[:-1]
        elif kind == "a seed counted twice":
            forgeries.doubled_seed(record, tables)
        else:
            forgeries.hyper_parameters(record)[mutant.target](record)
        forgeries.keep(experiment, profile, record, tables)
    return mutant.target


def _forge_results(kind: str, claim: Claim, experiment: Experiment, profile: str, candidate: int) -> str:
    record, tables = forgeries.results(experiment, profile)
    candidates = list(forgeries.rests_on(claim, tables))
    if kind == "a persona dropped":
        candidates = [(n, c) for n, c in candidates if "persona" in tables[n]]
    if candidate >= len(candidates):
        raise NoTarget("no table")
    name, condition = candidates[candidate]
    if kind == "two conditions swapped":
        target = f"{condition} and {forgeries.swapped(record, tables, condition)}"
    elif kind == "a persona dropped":
        tables[name], persona = forgeries.without_persona(tables[name], condition)
        target = f"{persona} of {condition} in {name}"
    else:
        tables[name] = forgeries.altered(name, tables[name], condition)
        target = f"{condition} in {name}"
    forgeries.keep(experiment, profile, record, tables)
    return target


def _recorded(experiment: Experiment, profile: str, table: Path) -> None:
    path = experiment.record(profile)
    record = json.loads(path.read_text(encoding="utf-8"))
    record["files"][table.stem] = sha256_of(table)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")


def _verified(mutant: Mutant, profile: str, scratch: Path, target: str) -> Outcome:
    """The first check that fails on the forged copy."""
    named = Mutant(mutant.kind, mutant.experiment, mutant.claim, target)
    findings: list[Finding] = [seal.check(profile)]
    if mutant.kind == "the PDF edited":
        findings.append(verify.check_pdf(profile))
    elif mutant.kind == "a number typed into a section":
        findings += [verify.check_pdf(profile), trace.check(profile)]
    moved = None
    if not any(f.status == "fails" for f in findings) and mutant.kind not in CLASSES[-3:]:
        examined = verify.examine(mutant.experiment, profile, scratch, fast=True)
        findings += examined.findings
        if mutant.kind == CLASSES[0]:
            row = next(row for row in examined.claims if row["id"] == mutant.claim)
            # no recomputed claim: a check of the raw observations, or a guard of the notebook, stopped before it
            moved = None if row["recomputed"] is None else row["recomputed"] != row["committed"]
    failing = [f for f in findings if f.status == "fails"]
    if failing:
        return Outcome(named, True, failing[0].check, failing[0].why, moved)
    return Outcome(named, False, moved=moved)


def run(profile: str, chosen: Sequence[Mutant], *, workers: int = 0) -> list[Outcome]:
    """Try forgeries side by side, under one bar; outcomes in the order of the forgeries.

    What a run that was cut off has tried on this evidence by this code is not tried again.
    """
    from tqdm import tqdm

    count = workers or os.cpu_count() or 1
    # those that leave a notebook's inputs alone share its redrawing, which a process keeps while it has room
    order = sorted(chosen, key=lambda m: (m.experiment, m.kind in CLASSES[:3] or m.kind in CLASSES[6:9]))
    kept = Journal(profile)
    order = [mutant for mutant in order if mutant not in kept.found]
    known = len(chosen) - len(order)
    if known:
        print(f"{known} forgeries were tried by a run that was cut off: {kept.path}")
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(
            total=len(chosen), initial=known, desc="forgeries", dynamic_ncols=True, file=sys.stdout, mininterval=2
        ) as bar,
    ):
        # a compiled paper leaves some megabytes in its process: new processes now and then (`max_tasks_per_child` hangs
        # in Python 3.11, 2026-11)
        for first in range(0, len(order), count * FRESH):
            with processes.pool(count) as pool:
                batch = order[first : first + count * FRESH]
                waiting = {pool.submit(in_worker, m, profile, paths.repository(), Path(scratch)): m for m in batch}
                for future in as_completed(waiting):
                    kept.add(waiting[future], future.result())
                    bar.update()
    return [kept.found[mutant] for mutant in chosen]


def in_worker(mutant: Mutant, profile: str, repository: Path, scratch: Path) -> Outcome:
    """An attempt below a scratch folder of this process, where unforged redrawings are kept for the next one."""
    own = scratch / str(os.getpid())
    own.mkdir(exist_ok=True)
    return attempt(mutant, profile, repository, own)


def summary(profile: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What `mutations.json` holds: counts by class, survivors by name, and the results that were forged."""
    tried = [o for o in outcomes if o.caught is not None]
    classes = []
    for kind in CLASSES:
        own = [o for o in tried if o.mutant.kind == kind]
        by = sorted({o.by for o in own if o.caught})
        row = {"class": kind, "mutants": len(own), "caught": sum(bool(o.caught) for o in own), "by": by}
        classes += [row] if own else []
    altering = [o for o in tried if o.mutant.kind == CLASSES[0]]
    return {
        "profile": profile,
        "classes": classes,
        "mutants": len(tried),
        "caught": sum(bool(o.caught) for o in tried),
        "moved": sum(o.moved is not False for o in altering),
        "unmoved": [str(o.mutant) for o in altering if o.moved is False],
        "survivors": [str(o.mutant) for o in tried if not o.caught],
        "untried": [str(o.mutant) for o in outcomes if o.caught is None],
        "evidence": _evidence(profile),
    }


def _evidence(profile: str) -> dict[str, Any]:
    """Hashes of all raw tables, by experiment."""
    return {e.name: outputs.read(e.record(profile))["files"] for e in notebooks.stored(profile)}


def path(profile: str) -> Path:
    """Where the outcome lies, for the paper's appendix."""
    return paths.generated(profile) / "mutations.json"


def drop_stale(profile: str) -> None:
    """Remove an outcome that was obtained on other results than there are now."""
    try:
        stale = json.loads(path(profile).read_text(encoding="utf-8"))["evidence"] != _evidence(profile)
    except FileNotFoundError:
        return
    except (UserError, ValueError, KeyError, TypeError):
        stale = True
    if stale:
        path(profile).unlink()


def text(outcomes: Sequence[Outcome], made: dict[str, Any]) -> str:
    """The table by class, and the survivors by name."""
    lines = ["", f"{'class':<34} {'forged':>6} {'caught':>6}  by"]
    for row in made["classes"]:
        lines.append(f"{row['class']:<34} {row['mutants']:>6} {row['caught']:>6}  {', '.join(row['by'])}")
    rate = made["caught"] / made["mutants"] if made["mutants"] else 0.0
    lines.append(f"{'all':<34} {made['mutants']:>6} {made['caught']:>6}  {rate:.1%}")
    lines += [f"  survived: {name}" for name in made["survivors"]]
    lines += [f"  caught, though the claim's own estimate stood still: {name}" for name in made["unmoved"]]
    lines += [f"  nothing to forge: {name}" for name in made["untried"]]
    return "\n".join(lines)


def main(profile: str, *, only: list[str] | None = None, workers: int = 0) -> int:
    """Test the verifier on a profile's evidence and keep the outcome. With `only`, some experiments, and nothing is kept.

    Returns 0 when every forgery was caught, 1 when one survived. Raises UserError when the true evidence does not verify:
    a check that fails anyway catches nothing.
    """
    names = {experiment.name for experiment in notebooks.choose(only)}
    with tempfile.TemporaryDirectory() as scratch:
        for name in [experiment.name for experiment in notebooks.stored(profile) if experiment.name in names]:
            bad = [f for f in verify.examine(name, profile, Path(scratch)).findings if f.status == "fails"]
            if bad:
                raise UserError(f"The evidence of {name} does not verify as it is: {bad[0].why}")
    chosen = [mutant for mutant in mutants(profile) if mutant.experiment in names]
    outcomes = run(profile, chosen, workers=workers)
    made = summary(profile, outcomes)
    print(text(outcomes, made))
    if not only:
        outputs.write_json(path(profile), made, sort_keys=True)
        journal.path(profile).unlink(missing_ok=True)
    return 1 if made["survivors"] else 0
