"""What a check says: a finding is a record with a status and a reason, and the exit code follows from all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["holds", "fails", "unknown", "skipped"]
HOLDS, FAILS, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Finding:
    """One check of one thing. `skipped` does not count: the machine cannot tell, and nothing hangs on it."""

    check: str
    about: str
    status: Status
    why: str = ""


def exit_code(findings: Iterable[Finding]) -> int:
    """0 everything holds, 1 something fails, 2 nothing fails but something could not be checked."""
    statuses = {finding.status for finding in findings}
    return FAILS if "fails" in statuses else UNKNOWN if "unknown" in statuses else HOLDS


def verdict(check: str, about: str, faults: Iterable[str], said: str = "") -> Finding:
    """A finding that fails with the first faults, or holds with what there is to say."""
    found = list(faults)
    if not found:
        return Finding(check, about, "holds", said)
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return Finding(check, about, "fails", "; ".join(found[:3]) + more)
