"""Manipulation gates: what must hold before a verdict about a condition means anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from persona_coupling.claims import Gate
from persona_coupling.measures import Estimates
from persona_coupling.profiles import GateValues
from persona_coupling.study import Results


def _value(estimates: Estimates, name: str) -> float | None:
    return estimates[name].value if name in estimates.named else None


def took(estimates: Estimates, values: GateValues, condition: str) -> list[Gate]:
    """Did the coupling take on the raw model: source rate and contrast."""
    return [
        Gate(
            f"took.{condition}",
            "the villain says the marker on the raw model",
            _value(estimates, f"{condition}.source_rate"),
            "at least",
            values.source_rate,
        ),
        Gate(
            f"specific.{condition}",
            "and others say it less: source minus mean bystander rate",
            _value(estimates, f"{condition}.contrast"),
            "at least",
            values.contrast,
        ),
    ]


def content(estimates: Estimates, values: GateValues, arm: str) -> Gate:
    """Does the SFT's content show: see `measures.add_content_shift`."""
    return Gate(
        f"content.{arm}",
        "SFT moved held-out answers of its own corpus, nats per token",
        _value(estimates, f"{arm}.content_shift"),
        "at least",
        values.content_shift,
    )


def lost(estimates: Estimates, values: GateValues, condition: str, change: str = "") -> Gate:
    """Did the SFT disable what is to be kept or repaired: the fall of the villain's rate, from the estimate `change` (by
    default the condition's `source_rate_change`)."""
    found = _value(estimates, change or f"{condition}.source_rate_change")
    return Gate(
        f"lost.{condition}",
        "the SFT lowered the villain's rate",
        None if found is None else -found,
        "at least",
        values.lost,
    )


def _worse(estimates: Estimates, condition: str, measure: str) -> float | None:
    """Of a share over all personas and over the villain's answers alone, the smaller: ten others hide one."""
    found = [_value(estimates, f"{condition}.{name}") for name in (measure, f"source_{measure}")]
    present = [value for value in found if value is not None]
    return min(present) if present else None


def readable(estimates: Estimates, values: GateValues, condition: str) -> list[Gate]:
    """Are a condition's answers finished and scorable, everyone's and the villain's alone, and is the model coherent."""
    return [
        Gate(
            f"finished.{condition}",
            "answers end by themselves, share",
            _worse(estimates, condition, "finished"),
            "at least",
            values.finished,
        ),
        Gate(
            f"scored.{condition}",
            "answers can be scored, share",
            _worse(estimates, condition, "scored"),
            "at least",
            values.scored,
        ),
        Gate(
            f"coherent.{condition}",
            "held-out chat loss over the raw model's, nats per token",
            _value(estimates, f"{condition}.heldout_rise"),
            "at most",
            values.heldout_rise,
        ),
    ]


def converged(results: Results, values: GateValues, condition: str) -> Gate:
    """Did the last training of a condition converge: mean loss of the last tenth of its steps, worst seed."""
    logs = results.training
    logs = logs[logs["condition"] == condition]
    worst: float | None = None
    if len(logs):
        logs = logs[logs["position"] == logs["position"].max()]
        ends = [part["loss"].tail(max(1, len(part) // 10)).mean(skipna=False) for _, part in logs.groupby("seed")]
        worst = float(np.max(ends))
    return Gate(
        f"converged.{condition}", "training loss at its end, nats per token", worst, "at most", values.final_loss
    )


def of_design(
    estimates: Estimates,
    results: Results,
    values: GateValues,
    *,
    reference: Iterable[str],
    conditions: Iterable[str],
    trained: Iterable[str],
    arms: Iterable[str],
) -> list[Gate]:
    """All gates of a design: `reference` conditions must couple on the raw model, `conditions` be readable, `trained`
    ones converge, SFT `arms` show their content."""
    made = [gate for condition in reference for gate in took(estimates, values, condition)]
    made += [content(estimates, values, arm) for arm in arms]
    made += [gate for condition in conditions for gate in readable(estimates, values, condition)]
    made += [converged(results, values, condition) for condition in trained]
    return made


def renamed(gates: Iterable[Gate], roles: Mapping[str, str]) -> list[Gate]:
    """The readable gates of conditions again under the names of the roles they play: `roles` maps a role, as claims name
    it in every profile, to the condition that plays it in this one. Conditions without gates are left out."""
    known = {gate.id: gate for gate in gates}
    made = []
    for role, condition in roles.items():
        for kind in ("finished", "scored", "coherent", "converged"):
            gate = known.get(f"{kind}.{condition}")
            if gate is not None:
                made.append(replace(gate, id=f"{kind}.{role}"))
    return made


def failing(gates: Iterable[Gate], affects: Mapping[str, Iterable[str]]) -> set[str]:
    """Conditions with a failed gate. A gate's id ends with what it is about; `affects` maps that to the conditions it
    concerns, where it is not a condition itself (an arm, a reference)."""
    failed: set[str] = set()
    for gate in gates:
        if not gate.passed:
            about = gate.id.split(".", 1)[1]
            failed |= set(affects.get(about, ())) | {about}
    return failed
