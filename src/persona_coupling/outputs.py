"""What a run leaves in the checkout: one process writes at a time, and a file is there whole or as it was before."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from persona_coupling import paths

LOCK = ".outputs.lock"


def write(path: Path, text: str) -> None:
    """Replace a text file by way of a temporary one beside it: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def turn(say: Callable[[str], None] = print) -> Iterator[None]:
    """Inside, this process alone writes results, notes, figures and the paper of this checkout; others wait. The system
    releases the lock of a process that dies."""
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
