"""From a layer scan's rows to effects by layer, cumulative curves, and whether a few layers carry the whole.

Effects are changes of the marker's log-odds behind fixed answers, in nats, against the model without the SFT's delta: of
one step of layers merged alone (`only`), of the layers up to a depth (`from_bottom`), of those from a depth on
(`from_top`). Under `without`, the effect of a step is what the whole delta does beyond all other steps.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from persona_coupling import measures, stats
from persona_coupling.claims import Gate
from persona_coupling.layer_effects import LOGODDS, JointMeans, with_log_odds
from persona_coupling.measures import Estimates
from persona_coupling.personas import SOURCE
from persona_coupling.study import Results

CUMULATIVE = ("from_bottom", "from_top")


def _labelled(scan: pd.DataFrame, condition: str) -> pd.DataFrame:
    """One condition's rows with `logodds` and a `group` for each mode and step."""
    rows = with_log_odds(scan[scan["condition"] == condition])
    return rows.assign(group=[_group(*key) for key in zip(rows["mode"], rows["start"], rows["stop"], strict=True)])


def _group(mode: str, start: int, stop: int) -> str:
    return f"{mode}/{start}/{stop}"


def _ends(rows: pd.DataFrame) -> tuple[str, str]:
    """The groups with no layer and with all layers. Raises ValueError where no cumulative scan was made."""
    depth = int(rows["stop"].max())
    if (rows["mode"] == "from_bottom").any():
        return _group("from_bottom", 0, 0), _group("from_bottom", 0, depth)
    if (rows["mode"] == "from_top").any():
        return _group("from_top", depth, depth), _group("from_top", 0, depth)
    raise ValueError(
        "a scan needs a cumulative mode: only those measure the model without the change and with all of it"
    )


def _steps(rows: pd.DataFrame, mode: str) -> list[tuple[int, int]]:
    """The steps of a mode, from the bottom up."""
    part = rows.loc[rows["mode"] == mode, ["start", "stop"]].drop_duplicates()
    return sorted((int(start), int(stop)) for start, stop in part.itertuples(index=False))


def by_step(scan: pd.DataFrame, condition: str) -> pd.DataFrame:
    """One row per mode, step and `who` (source, bystander): the effect in log-odds with its interval, seeds and
    questions paired with the reference's."""
    rows = _labelled(scan, condition)
    none, everything = _ends(rows)
    made = []
    for who, part in (("source", rows[rows["persona"] == SOURCE]), ("bystander", rows[rows["persona"] != SOURCE])):
        for mode in dict.fromkeys(rows["mode"]):
            for start, stop in _steps(rows, mode):
                here = _group(mode, start, stop)
                first, second = (here, everything) if mode == "without" else (none, here)
                both = pd.concat([part[part["group"] == first], part[part["group"] == second]])
                found = stats.combination(
                    both["logodds"].to_numpy(dtype=float),
                    group=np.repeat([0, 1], len(both) // 2),
                    coefficients=(-1.0, 1.0),
                    seed=both["seed"].to_numpy(),
                    question=both["question"].to_numpy(),
                    rng=measures.generator("logodds_effect"),
                    unit=LOGODDS.unit,
                    binary=False,
                )
                where = {"condition": condition, "mode": mode, "start": start, "stop": stop, "who": who}
                made.append({**where, **found.as_dict()})
    return pd.DataFrame(made)


def add_scan(made: Estimates, results: Results, condition: str) -> tuple[int, int] | None:
    """Add, for one scan: `logodds_effect` of all layers, the `logodds_largest_share` of a step merged alone in it, the
    sum of all steps' over it (`logodds_additive`), and the share of the depth, from either end, within which the
    cumulative effect reaches half of it (`from_bottom_half`, `from_top_half`). Returns the step with the largest share.

    The largest of noisy shares lies too high on average: a claim that it stays low is tested the harder for it.
    """
    rows = _labelled(results["scan"], condition)
    none, everything = _ends(rows)
    groups = list(dict.fromkeys(rows["group"]))
    means = JointMeans(rows, groups, LOGODDS, "logodds_scan")

    def against_none(group: str) -> Float[ndarray, " groups"]:
        row = np.zeros(len(groups))
        row[groups.index(group)] += 1.0
        row[groups.index(none)] -= 1.0
        return row

    whole = against_none(everything)
    made.named[f"{condition}.logodds_effect"] = means.estimate(
        float(means.means @ whole), means.draws @ whole, LOGODDS.unit
    )
    told = means.tells(whole)
    largest: tuple[int, int] | None = None
    steps = _steps(rows, "only")
    if steps:
        singles = np.stack([against_none(_group("only", *step)) for step in steps], axis=1)
        made.named[f"{condition}.logodds_additive"] = means.share(singles.sum(axis=1), whole)
        name = f"{condition}.logodds_largest_share"
        made.named[name] = means.nothing("proportion")
        if told:
            shares = (means.means @ singles) / (means.means @ whole)
            drawn = (means.draws @ singles) / (means.draws @ whole)[:, None]
            made.named[name] = means.estimate(float(shares.max()), drawn.max(axis=1), "proportion")
            largest = steps[int(shares.argmax())]
    for mode in CUMULATIVE:
        path = _steps(rows, mode)[:: 1 if mode == "from_bottom" else -1]  # from no layer to all
        if not path:
            continue
        depth = max(stop for _, stop in path)
        at = np.array([stop - start for start, stop in path]) / depth
        curve = np.stack([against_none(_group(mode, *step)) for step in path], axis=1)
        name = f"{condition}.{mode}_half"
        made.named[name] = means.nothing("proportion")
        if told:
            value = half_way(at, (means.means @ curve) / (means.means @ whole))
            draws = np.array([half_way(at, d) for d in (means.draws @ curve) / (means.draws @ whole)[:, None]])
            made.named[name] = means.estimate(value, draws, "proportion")
    return largest


def half_way(at: Float[ndarray, " points"], reached: Float[ndarray, " points"]) -> float:
    """Where a curve that starts below a half and ends above first reaches a half, interpolated between its points."""
    after = int(np.argmax(reached >= 0.5))
    if after == 0:
        return float(at[0])
    before = after - 1
    weight = (0.5 - reached[before]) / (reached[after] - reached[before])
    return float(at[before] + weight * (at[after] - at[before]))


def agrees(results: Results, condition: str, none: str, everything: str, at_most: float) -> Gate:
    """Does the scan measure what evaluation does: its two ends against the evaluated models' own fixed answers, mean
    absolute difference over the questions and personas that both asked, the worse end."""
    rows = _labelled(results["scan"], condition)
    keys = ["seed", "persona", "question"]
    differences = []
    for group, model in zip(_ends(rows), (none, everything), strict=True):
        fixed = results.fixed[results.fixed["condition"] == model]
        both = rows[rows["group"] == group].merge(fixed, on=keys, suffixes=("", "_evaluated"), validate="one_to_one")
        differences.append((both["logprob"] - both["logprob_evaluated"]).abs().mean())  # NaN without a common row
    worst = float(np.max(differences))
    return Gate(
        f"agrees.{condition}",
        "the scan's ends against the evaluated models, mean absolute difference, nats",
        worst,
        "at most",
        at_most,
    )
