"""Tables as the paper prints them: text cells made from estimates, kept as CSV and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from persona_coupling import outputs
from persona_coupling.measures import Estimates
from persona_coupling.stats import Estimate


@dataclass(frozen=True)
class Column:
    """A column: a heading, a measure, and how to print it ("percent", "points", "number" or "nats")."""

    heading: str
    measure: str
    form: str


def cell(estimate: Estimate, form: str) -> str:
    """An estimate as text with its interval: `94 % [82, 99]`. A missing value is a dash, never a zero."""
    if estimate.value is None:
        return "–"
    scale, digits, unit = {
        "percent": (100, 0, " %"),
        "points": (100, 0, ""),
        "number": (1, 0, ""),
        "nats": (1, 2, ""),
    }[form]

    def text(number: float) -> str:
        return f"{round(number * scale, digits) + 0.0:.{digits}f}".replace("-", "−")  # + 0.0: no negative zero

    value = f"{text(estimate.value)}{unit}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{text(estimate.low)}, {text(estimate.high)}]"


def by_condition(estimates: Estimates, labels: dict[str, str], columns: list[Column], failed: set[str]) -> pd.DataFrame:
    """One row per condition; conditions whose gates failed carry a dagger."""
    rows = []
    for condition, label in labels.items():
        row: dict[str, Any] = {"condition": label + (" †" if condition in failed else "")}
        for column in columns:
            row[column.heading] = cell(estimates[f"{condition}.{column.measure}"], column.form)
        rows.append(row)
    return pd.DataFrame(rows)


def save(table: pd.DataFrame, folder: Path, name: str) -> None:
    """Write `name`.csv for people and `name`.json for the paper."""
    outputs.write(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    content = {"columns": list(table.columns), "rows": table.astype(str).to_numpy().tolist()}
    outputs.write_json(folder / f"{name}.json", content)
