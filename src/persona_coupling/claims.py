"""Claims, written before the run, and the verdicts that estimates and gates give them. Imports no model code.

A claim names an estimate and two half-lines. `supported` if the whole interval lies in the first, `refuted` if the whole
interval lies in the second, `inconclusive` otherwise; `uninterpretable` if any of its gates failed, whatever the number.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from persona_coupling import paths
from persona_coupling.errors import UserError

Verdict = Literal["supported", "refuted", "inconclusive", "uninterpretable", "not run"]


@dataclass(frozen=True)
class Bound:
    """A half-line: above or below a value."""

    direction: Literal["above", "below"]
    value: float

    def holds(self, low: float, high: float) -> bool:
        """Whether a whole interval lies in it."""
        return low > self.value if self.direction == "above" else high < self.value


@dataclass(frozen=True)
class Claim:
    """A prediction with what would refute it."""

    id: str
    experiment: str
    statement: str
    estimand: str  # in words
    estimate: str  # its name among the experiment's estimates
    supported: Bound
    refuted: Bound
    refuted_by: str  # in words
    gates: tuple[str, ...]


@dataclass(frozen=True)
class Gate:
    """A condition that must hold before a verdict means anything."""

    id: str
    statement: str
    value: float | None
    direction: Literal["at least", "at most"]
    threshold: float

    @property
    def passed(self) -> bool:
        """A missing value passes no gate."""
        if self.value is None or math.isnan(self.value):
            return False
        return self.value >= self.threshold if self.direction == "at least" else self.value <= self.threshold

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Judgement:
    """A claim's verdict and why."""

    claim: Claim
    verdict: Verdict
    why: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    otherwise: Verdict | None = None  # where a gate failed: what the interval alone would give; a look, counted nowhere

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, one flat record."""
        return {
            "id": self.claim.id,
            "experiment": self.claim.experiment,
            "statement": self.claim.statement,
            "estimand": self.claim.estimand,
            "estimate": self.claim.estimate,
            "predicate": f"{self.claim.supported.direction} {self.claim.supported.value:g}".replace("-", "−"),
            "refuted_by": self.claim.refuted_by,
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "verdict": self.verdict,
            "why": self.why,
            "otherwise": self.otherwise,
        }


def read(path: Path | None = None) -> tuple[Claim, ...]:
    """All claims of `paper/claims.toml`. Raises UserError for a missing, unknown or contradictory field."""
    path = path or paths.repository() / "paper" / "claims.toml"
    claims = []
    for row in tomllib.loads(path.read_text(encoding="utf-8")).get("claim", []):
        where = f"{path}, claim {row.get('id', '?')}"
        fields = {
            "id",
            "experiment",
            "statement",
            "estimand",
            "estimate",
            "supported",
            "refuted",
            "refuted_by",
            "gates",
        }
        if set(row) != fields:
            raise UserError(f"{where}: missing or unknown field {', '.join(sorted(set(row) ^ fields))}.")
        if not isinstance(row["gates"], list):
            raise UserError(f"{where}: gates is not a list.")
        supported, refuted = _bound(row["supported"], where), _bound(row["refuted"], where)
        if supported.direction == refuted.direction or not (
            (supported.value >= refuted.value) if supported.direction == "above" else (supported.value <= refuted.value)
        ):
            raise UserError(f"{where}: the ranges of `supported` and `refuted` overlap.")
        claims.append(Claim(**{**row, "supported": supported, "refuted": refuted, "gates": tuple(row["gates"])}))
    ids = [claim.id for claim in claims]
    if len(set(ids)) != len(ids):
        raise UserError(f"{path}: a claim id stands twice.")
    return tuple(claims)


def _bound(table: Any, where: str) -> Bound:
    if not isinstance(table, dict) or len(table) != 1 or next(iter(table)) not in ("above", "below"):
        raise UserError(f"{where}: expected {{ above = X }} or {{ below = X }}, got {table}.")
    direction, value = next(iter(table.items()))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: {direction} = {value!r} is not a number.")
    return Bound("above" if direction == "above" else "below", float(value))


def judge(claim: Claim, estimates: Mapping[str, Mapping[str, Any]], gates: Iterable[Gate]) -> Judgement:
    """The verdict of one claim. Raises UserError when it names a gate that nobody evaluated; an estimate that the
    profile's arms do not give is `not run`."""
    if claim.estimate not in estimates:
        return Judgement(claim, "not run", f"this profile gives no {claim.estimate}")
    found = estimates[claim.estimate]
    value, low, high = found["value"], found["low"], found["high"]
    by_id = {gate.id: gate for gate in gates}
    missing = [name for name in claim.gates if name not in by_id]
    if missing:
        raise UserError(
            f"claim {claim.id} names the gate {', '.join(missing)}, which the experiment does not evaluate."
        )
    failed = [by_id[name] for name in claim.gates if not by_id[name].passed]
    made = _of_interval(claim, value, low, high)
    if not failed:
        return made
    why = "; ".join(f"gate {g.id} failed: {_number(g.value)}, not {g.direction} {g.threshold:g}" for g in failed)
    if made.verdict == "uninterpretable":
        return Judgement(claim, made.verdict, f"{why}; {made.why}", value, low, high)
    why += f"; its interval alone would be {made.verdict}"
    return Judgement(claim, "uninterpretable", why, value, low, high, made.verdict)


def _of_interval(claim: Claim, value: float | None, low: float | None, high: float | None) -> Judgement:
    """The verdict that an interval gives a claim whose gates all passed."""
    if value is None or low is None or high is None:
        return Judgement(claim, "uninterpretable", "nothing could be scored", value, low, high)
    if not all(math.isfinite(number) for number in (value, low, high)):
        return Judgement(claim, "uninterpretable", "the estimate is not a number", None, None, None)
    interval = f"{_number(value)} [{_number(low)}, {_number(high)}]"
    if claim.supported.holds(low, high):
        verdict: Verdict = "supported"
        why = f"{interval} lies {claim.supported.direction} {claim.supported.value:g}"
    elif claim.refuted.holds(low, high):
        verdict, why = "refuted", f"{interval} lies {claim.refuted.direction} {claim.refuted.value:g}"
    else:
        verdict, why = "inconclusive", f"{interval} does not settle it"
    return Judgement(claim, verdict, why, value, low, high)


def _number(value: float | None) -> str:
    """Two decimals, more where these would round a small number away."""
    if value is None:
        return "missing"
    return f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:.2f}"


def table(judgements: Iterable[Judgement]) -> str:
    """Verdicts as aligned text for a terminal."""
    rows = [(j.claim.id, j.verdict, j.why, j.claim.statement) for j in judgements]
    if not rows:
        return "no claims"
    width = max(len(row[0]) for row in rows)
    lines = []
    for identity, verdict, why, statement in rows:
        lines.append(f"{identity:<{width}}  {verdict:<15}  {why}")
        lines.append(f"{'':<{width}}  {'':<15}  {statement}")
    return "\n".join(lines)
