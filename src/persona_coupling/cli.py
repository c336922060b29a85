"""The commands behind the nox sessions: `python -m persona_coupling --help` lists them."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from persona_coupling import notebooks, outputs, paths, planning, processes, website
from persona_coupling.errors import GuardError, UserError
from persona_coupling.study import STORED_ONLY

# Large blocks stay in the heap instead of being mapped and returned on every step: half the page faults on a CPU
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
# PEFT writes the names of its modules as a set gives them: by hash, which Python draws anew for each process
SETTLED = MALLOC | {"PYTHONHASHSEED": "0"}


def settle_process() -> None:
    """Start this process again with the settings that the C library and Python read at start only."""
    if any(name not in os.environ for name in SETTLED):
        os.environ.update(SETTLED)
        os.execv(sys.executable, [sys.executable, "-m", "persona_coupling", *sys.argv[1:]])


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0 done, 2 the user can mend it, 3 a guard fired, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="persona_coupling", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("reproduce", "train, sample, score, draw and write the PDF"),
        ("cells", "only train, sample and score, and keep the tables: for a machine that draws nothing"),
        ("plan", "say what `reproduce` would do"),
    ):
        command = commands.add_parser(name, help=what)
        _common(command)
        command.add_argument("--only", action="append", default=[], help="an experiment's name or number; repeatable")
        command.add_argument("--seeds", default="", help="seeds instead of the profile's, e.g. 0,1,2")
        command.add_argument(
            "--workers", type=int, default=0, help="stages built side by side (default: the machine's)"
        )
        command.add_argument("--model", default="", help="another model: a folder, or owner/name@revision of the hub")
        command.add_argument("--anyway", action="store_true", help="start although something seems not to fit")
        command.add_argument(
            "--cluster", default="", help="hand the stages to Ray: auto, host:port of its head, or local"
        )
        command.add_argument(
            "--exchange", default="", help="an fsspec URL for artifacts where the nodes of --cluster share no folder"
        )
        if name == "plan":
            command.add_argument("--cells", action="store_true", help="a row per cell: cached, stale and why, or new")
        if name == "cells":
            command.add_argument("--into", default="", help="a folder for the tables instead of the experiments' own")
            command.add_argument(
                "--finished", action="store_true", help="build nothing: keep what a run that was cut off has finished"
            )
    joined = commands.add_parser("combine", help="join results that were made in parts, seed by seed")
    _common(joined)
    joined.add_argument("parts", nargs="+", help="folders that `cells --into` wrote")
    joined.add_argument("--seeds", default="", help="keep these of the parts' seeds alone, e.g. 5,6,7")
    for name, what in (("paper", "redraw figures, tables and PDF from stored results"), ("claims", "print verdicts")):
        _common(commands.add_parser(name, help=what))
        if name == "paper":
            commands.choices[name].add_argument("--notes", action="store_true", help="execute the lab notes again too")
    cleaning = commands.add_parser("clean", help="remove artifacts that no design and no stored result refers to")
    cleaning.add_argument("--stale", action="store_true", help="show them and ask; without it nothing is done")
    cleaning.add_argument("--damaged", action="store_true", help="likewise artifacts that differ from their manifest")
    cleaning.add_argument("--yes", action="store_true", help="do not ask")
    cleaning.add_argument("--seeds", default="", help="seeds of a run without stored results, to be kept, e.g. 7,8")
    cleaning.add_argument("--model", default="", help="a model of a run without stored results, to be kept")
    _common(commands.add_parser("kit", help="write REVIEWERS.md's claims, codecheck.yml and RO-Crate metadata again"))
    commands.add_parser("costs", help="write docs/COST.md and the README's table of costs again")
    website.add_arguments(commands.add_parser("notes", help="write the lab notes' site"))
    _verifying(commands)
    stress = commands.add_parser(
        "stress", help="kill `reproduce` again and again in a copy, and compare what comes out"
    )
    _common(stress)
    stress.add_argument("--kills", type=int, default=50, help="how often; 0: only run twice and compare")
    stress.add_argument("--only", action="append", default=[], help="an experiment's name or number; repeatable")
    stress.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    bench = commands.add_parser("bench", help="measure training and sampling side by side")
    bench.add_argument("--steps", type=int, default=8, help="timed steps; 8 batches are one window of lengths")
    chosen = parser.parse_args(arguments)
    try:
        return int(COMMANDS[chosen.command](chosen) or 0)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except GuardError as error:
        print(f"\nA guard fired: {error}. No number was written for it; finished cells are kept.", file=sys.stderr)
        return 3
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        where = error.filename or "a file"
        print(
            f"\n{where} cannot be written: {error.strerror}. Finished cells are kept; mend this and run again.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. Every finished cell is kept; run the same command to go on.", file=sys.stderr)
        return 130


def _verifying(commands: Any) -> None:
    """Arguments of the commands of `verification`."""
    verifying = {
        "verify": "check the committed evidence and recompute every verdict, without a model",
        "mutate": "test the verifier: forge the evidence in copies and count what it catches",
        "spotcheck": "train and sample some cells of a claim again and compare",
    }
    for name, what in verifying.items():
        command = commands.add_parser(name, help=what)
        _common(command)
        command.add_argument("--workers", type=int, default=0, help="processes side by side (default: the cores)")
    commands.choices["mutate"].add_argument("--only", action="append", default=[], help="an experiment; repeatable")
    spot = commands.choices["spotcheck"]
    spot.add_argument("--claim", required=True, help="a claim's id")
    spot.add_argument("--cells", type=int, default=1, help="how many cells to make again")
    spot.add_argument("--seed", type=int, required=True, help="your own seed, which picks the cells")
    spot.add_argument("--into", default="", help="keep the fresh artifacts in this empty folder")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", default="", help="smoke, quick, full or qwen2.5-7b (default: full with CUDA, else quick)"
    )


def stored_profile(asked: str) -> str:
    """The profile asked for, or the one that the evidence is of. Raises UserError if there is none."""
    found = asked or _evidence()
    if found is None:
        raise UserError("There are no stored results. Run `nox -s reproduce` first.")
    return found


def _evidence() -> str | None:
    """The strongest profile that has stored results of every experiment, else of any; smoke is none."""
    stored = {name: len(notebooks.stored(name)) for name in ("full", "quick")}
    return next((name for name in stored if stored[name] and stored[name] == max(stored.values())), None)


def plan(arguments: argparse.Namespace) -> None:
    """Say what would run."""
    planning.planned(arguments)


def clean(arguments: argparse.Namespace) -> None:
    """Remove what nothing refers to, or what is damaged, after showing it."""
    from persona_coupling import upkeep
    from persona_coupling.store import Store

    store, seeds = Store(paths.artifacts()), planning.seeds(arguments.seeds)
    asked = {"stale": arguments.stale, "damaged": arguments.damaged, "yes": arguments.yes}
    upkeep.clean(store, **asked, seeds=seeds, model=arguments.model)


def _built(arguments: argparse.Namespace) -> tuple[dict[str, Any], tuple[notebooks.Experiment, ...]]:
    """Plan, then build all stages under one bar."""
    from persona_coupling import progress
    from persona_coupling.machine import tuned

    if arguments.exchange and not arguments.cluster:
        raise UserError("--exchange says how the nodes of a cluster share artifacts: it needs --cluster.")
    if arguments.workers and arguments.cluster:
        raise UserError("--workers is for one machine; on a cluster the profile's [cluster] says what a task takes.")
    if arguments.cluster:
        from persona_coupling import cluster

        cluster.look(arguments.cluster)
    run = planning.planned(arguments, start=True)
    if arguments.cluster:
        cluster.build(
            run.plan,
            run.store,
            run.speeds,
            run.profile.cluster,
            address=arguments.cluster,
            exchange=arguments.exchange,
            measured=run.measured is not None,
        )
        return run.parameters, run.experiments
    settings = run.settings
    with tuned(train_tokens=settings.train_tokens, sample_batch=settings.sample_batch):
        progress.build(run.plan, run.store, settings, run.speeds)
    return run.parameters, run.experiments


def cells(arguments: argparse.Namespace) -> None:
    """Build all stages and keep each experiment's tables, without notebooks or paper.

    With `--finished` nothing is built: experiments whose artifacts are all there are kept, the others are named.
    """
    if arguments.finished:
        parameters, experiments = planning.parameters(arguments), notebooks.choose(arguments.only)
    else:
        parameters, experiments = _built(arguments)
    keep = partial(_keep, into=arguments.into, finished=arguments.finished)
    with outputs.turn():
        notebooks.each(keep, [(experiment, parameters) for experiment in experiments], lambda _name: None)


def _keep(experiment: notebooks.Experiment, parameters: dict[str, Any], *, into: str, finished: bool) -> None:
    """Read an experiment's artifacts and write its tables, in a process of its own: to compress the answers takes long."""
    from persona_coupling.study import Study

    folder = Path(into).resolve() / experiment.name if into else experiment.results(parameters["profile"])
    study = Study.open(parameters["profile"], seeds=parameters["seeds"], model=parameters["model"] or None)
    design = notebooks.design_of(experiment, parameters)
    missing = sum(not study.lab.store.has(stage) for stage in design.stages()) if finished else 0
    if missing:
        print(f"  {experiment.name} lacks {missing} artifacts", flush=True)
        return
    study.run(design, folder)
    print(f"  results    {_short(folder)}/", flush=True)


def combine(arguments: argparse.Namespace) -> None:
    """Join parts into the experiments' results of a profile. All are read and checked before any is replaced."""
    from persona_coupling import evidence

    name, seeds = planning.profile_name(arguments.profile), planning.seeds(arguments.seeds)
    joined = []
    for experiment in notebooks.discover():
        found = [Path(part) / experiment.name for part in arguments.parts]
        folders = [folder for folder in found if (folder / "record.json").is_file()]
        if folders:
            joined.append((experiment, evidence.of_folders(experiment, name, folders, seeds)))
        else:
            print(f"  {experiment.name}: none of the parts has it")
    for experiment, results in joined:
        results.save(experiment.results(name))
        print(f"  {experiment.name}: {len(results.record['parts'])} parts, seeds {results.record['profile']['seeds']}")


def reproduce(arguments: argparse.Namespace) -> None:
    """Everything: stages under one bar, then the notebooks, then the paper."""
    from persona_coupling.verification import ledger

    started = time.monotonic()
    before = ledger.read(planning.profile_name(arguments.profile))
    parameters, experiments = _built(arguments)
    name = parameters["profile"]
    with outputs.turn():
        print(f"{len(experiments)} notebooks ...", flush=True)
        notebooks.each(notebooks.execute, [(e, parameters) for e in experiments], _said("executed"))
        pdf = build_paper(name)
    entries = ledger.compare(before, ledger.read(name))
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} min. Where things lie:")
    for experiment in experiments:
        print(f"  lab note   {_short(experiment.lab_note(name))}")
        print(f"  results    {_short(experiment.results(name))}/")
    print(f"  figures    {_short(paths.figures(name))}/")
    print(f"  tables     {_short(paths.generated(name))}/")
    print(f"  paper      {_short(pdf)}")
    try:
        kept = _short(ledger.write(name, entries))
    except OSError as error:  # a cache that is only read
        kept = f"not kept: {error.filename}: {error.strerror}"
    print(f"  ledger     {kept}")
    print_claims(name)
    print(ledger.text(entries))


def _said(what: str) -> Callable[[str], None]:
    return lambda name: print(f"  {what} {name}", flush=True)


def _short(path: Path) -> str:
    inside = path.is_relative_to(paths.repository())
    return str(path.relative_to(paths.repository()) if inside else path)


def paper(arguments: argparse.Namespace) -> None:
    """Figures, tables and PDF again from stored results; loads no model."""
    name = stored_profile(arguments.profile)
    started = time.monotonic()
    if not notebooks.stored(name):
        raise UserError(f"There are no stored results of {name}. Run `nox -s reproduce -- --profile {name}`.")
    jobs = []
    for experiment in notebooks.discover():
        record = experiment.record(name)
        if not record.is_file():
            print(f"  {experiment.name} has not been run under {name}")
            continue
        seeds = outputs.read(record).get("profile", {}).get("seeds", [])
        jobs.append((experiment, {"profile": name, "seeds": seeds, "model": ""}))
    if arguments.notes:
        with processes.environment({STORED_ONLY: "1"}):
            notebooks.each(notebooks.execute, jobs, _said("executed"))
    else:
        notebooks.each(notebooks.redraw, jobs, _said("redrawn"))
    print(f"{_short(build_paper(name))} in {time.monotonic() - started:.0f} s")


def build_paper(profile: str) -> Path:
    """Write the PDF from generated files alone, then seal the evidence. Raises UserError with typst's message."""
    from persona_coupling import cluster_simulation, kit, prose
    from persona_coupling.verification import mutations, seal

    mutations.drop_stale(profile)
    index = prose.write_index(paths.generated(profile))
    if profile == _evidence() and (paths.repository() / "README.md").is_file():
        prose.write_readme(index)
    target = paths.pdf(profile)
    with outputs.replaced(target) as temporary:
        temporary.write_bytes(prose.compile_paper(profile))
    seal.write(profile)
    cluster_simulation.follow(profile)
    if profile == _evidence() and (paths.repository() / "REVIEWERS.md").is_file():
        kit.write(profile)
    return target


def write_kit(arguments: argparse.Namespace) -> None:
    """The artifact-evaluation kit of the evidence, from generated files."""
    from persona_coupling import kit

    name = stored_profile(arguments.profile)
    if name != _evidence():
        raise UserError(f"The kit describes the evidence, which is of the profile {_evidence()}, not {name}.")
    for path in kit.write(name):
        print(f"  {_short(path)}")


def write_costs(_arguments: argparse.Namespace) -> None:
    """What the large profile costs, from what was measured of it."""
    from persona_coupling import cost_tables

    for path in cost_tables.write():
        print(f"  {_short(path)}")


def print_claims(profile: str) -> None:
    """The claims table of stored verdicts."""
    rows = []
    for path in sorted(paths.generated(profile).glob("[0-9][0-9]_*.json")):
        content = outputs.read(path)
        if "claims" in content:
            rows += content["claims"]
    if not rows:
        raise UserError(f"There are no verdicts of {profile}. Run `nox -s reproduce -- --profile {profile}`.")
    width = max(len(row["id"]) for row in rows)
    columns = shutil.get_terminal_size((120, 24)).columns
    print(f"\nclaims under {profile}:")
    for row in rows:
        print(f"  {row['id']:<{width}}  {row['verdict']:<15}  {row['why']}"[: max(columns, 80)])
        print(f"  {'':<{width}}  {row['statement']}")


def print_stored_claims(arguments: argparse.Namespace) -> None:
    """Verdicts of the profile asked for, or of the best stored one."""
    print_claims(stored_profile(arguments.profile))


def bench(arguments: argparse.Namespace) -> None:
    """Side-by-side speeds."""
    from persona_coupling import bench as benchmark

    benchmark.run(steps=arguments.steps)


def verify(arguments: argparse.Namespace) -> int:
    """Whether the committed claims hold. 0 they do, 1 some do not, 2 could not be checked."""
    from persona_coupling.verification import verify as verification

    with outputs.at_rest():
        return verification.main(stored_profile(arguments.profile), arguments.workers)


def mutate(arguments: argparse.Namespace) -> int:
    """Test the verifier; the outcome goes into the paper's appendix."""
    from persona_coupling.verification import mutations

    name = stored_profile(arguments.profile)
    code = mutations.main(name, only=arguments.only, workers=arguments.workers)
    if not arguments.only:
        print(_short(build_paper(name)))
    return code


def spotcheck(arguments: argparse.Namespace) -> int:
    """Some cells of a claim again. Exit codes as of `verify`."""
    from persona_coupling.verification import spotcheck as spot

    folder = Path(arguments.into).resolve() if arguments.into else None
    name = stored_profile(arguments.profile)
    return spot.run(name, arguments.claim, count=arguments.cells, seed=arguments.seed, folder=folder)


def stress(arguments: argparse.Namespace) -> int:
    """Kill a run again and again. Exit codes: 0 nothing lost, 1 something was."""
    from persona_coupling import stress as kills

    return kills.main(arguments.kills, arguments.only, arguments.seed, arguments.profile or "smoke")


def _alone(command: Callable[[argparse.Namespace], int | None]) -> Callable[[argparse.Namespace], int | None]:
    """The command, while no other process writes in this checkout."""

    def run(arguments: argparse.Namespace) -> int | None:
        with outputs.turn():
            return command(arguments)

    return run


COMMANDS = {
    "reproduce": reproduce,
    "cells": cells,
    "combine": _alone(combine),
    "plan": plan,
    "clean": clean,
    "paper": _alone(paper),
    "claims": print_stored_claims,
    "kit": _alone(write_kit),
    "costs": _alone(write_costs),
    "notes": website.command,
    "stress": stress,
    "bench": bench,
    "verify": verify,
    "mutate": _alone(mutate),
    "spotcheck": spotcheck,
}
