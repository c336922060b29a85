"""A disk that is full or cannot be written, whichever library says so, in a sentence with a remedy."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from persona_coupling.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EACCES, errno.EROFS, errno.EPERM)
NAMED = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")  # Rust's and Python's way to print the system's number


def cause(error: BaseException) -> OSError | None:
    """The system's error behind an exception: itself, one that it was raised from, or one that its text names, as
    safetensors and tokenizers do, whose errors are no OSError. None unless it is the error itself or about a disk."""
    if isinstance(error, OSError):
        return error
    link: BaseException | None = error
    while link is not None:
        numbers = [link.errno] if isinstance(link, OSError) else [int(a or b) for a, b in NAMED.findall(str(link))]
        for number in numbers:
            if number in (*FULL, *READ_ONLY, errno.EFBIG, errno.EIO):
                return OSError(number, os.strerror(number))
        link = link.__cause__
    return None


def message(error: OSError, root: Path) -> str:
    """What happened to a store and what to do."""
    if error.errno in FULL:
        return (
            f"No space left on the disk that holds {root}. Every finished cell is kept: free some space, or set "
            "PERSONA_COUPLING_CACHE to a folder on a larger disk, and run again."
        )
    if error.errno in READ_ONLY:
        return (
            f"{error.filename or root} cannot be written ({error.strerror}). "
            "Set PERSONA_COUPLING_CACHE to a folder that can, and run again."
        )
    return f"{error.filename or root}: {error.strerror or error}. Finished cells are kept; mend this and run again."


def in_words(error: Exception, root: Path) -> Exception:
    """A UserError with a remedy in place of an error of the disk that holds a store; any other error as it is."""
    found = None if isinstance(error, UserError) else cause(error)
    if found is None:
        return error
    worded = UserError(message(found, root))
    worded.__cause__ = error  # as `raise ... from` keeps it
    return worded


@contextmanager
def explained(root: Path) -> Iterator[None]:
    """Raise UserError with a remedy for an error of the disk that holds a store; other errors pass."""
    try:
        yield
    except Exception as error:
        worded = in_words(error, root)
        if worded is error:
            raise
        raise worded from error
