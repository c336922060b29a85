"""`verify`: whether the committed evidence carries the committed claims, in a minute and without a model."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from persona_coupling import earlier, notebooks, paths, processes, profiles, prose
from persona_coupling.errors import GuardError, UserError
from persona_coupling.profiles import Profile
from persona_coupling.verification import observations, redrawing, seal, trace
from persona_coupling.verification.findings import FAILS, UNKNOWN, Finding, exit_code, verdict
from persona_coupling.verification.prediction import noise_floor

COLUMNS = 100


@dataclass
class Examined:
    """Findings on an experiment, or on something that spans them, its claims, and what it took."""

    about: str
    findings: list[Finding] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def examine(name: str, profile: str, scratch: Path, *, fast: bool = False) -> Examined:
    """All checks of one experiment. With `fast`, redrawing is left out once a check of the raw observations failed."""
    started = time.monotonic()
    experiment = next(e for e in notebooks.discover() if e.name == name)
    made = Examined(name)
    stored, files = observations.read(name, experiment.results(profile))
    made.findings.append(files)
    if files.status == "holds":
        values, absent = present(profiles.load(profile), stored.record)
        if absent:
            why = f"the seeds {', '.join(map(str, absent))} of the profile have not been run"
            made.findings.append(Finding("seeds", name, "unknown", why))
        design = notebooks.design_of(experiment, {"profile": profile, "seeds": list(values.seeds), "model": ""})
        for check in (
            lambda: observations.made_with(stored, values),
            lambda: observations.made_by(stored, design),
            lambda: observations.complete(stored, values, design),
            lambda: observations.distinct(stored, design.same),
        ):
            made.findings.append(guarded(check, name))
    if files.status == "holds" and not (fast and exit_code(made.findings) == FAILS):
        drawn = redrawing.redraw(name, profile, list(stored.record["profile"]["seeds"]), scratch)
        made.findings += redrawing.compare(name, profile, drawn)
        made.claims = list(redrawing.rows(name, profile, drawn))
    else:
        made.claims = list(redrawing.rows(name, profile, redrawing.Redrawn(scratch)))
    made.seconds = time.monotonic() - started
    return made


def present(profile: Profile, record: Mapping[str, Any]) -> tuple[Profile, tuple[int, ...]]:
    """The profile as far as a record goes, and the seeds that the record lacks: a run that was cut off counts for the
    seeds that it finished, and says so. A record with seeds of its own is left to be held against the whole profile."""
    seeds = record.get("profile", {}).get("seeds")
    absent = tuple(seed for seed in profile.seeds if seed not in seeds) if isinstance(seeds, list) else ()
    if not absent or not seeds or list(seeds) != [seed for seed in profile.seeds if seed in seeds]:
        return profile, ()
    return replace(profile, seeds=tuple(seeds)), absent


def guarded(check: Callable[[], Finding], about: str) -> Finding:
    """A check's finding; evidence so damaged that the check itself breaks is a failure."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a forged input may break anything; whatever it breaks is the finding
        return Finding("readable", about, "fails", f"{type(error).__name__}: {error}")


def check_index(profile: str) -> Finding:
    """Whether `index.json` (verdicts, headline, counts) is what the experiments' files give, and the README quotes it."""
    folder = paths.generated(profile)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / profile
        shutil.copytree(folder, copy)
        try:
            index = prose.write_index(copy)
        except (GuardError, UserError) as error:
            return verdict("index", "index.json", [str(error)])
        difference = redrawing.differs(folder / "index.json", copy / "index.json")
    faults = [f"index.json {difference}"] if difference else []
    readme = paths.repository() / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if prose.quotes(text, profile):
        faults += [] if prose.with_headline(text, index) == text else ["README.md states another headline"]
    return verdict("index", "index.json, README", faults)


def check_pdf(profile: str) -> Finding:
    """Whether the committed PDF is, byte for byte, what the committed files compile to."""
    pdf = paths.pdf(profile)
    try:
        same = prose.compile_paper(profile) == pdf.read_bytes()
    except (OSError, UserError) as error:
        return verdict("pdf", pdf.name, [str(error)])
    return verdict("pdf", pdf.name, [] if same else ["compiled again it has other bytes"], "byte for byte")


def check_earlier(profile: str) -> Finding:
    """Whether the runs that the paper sets beside this copy's are what the commits hold that it names for them."""
    found = earlier.differences(profile)
    wrong = [difference for differences in found.values() for difference in differences or []]
    if not wrong and None in found.values():
        return Finding("earlier", "runs before", "skipped", "git does not have their commits here")
    return verdict("earlier", "runs before", wrong, f"{len(found)} as their commits hold them")


def check_mutations(profile: str, records: dict[str, Any]) -> Finding:
    """Whether the verifier's own test, if the paper prints one, was made on these results."""
    path = paths.generated(profile) / "mutations.json"
    if not path.is_file():
        return Finding("mutations", path.name, "skipped", "the verifier was not tested on these results")
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))["evidence"]
    except (ValueError, KeyError, TypeError) as error:
        return verdict("mutations", path.name, [f"cannot be read ({error})"])
    current = {name: record.get("files") for name, record in records.items()}
    return verdict("mutations", path.name, [] if stated == current else ["was made on other results: `nox -s mutate`"])


def across(what: str, profile: str) -> Examined:
    """A check that spans experiments, by name; run in a process of its own."""
    started = time.monotonic()
    checks = {"index": check_index, "pdf": check_pdf, "trace": trace.check, "seal": seal.check}
    if what in checks:
        found = [guarded(lambda: checks[what](profile), what)]
    else:
        stored = {e.name: observations.read(e.name, e.results(profile))[0] for e in notebooks.stored(profile)}
        records = {name: s.record for name, s in stored.items()}
        found = [
            guarded(lambda: observations.commits(records), "history"),
            guarded(lambda: observations.shared(stored, noise_floor(profile)[0]), "evaluations"),
            guarded(lambda: check_mutations(profile, records), "mutations.json"),
            guarded(lambda: check_earlier(profile), "runs before"),
        ]
    return Examined(what, found, seconds=time.monotonic() - started)


ACROSS = ("trace", "pdf", "evidence", "index", "seal")


def run(profile: str, *, workers: int = 0) -> list[Examined]:
    """Check everything of a profile in processes side by side. Raises UserError when it has no stored results."""
    names = [experiment.name for experiment in notebooks.stored(profile)]
    if not names:
        raise UserError(f"There are no stored results of {profile}: nothing to verify.")
    lost = [e.name for e in notebooks.discover() if e.name not in names and _claims_committed(e.name, profile)]
    count = workers or min(os.cpu_count() or 1, 8)
    with tempfile.TemporaryDirectory() as scratch, processes.pool(count) as pool:
        spanning = [pool.submit(across, what, profile) for what in ACROSS[:2]]
        single = [pool.submit(examine, name, profile, Path(scratch)) for name in names]
        spanning += [pool.submit(across, what, profile) for what in ACROSS[2:]]
        made = [future.result() for future in (*single, *spanning)]
    for name in lost:
        finding = Finding("files", name, "fails", "claims are committed, but no results")
        made.append(Examined(name, [finding], list(redrawing.rows(name, profile, redrawing.Redrawn(Path())))))
    return made


def _claims_committed(name: str, profile: str) -> bool:
    return (paths.generated(profile) / f"{name}.json").is_file()


def report(examined: list[Examined], seconds: float) -> str:
    """The table of claims and the table of checks as text, no wider than 100 columns."""
    lines = ["", f"{'claim':<22} {'committed':<23} {'recomputed':<23} {'verdict':<15} as committed"]
    for made in examined:
        failing = [f for f in made.findings if f.status == "fails"]
        for row in made.claims:
            old, new = row["committed"], row["recomputed"]
            holds, why = _holds(old, new, failing)
            shown = (new or old)["verdict"]
            lines.append(f"{row['id']:<22} {_interval(old):<23} {_interval(new):<23} {shown:<15} {holds}")
            lines += textwrap.wrap(why, COLUMNS - 4, initial_indent="    ", subsequent_indent="    ")
    lines += ["", f"{'check':<11} {'of':<24} {'status':<8} {'seconds':>7}  why"]
    for made in examined:
        for position, finding in enumerate(made.findings):
            time_of = f"{made.seconds:7.1f}" if position == len(made.findings) - 1 else " " * 7
            head = f"{finding.check:<11} {finding.about[:24]:<24} {finding.status:<8} {time_of}  "
            lines += textwrap.wrap(finding.why or "-", COLUMNS, initial_indent=head, subsequent_indent=" " * 8)
    findings = [finding for made in examined for finding in made.findings]
    counts = {s: sum(f.status == s for f in findings) for s in ("holds", "fails", "unknown", "skipped")}
    said = ("every claim holds as committed", "some claim or check fails", "could not be checked")[exit_code(findings)]
    lines += ["", f"{said}: {', '.join(f'{n} {s}' for s, n in counts.items() if n)}; {seconds:.0f} s"]
    return "\n".join(lines)


def _holds(old: Any, new: Any, failing: list[Finding]) -> tuple[str, str]:
    """Whether a claim holds as committed, and why (not)."""
    if old is None:
        return "NO", "the claim is not in the committed file"
    if new is None:
        return "NO", f"not recomputed: {failing[0].why if failing else 'unknown'}"
    if (old["verdict"], old["why"]) != (new["verdict"], new["why"]) or _interval(old) != _interval(new):
        return "NO", f"committed as {old['verdict']} ({old['why']}), recomputed {new['verdict']} ({new['why']})"
    if failing:
        return "NO", f"{failing[0].check} of its experiment fails: {failing[0].why}"
    return "yes", new["why"]


def _interval(row: Any) -> str:
    if row is None or row["value"] is None:
        return "-"
    if row["low"] is None:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def main(profile: str, workers: int = 0) -> int:
    """Verify a profile and print what was found. Returns the exit code: 0 holds, 1 fails, 2 could not be checked."""
    started = time.monotonic()
    print(f"verifying {profile} ...", flush=True)
    try:
        examined = run(profile, workers=workers)
    except UserError as error:
        print(error)
        return UNKNOWN
    print(report(examined, time.monotonic() - started))
    return exit_code(finding for made in examined for finding in made.findings)
