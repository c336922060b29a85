"""What a result was made with: commit, versions, machine. Recorded beside results, never part of a key."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

from persona_coupling import paths

LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "pandas", "pyarrow")

JOINT = " / "  # between the values of parts that were joined

CODE = ("src", "constraints.txt", "experiments/*.py", "experiments/*.toml")  # git's patterns: * crosses folders


@cache
def versions() -> dict[str, str]:
    """Installed versions of the libraries that can change a number."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git(*arguments: str) -> str | None:
    """What git says of this checkout; None where it fails, is not installed or does not answer."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=paths.repository(), capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def commit() -> str:
    """The checkout's commit, with `+changes` if tracked code differs from it. In a copy without git, what whoever made
    the copy says in `$PERSONA_COUPLING_COMMIT`; otherwise `unknown`."""
    head, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--", *CODE)
    if not head or changes is None:  # a tree that nobody could compare is not called clean
        return os.environ.get("PERSONA_COUPLING_COMMIT", "unknown")
    return head + ("+changes" if changes else "")


@cache
def processor() -> str:
    """The processor's model name, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """A human-readable name of the compute device."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    return f"{processor()}, {os.cpu_count()} cores"


def record(device: str) -> dict[str, Any]:
    """Everything that a reader would ask about the machine of a result."""
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }


def distinct(records: Iterable[Mapping[str, Any]], field: str) -> list[str]:
    """Each value of a field of these records once, in their order; each part's where `evidence.combine` joined some."""
    return list(dict.fromkeys(value for record in records for value in str(record[field]).split(JOINT)))
