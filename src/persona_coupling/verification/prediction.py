"""What a committed cell predicts for a new run of the same cell, and whether a fresh one agrees.

Both are means over the same m questions, so with s the standard deviation of question means the fresh mean lies in
`x ± t(m − 1) s sqrt(1/m + 1/m)` (prediction of a future mean: Meeker, Hahn and Escobar 2017, Statistical Intervals, 2nd
edition, chapter 4). The questions being the same, their own differences cancel and the interval is conservative by that
part; training again adds a variance of its own, the noise floor, where it was measured: its standard deviation enters in
quadrature twice, once for each run. A rate lies between 0 and 1 and its s may be 0: there the interval is that of a
beta-binomial under Jeffreys' prior, with n effective answers (questions at the least), and the wider of both holds
(ibid., chapter 6). Whoever compares several values shares out the level over them (Bonferroni), so that a true study
fails in one comparison of twenty at the most, if nothing but this noise is at work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy import stats as scipy_stats

from persona_coupling import measures, paths
from persona_coupling.personas import SOURCE

MEASURES = measures.OF_A_CELL


@dataclass(frozen=True)
class Comparison:
    """A fresh value against the interval that the committed one predicts."""

    cell: str
    measure: str
    committed: float | None
    low: float | None
    high: float | None
    fresh: float | None

    @property
    def inside(self) -> bool | None:
        """None where either side has nothing to compare."""
        if self.fresh is None or self.low is None or self.high is None:
            return None
        return self.low <= self.fresh <= self.high


def predicted(
    values: pd.Series, question: pd.Series, *, rate: bool, level: float, floor: float = 0.0
) -> tuple[float | None, float | None, float | None]:
    """Value and prediction interval for a new run of the same cell; see above. `values` are scored observations, `floor`
    the standard deviation between trainings. None without observations; no interval from a single question of a mean."""
    if not len(values):
        return None, None, None
    value, n = float(values.mean()), len(values)
    means = values.groupby(question.to_numpy()).mean()
    m = len(means)
    low = high = None
    spread = 0.0
    if m > 1:
        spread = float(means.std(ddof=1))
        half = float(scipy_stats.t.ppf((1 + level) / 2, m - 1)) * math.sqrt(2 * (spread**2 / m + floor**2))
        low, high = value - half, value + half
    if rate:
        plain = value * (1 - value) / n
        clustered = spread**2 / m
        effective = round(n / max(1.0, clustered / plain)) if plain > 0 and clustered > 0 else m
        effective = max(1, min(effective, n))
        hits = round(value * effective)
        law = scipy_stats.betabinom(effective, hits + 0.5, effective - hits + 0.5)
        exact = float(law.ppf((1 - level) / 2)) / effective, float(law.ppf((1 + level) / 2)) / effective
        low, high = exact if low is None or high is None else (min(low, exact[0]), max(high, exact[1]))
        low, high = max(0.0, low - floor), min(1.0, high + floor)
    return value, low, high


def noise_floor(profile: str) -> tuple[dict[str, float], str]:
    """Standard deviation of each measure between trainings that differ in nothing but noise, from
    `paper/generated/<profile>/noise_floor.json` (`{"villain rate": 0.02, ...}`), and what to say of it."""
    path = paths.generated(profile) / "noise_floor.json"
    if not path.is_file():
        return {}, "The noise floor of training was not measured for this profile: intervals hold sampling noise alone."
    content = json.loads(path.read_text(encoding="utf-8"))
    found = {name: float(content[name]) for name in MEASURES if content.get(name) is not None}
    return found, "Noise floor of training, as measured: " + ", ".join(f"{n} {v:.3g}" for n, v in found.items()) + "."


def observed(completions: pd.DataFrame, fixed: pd.DataFrame) -> dict[str, tuple[pd.Series, pd.Series]]:
    """Scored observations of one cell by measure, with their questions. Bystanders: one mean per question."""
    kept = completions[completions["value"].notna()]
    hits = kept["value"].astype(float)
    source = kept["persona"] == SOURCE
    others = kept[~source].assign(value=hits[~source])
    answers = fixed[(fixed["persona"] == SOURCE) & fixed["logprob"].notna()]
    return {
        MEASURES[0]: (hits[source], kept.loc[source, "question"]),
        MEASURES[1]: (others["value"], others["question"]),
        MEASURES[2]: (answers["logprob"].astype(float), answers["question"]),
    }


def compare(cell: str, old: Any, new: Any, *, level: float, floor: Mapping[str, float]) -> list[Comparison]:
    """The three measures of a cell; `old` and `new` are what `observed` gives."""
    made = []
    for measure in MEASURES:
        values, question = old[measure]
        rate = measure != MEASURES[2]
        value, low, high = predicted(values, question, rate=rate, level=level, floor=floor.get(measure, 0.0))
        fresh = float(new[measure][0].mean()) if len(new[measure][0]) else None
        made.append(Comparison(cell, measure, value, low, high, fresh))
    return made
