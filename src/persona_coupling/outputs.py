"""What a run leaves in the checkout: one process writes at a time, and a file is there whole or as it was before."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from persona_coupling import paths
from persona_coupling.errors import GuardError, UserError

LOCK = ".outputs.lock"
TEMPORARY = re.compile(r"\..+\.\d+")  # .<name>.<process>, a file or a folder
SOURCE = re.compile(r"\d\d_[a-z0-9_]+-\d+\.ipynb")  # of a notebook that a process executes, in the cache
PLACES = ("experiments/*/results/*", "experiments/*/lab_notes", "figures/*", "paper/generated/*", "paper", ".")


def beside(path: Path) -> Path:
    """The name under which this process writes what is to become `path`; `turn` removes what a dead process left."""
    return path.with_name(f".{path.name}.{os.getpid()}")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name beside a file, to be written inside; then it takes the file's place. After an error, a kill or a
    full disk the old file is there as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Replace a text file by way of a temporary one beside it: a kill leaves the old file or the new one."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: Any, *, sort_keys: bool = False) -> None:
    """Replace a JSON file, indented and with a line's end, as `write` does. Raises GuardError for a number that is none."""
    try:
        text = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=sort_keys, allow_nan=False)
    except ValueError as error:
        raise GuardError(f"{path.name} would hold a number that is none (NaN or infinite): {error}") from error
    write(path, text + "\n")


def between(text: str, begins: str, ends: str, block: str, where: str) -> str:
    """A text with `block` between two of its comments. Raises GuardError, saying `where`, when it lacks them."""
    before, found, rest = text.partition(begins)
    _, ended, after = rest.partition(ends)
    if not found or not ended:
        raise GuardError(f"{where} lacks the comments between which it is written")
    return before + begins + block + ends + after


def read(path: Path) -> dict[str, Any]:
    """A JSON object that a run wrote. Raises UserError, naming the file and the remedy, when it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"{path} is damaged ({error}). Restore or delete it, then run again.") from error
    return content


def sweep() -> None:
    """Remove what killed processes left half-written; only for who holds the lock, whose writers are gone."""
    root, notebooks = paths.repository(), paths.artifacts() / "notebooks"
    left = [path for place in PLACES for path in root.glob(f"{place}/.*") if TEMPORARY.fullmatch(path.name)]
    left += [path for path in notebooks.glob("*.ipynb") if SOURCE.fullmatch(path.name)]
    for path in left:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def turn(say: Callable[[str], None] = print) -> Iterator[None]:
    """Inside, this process alone writes results, notes, figures and the paper of this checkout; others wait. The system
    releases the lock of a process that dies."""
    with _locked(say):
        sweep()
        yield


@contextmanager
def at_rest(say: Callable[[str], None] = print) -> Iterator[None]:
    """Inside, no other process writes: for who reads all of a checkout and compares. In one that cannot be written to,
    nobody does."""
    if os.access(paths.repository(), os.W_OK):
        with _locked(say):
            yield
    else:
        yield


@contextmanager
def _locked(say: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(paths.repository() / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("waiting for another process that writes results or the paper of this checkout")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
