"""Dose and effect: what an SFT's steps, its delta norm and its KL from the raw model do to a coupling. No model code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from persona_coupling import measures
from persona_coupling.measures import Estimates
from persona_coupling.personas import SOURCE
from persona_coupling.study import Results


def table(results: Results, estimates: Estimates, conditions: Mapping[str, str], measure: str) -> pd.DataFrame:
    """One row per condition of a dose curve: arm, steps, norm of the SFT's delta, KL from the raw model, and a measure
    with its interval. `conditions` maps an evaluated condition to the model whose drift was measured ("" for the raw
    model: nothing trained, norm and KL zero)."""
    factors = results.factors().set_index("condition")
    norms = results.merges.groupby("condition")["norms"].apply(lambda column: float(np.mean([n[0] for n in column])))
    drift = results["drift"]
    kl = drift[drift["text"] == "heldout"].groupby("condition")["kl"].mean()
    rows = []
    for condition, model in conditions.items():
        found = estimates[f"{condition}.{measure}"]
        rows.append(
            {
                "condition": condition,
                "arm": factors.loc[condition, "arm"],
                "steps": int(factors.loc[condition, "steps"]),
                "norm": float(norms[condition]) if model else 0.0,
                "kl": float(kl[model]) if model else 0.0,
                "measure": measure,
                "value": found.value,
                "low": found.low,
                "high": found.high,
            }
        )
    return pd.DataFrame(rows)


def interpolation(places: Float[ndarray, " points"], at: float) -> Float[ndarray, " points"]:
    """Weights, at most two of them not zero and adding up to one, that interpolate linearly between `places` (ascending)
    at a point within them. Raises ValueError for a point outside: a dose that was not reached is not extrapolated."""
    if len(places) < 2 or (np.diff(places) <= 0).any():
        raise ValueError(f"doses must ascend: {places.tolist()}")
    if not places[0] <= at <= places[-1]:
        raise ValueError(f"{at:.4g} lies outside the doses {places[0]:.4g} to {places[-1]:.4g}")
    right = max(1, int(np.searchsorted(places, at)))
    share = (at - places[right - 1]) / (places[right] - places[right - 1])
    weights = np.zeros(len(places))
    weights[right - 1], weights[right] = 1 - share, share
    return weights


def add_at_equal_kl(made: Estimates, results: Results, name: str, curves: tuple[pd.DataFrame, pd.DataFrame]) -> float:
    """Add `name`: the log-probability contrast (villain minus others) on the first curve minus that on the second, both
    read off at the largest KL that both reach. Returns that KL, nats per token.

    A curve is what `table` gives for one arm, the raw model's row first. KL is taken as measured: the interval is that of
    the contrasts, seeds and questions resampled jointly. Raises ValueError where a curve's KL does not ascend.
    """
    curves = (curves[0].sort_values("kl"), curves[1].sort_values("kl"))
    at = min(float(curve["kl"].max()) for curve in curves)
    parts: list[tuple[float, pd.DataFrame]] = []
    for sign, curve in zip((1.0, -1.0), curves, strict=True):
        weights = interpolation(curve["kl"].to_numpy(dtype=float), at)
        for condition, weight in zip(curve["condition"], weights, strict=True):
            if weight:
                parts += contrast_parts(results.fixed, str(condition), sign * float(weight))
    measures.add_combination(made, name, parts, "logprob", measures.NATS)
    return at


def contrast_parts(fixed: pd.DataFrame, condition: str, weight: float = 1.0) -> Sequence[tuple[float, pd.DataFrame]]:
    """A condition's log-probability contrast as parts of a linear combination: villain minus the mean of the others."""
    rows = fixed[fixed["condition"] == condition]
    source = rows["persona"] == SOURCE
    return [(weight, rows[source]), (-weight, rows[~source])]
