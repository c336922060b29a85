"""What each part of a model's depth costs the marker: a 2 x 2 x 2 factorial over thirds, and a scan over layers.

A third's effect is what merging it alone changes. If thirds acted independently, the effect of all three would be the sum
of the three; the difference is their interaction, and Shapley values share the whole out without favouring either order
of merging (Shapley 1953, "A value for n-person games", Contributions to the Theory of Games II:307-317).

On which scale? A log-probability cannot rise above zero and a rate ends at both sides, so that equal pushes look unequal
near an end. Log-odds have no end; additivity is judged there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from persona_coupling import measures, stats, tables
from persona_coupling.adapters import THIRDS
from persona_coupling.arms import RAW
from persona_coupling.claims import Gate
from persona_coupling.measures import NATS, Estimates
from persona_coupling.personas import SOURCE
from persona_coupling.stats import Estimate
from persona_coupling.study import Results

Subset = tuple[str, ...]
Coefficients = dict[Subset, float]

SUBSETS: tuple[Subset, ...] = tuple(s for size in range(len(THIRDS) + 1) for s in combinations(THIRDS, size))
NONE, ALL = SUBSETS[0], SUBSETS[-1]
SINGLE, PAIR = SUBSETS[1:4], SUBSETS[4:7]
TAILS = [(1 - stats.CONFIDENCE) / 2, (1 + stats.CONFIDENCE) / 2]
ROUNDING = 1e-12  # a difference of means below it is zero
LEAST_DOUBT = 1e-6  # log-odds are cut where the model is surer than this; cutting earlier would bring a ceiling back


def name(subset: Subset) -> str:
    """`early`, `early_mid`, ..., `all`, `none`."""
    return {NONE: "none", ALL: "all"}.get(subset, "_".join(subset))


def named(text: str) -> Subset:
    """The subset of that name. Raises ValueError for another."""
    for subset in SUBSETS:
        if name(subset) == text:
            return subset
    raise ValueError(f"{text!r} is no set of thirds; known: {', '.join(map(name, SUBSETS))}")


def condition(arm: str, subset: Subset, how: str = "prebaked") -> str:
    """The condition in which an arm's SFT is merged into a subset; with nothing merged it is the raw model's."""
    return f"{RAW}.{how}" if subset == NONE else f"{arm}.{name(subset)}.{how}"


# ----------------------------------------------------------------------------------------------- coefficients


def effect(subset: Subset) -> Coefficients:
    """What merging a subset changes."""
    return {subset: 1.0, NONE: -1.0}


def parts(subset: Subset = ALL) -> Coefficients:
    """The sum of what each third of a subset does alone."""
    return {**{(third,): 1.0 for third in subset}, NONE: -float(len(subset))}


def interaction() -> Coefficients:
    """What all do together beyond the sum of what each does alone."""
    return _added(effect(ALL), {s: -c for s, c in parts().items()})


def predicted(subset: Subset) -> Coefficients:
    """The level that a subset would have if its thirds acted independently."""
    return _added({NONE: 1.0}, parts(subset))


def shapley(third: str) -> Coefficients:
    """A third's effect when it is added to those before it, averaged over all orders of adding the three."""
    total: Coefficients = {}
    orders = list(permutations(THIRDS))
    for order in orders:
        before = tuple(t for t in THIRDS if t in order[: order.index(third)])
        after = tuple(t for t in THIRDS if t in (*before, third))
        total = _added(total, {after: 1 / len(orders), before: -1 / len(orders)})
    return total


def _row(coefficients: Coefficients) -> Float[ndarray, " subsets"]:
    return np.array([coefficients.get(subset, 0.0) for subset in SUBSETS])


def _added(one: Mapping[Subset, float], other: Mapping[Subset, float]) -> Coefficients:
    both = {s: one.get(s, 0.0) + other.get(s, 0.0) for s in SUBSETS}
    return {s: c for s, c in both.items() if abs(c) > ROUNDING}


# -------------------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True)
class Scale:
    """On what an effect is measured: a table and column, of the source alone or of source minus bystanders."""

    measure: str
    table: str
    column: str
    unit: str
    contrast: bool = False


SCALES = (
    Scale("source_rate", "completions", "value", "difference of proportions"),
    Scale("fixed_logprob_source", "fixed", "logprob", NATS),
    Scale("fixed_logprob_contrast", "fixed", "logprob", NATS, contrast=True),
    Scale("fixed_logodds_source", "fixed", "logodds", "nats of log-odds"),
)
LOGODDS = SCALES[-1]


def log_odds(logprob: Float[ndarray, " observations"]) -> Float[ndarray, " observations"]:
    """log(p / (1 - p)) of probabilities given by their logarithms (nats); p is cut at 1 - LEAST_DOUBT."""
    cut = np.minimum(logprob, np.log1p(-LEAST_DOUBT))
    return np.asarray(cut - np.log(-np.expm1(cut)))


def with_log_odds(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column `logodds` of its `logprob`."""
    return table.assign(logodds=log_odds(table["logprob"].to_numpy(dtype=float)))


def observations(results: Results, scale: Scale) -> pd.DataFrame:
    """The rows that a scale is read from, missing values included, with a column `group` naming the condition."""
    table = results[scale.table]
    return (with_log_odds(table) if scale.column == "logodds" else table).assign(group=table["condition"])


def add_factorial(made: Estimates, results: Results, arm: str, scales: Sequence[Scale] = SCALES) -> None:
    """Add, on every scale, for an arm under the pre-baked adapter: each subset's effect and level predicted from its
    thirds, and under `ARM.thirds.prebaked` their sum, interaction, Shapley values, shares, and the sum over the whole.
    """
    for scale in scales:
        table = observations(results, scale)
        by_subset = {s: table[table["condition"] == condition(arm, s)] for s in SUBSETS}

        def add(
            estimate: str,
            coefficients: Coefficients,
            scale: Scale = scale,
            rows: dict[Subset, pd.DataFrame] = by_subset,
        ) -> None:
            chosen: list[tuple[float, pd.DataFrame]] = []
            for subset, coefficient in coefficients.items():
                source = rows[subset]["persona"] == SOURCE
                chosen.append((coefficient, rows[subset][source]))
                if scale.contrast:
                    chosen.append((-coefficient, rows[subset][~source]))
            measures.add_combination(made, estimate, chosen, scale.column, scale.unit)

        whole = f"{arm}.thirds.prebaked.{scale.measure}"
        for subset in SUBSETS[1:]:
            add(f"{condition(arm, subset)}.{scale.measure}_effect", effect(subset))
        for subset in (*PAIR, ALL):
            add(f"{condition(arm, subset)}.{scale.measure}_predicted", predicted(subset))
        add(f"{whole}_sum", parts())
        add(f"{whole}_interaction", interaction())
        for third in THIRDS:
            add(f"{whole}_shapley_{third}", shapley(third))
        means = JointMeans(table, [condition(arm, s) for s in SUBSETS], scale, f"{scale.measure}_share")
        for share, over in {"additive": parts(), **{f"share_{t}": shapley(t) for t in THIRDS}}.items():
            made.named[f"{whole}_{share}"] = means.share(_row(over), _row(effect(ALL)))


def add_levels(made: Estimates, results: Results, conditions: Sequence[str]) -> None:
    """Add the mean log-odds of the marker behind fixed answers, as the source and as its bystanders, per condition."""
    table = observations(results, LOGODDS)
    for one in conditions:
        rows = table[table["condition"] == one]
        source = rows["persona"] == SOURCE
        for who, part in (("source", rows[source]), ("bystander", rows[~source])):
            measures.add_mean(made, f"{one}.fixed_logodds_{who}", part, "logodds", LOGODDS.unit)


def add_extreme(made: Estimates, results: Results, name: str, measure: str, conditions: Sequence[str]) -> None:
    """Add `name`: the lowest or highest of some conditions' sampled `contrast` or `source_rate`, by the ending of the
    name (`_lowest`, `_highest`).

    Questions and seeds are resampled jointly and the extreme is taken in every resample; the interval is widened to the
    extreme condition's own, so that a rate at 0 or 1 keeps its exact bound. An extreme of noisy numbers lies too far
    out on average: a claim that it stays inside is tested the harder for it.
    """
    pick = {"lowest": min, "highest": max}[name.rsplit("_", 1)[1]]
    everyone = {c: made[f"{c}.{measure}"] for c in conditions}
    n, unscored = sum(e.n for e in everyone.values()), sum(e.unscored for e in everyone.values())
    known = {c: e.value for c, e in everyone.items() if e.value is not None}
    if len(known) < len(everyone):  # an extreme of what could be scored would not be that of all
        made.named[name] = Estimate(None, None, None, n, 0, 0, unscored)
        return
    scale = Scale(measure, "completions", "value", "", contrast=measure == "contrast")
    means = JointMeans(observations(results, scale), list(conditions), scale, name)
    low, high = np.quantile(means.draws.min(axis=1) if pick is min else means.draws.max(axis=1), TAILS)
    own = everyone[pick(known, key=lambda c: known[c])]
    assert own.low is not None
    assert own.high is not None
    made.named[name] = Estimate(
        own.value,
        min(float(low), own.low),
        max(float(high), own.high),
        n,
        own.clusters,
        own.seeds,
        unscored,
        own.unit,
    )


class JointMeans:
    """Means of groups of rows (columns group, persona, seed, question and the scale's) and their joint bootstrap: seeds x
    questions are resampled once for all groups, so that any function of the means has an interval."""

    def __init__(self, table: pd.DataFrame, groups: Sequence[str], scale: Scale, name: str) -> None:
        rows = table[table["group"].isin(groups) & table[scale.column].notna()]
        rows = rows if scale.contrast else rows[rows["persona"] == SOURCE]
        keys = rows[["seed", "question"]].drop_duplicates().sort_values(["seed", "question"], ignore_index=True)
        self.n, self.clusters, self.seeds = len(rows), len(keys), int(keys["seed"].nunique())
        cells = [self._cells(rows[rows["group"] == group], scale, pd.MultiIndex.from_frame(keys)) for group in groups]
        self.complete = all(counts.any() for cell in cells for _, _, counts in cell)
        self.means: Float[ndarray, " groups"] = np.zeros(0)
        self.draws: Float[ndarray, "resamples groups"] = np.zeros((0, 0))
        if not self.complete:
            return
        rng = measures.generator(name)
        weights = stats.bootstrap_weights(keys["seed"].to_numpy(), keys["question"].to_numpy(), rng=rng)
        self.means = np.array([sum(s * sums.sum() / counts.sum() for s, sums, counts in cell) for cell in cells])
        with np.errstate(invalid="ignore"):  # a resample without any row of a group says nothing, and is dropped
            columns = [sum(s * (weights @ sums) / (weights @ counts) for s, sums, counts in cell) for cell in cells]
        stacked = np.stack([np.asarray(column) for column in columns], axis=1)
        self.draws = stacked[np.isfinite(stacked).all(axis=1)]

    @staticmethod
    def _cells(part: pd.DataFrame, scale: Scale, index: pd.MultiIndex) -> list[tuple[float, ndarray, ndarray]]:
        """Sign, sums and counts per seed and question: of the source, or of the source and, subtracted, the others."""
        source = part["persona"] == SOURCE
        made = []
        for sign, rows in ((1.0, part[source]), (-1.0, part[~source])) if scale.contrast else ((1.0, part),):
            cells = rows[scale.column].astype(float).groupby([rows["seed"], rows["question"]])
            sums, counts = (
                found.reindex(index, fill_value=0.0).to_numpy(dtype=float) for found in (cells.sum(), cells.count())
            )
            made.append((sign, sums, counts))
        return made

    def estimate(self, value: float, draws: Float[ndarray, " resamples"], unit: str) -> Estimate:
        """An estimate from a function of the means and the same function of the resamples."""
        low, high = np.quantile(draws, TAILS)
        return Estimate(value, float(low), float(high), self.n, self.clusters, self.seeds, unit=unit)

    def nothing(self, unit: str) -> Estimate:
        """An estimate that there is not."""
        return Estimate(None, None, None, self.n, self.clusters, self.seeds, unit=unit)

    def share(self, top: Float[ndarray, " groups"], bottom: Float[ndarray, " groups"]) -> Estimate:
        """A combination of the means over another; none where the other is not told from zero, since a share of nothing
        means nothing. A resample in which the other is zero has no share, and counts as beyond both ends."""
        if not self.complete or not self.tells(bottom):
            return self.nothing("proportion")
        bottoms = self.draws @ bottom
        none = np.abs(bottoms) < ROUNDING
        shares = (self.draws @ top) / np.where(none, 1.0, bottoms)
        low = float(np.quantile(np.where(none, -np.inf, shares), TAILS[0]))
        high = float(np.quantile(np.where(none, np.inf, shares), TAILS[1]))
        if not np.isfinite([low, high]).all():
            return self.nothing("proportion")
        value = float((self.means @ top) / (self.means @ bottom))
        return Estimate(value, low, high, self.n, self.clusters, self.seeds, unit="proportion")

    def tells(self, coefficients: Float[ndarray, " groups"]) -> bool:
        """Whether a combination's interval excludes zero."""
        low, high = np.quantile(self.draws @ coefficients, TAILS)
        return bool(low > 0.0 or high < 0.0)


def add_norm_shares(made: Estimates, results: Results, arm: str) -> None:
    """Add `ARM.THIRD.prebaked.norm_share`: a third's share of the squared Frobenius norm of the SFT's change, mean over
    seeds. It is a property of the weights: no interval."""
    squares = {}
    for third in THIRDS:
        rows = results.merges[results.merges["condition"] == condition(arm, (third,))].sort_values("seed")
        squares[third] = np.array([norms[0] ** 2 for norms in rows["norms"]])
    total = np.sum(list(squares.values()), axis=0)
    for third, square in squares.items():
        share = float((square / total).mean())
        made.named[f"{condition(arm, (third,))}.norm_share"] = Estimate(
            share, None, None, len(square), 0, len(square), unit="proportion"
        )


def disabled(made: Estimates, arm: str, at_least: float) -> Gate:
    """Is there anything to locate: what the whole delta costs the marker as the source, nats."""
    value = made[f"{condition(arm, ALL)}.fixed_logprob_source_effect"].value
    return Gate(
        f"disabled.{arm}.thirds.prebaked",
        "all three thirds together lower the marker's log-probability as the villain, nats",
        None if value is None else -value,
        "at least",
        at_least,
    )


def summary(made: Estimates, arm: str, title: str, failed: set[str]) -> pd.DataFrame:
    """The factorial as text: one row per third and for sum, whole, interaction and shares; one column per scale."""
    whole = f"{arm}.thirds.prebaked"
    rows: list[tuple[str, str, str]] = [
        *((f"{third} third alone", condition(arm, (third,)), "effect") for third in THIRDS),
        ("sum of the three", whole, "sum"),
        ("all together", condition(arm, ALL), "effect"),
        ("interaction", whole, "interaction"),
        ("sum over whole", whole, "additive"),
        *((f"share of the {third} third", whole, f"share_{third}") for third in THIRDS),
    ]
    headings = {
        "source_rate": "villain, points",
        "fixed_logprob_source": "log-prob., nats",
        "fixed_logprob_contrast": "log-prob. contrast, nats",
        "fixed_logodds_source": "log-odds, nats",
    }
    table = []
    for number, (label, where, what) in enumerate(rows):
        row = {"SFT": "" if number else title, "quantity": label + (" †" if where in failed else "")}
        for scale in SCALES:
            form = "points" if scale.table == "completions" else "nats"
            form = "percent" if what == "additive" or what.startswith("share") else form
            row[headings[scale.measure]] = tables.cell(made[f"{where}.{scale.measure}_{what}"], form)
        table.append(row)
    return pd.DataFrame(table)
