"""What an experiment hands to the paper: figures, tables, values, gates and verdicts, all in generated files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from persona_coupling import claims, figures, outputs, paths, tables
from persona_coupling.claims import Gate, Judgement
from persona_coupling.measures import Estimates
from persona_coupling.study import Results, Study


class Report:
    """Collects an experiment's outputs; `finish` writes `paper/generated/<profile>/<experiment>.json`."""

    def __init__(self, experiment: str, study: Study, results: Results) -> None:
        self.experiment = experiment
        self.profile = study.profile
        self.results = results
        self.figures: dict[str, dict[str, str]] = {}
        self.tables: dict[str, dict[str, str]] = {}

    def figure(self, name: str, drawn: tuple[Figure, pd.DataFrame], caption: str) -> Path:
        """Save a figure with its data under `figures/<profile>/`. Returns the PNG's path, to be shown."""
        figure, data = drawn
        folder = paths.figures(self.profile.name)
        full = f"{self.experiment}-{name}"
        path = figures.save(figure, folder, full, data, self.profile.stamp)
        self.figures[name] = {"path": "/" + str(path.relative_to(paths.repository())), "caption": caption}
        return path.with_suffix(".png")

    def table(self, name: str, table: pd.DataFrame, caption: str) -> pd.DataFrame:
        """Save a table; returned as it is, to be shown."""
        full = f"{self.experiment}-{name}"
        tables.save(table, paths.generated(self.profile.name), full)
        self.tables[name] = {"path": f"{full}.json", "caption": caption}
        return table

    def values(self, name: str, content: dict[str, Any]) -> None:
        """Save values that stand for the whole profile, not for this experiment alone, as `<name>.json`."""
        outputs.write_json(paths.generated(self.profile.name) / f"{name}.json", content, sort_keys=True)

    def finish(self, estimates: Estimates, gates: Sequence[Gate], facts: dict[str, Any]) -> list[Judgement]:
        """Judge the experiment's claims and write everything that the paper reads of it. `facts` are further values
        for the prose (counts, hyper-parameters as run)."""
        own = [claim for claim in claims.read() if claim.experiment == self.experiment]
        judgements = [claims.judge(claim, estimates.as_dict(), gates) for claim in own]
        record = self.results.record
        content = {
            "experiment": self.experiment,
            "profile": record["profile"],
            "estimates": estimates.as_dict(),
            "gates": [gate.as_dict() for gate in gates],
            "claims": [judgement.as_dict() for judgement in judgements],
            "figures": self.figures,
            "tables": self.tables,
            "facts": facts,
            "values": record.get("values", {}),
            "provenance": record["provenance"],
            "parts": record.get("parts", []),
            "stages": record.get("stages", {}),
            "compute_minutes": record["compute_minutes"],
            **({"card": record["card"]} if "card" in record else {}),
        }
        self.values(self.experiment, content)
        return judgements


def verdict_table(judgements: Sequence[Judgement]) -> pd.DataFrame:
    """Verdicts to show in a notebook."""
    return pd.DataFrame(
        [{"claim": j.claim.id, "statement": j.claim.statement, "verdict": j.verdict, "why": j.why} for j in judgements]
    )


def gate_table(gates: Sequence[Gate]) -> pd.DataFrame:
    """Gates to show in a notebook."""
    return pd.DataFrame(
        [
            {
                "gate": g.id,
                "asks": g.statement,
                "value": None if g.value is None else round(g.value, 3),
                "threshold": f"{g.direction} {g.threshold:g}",
                "passed": g.passed,
            }
            for g in gates
        ]
    )
