"""Estimates and intervals that know what is independent and what is not.

The unit of analysis is the question under a seed: completions of one question share it and are not independent. Every seed
answers the same questions, so seeds and questions are crossed, and both are resampled.
Every function takes the cluster keys and raises without them; a missing value is an error, never a zero.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import stats as scipy_stats

CONFIDENCE = 0.95
RESAMPLES = 4000  # Monte Carlo error of a 2.5 % quantile: about 0.25 percentage points of coverage


@dataclass(frozen=True)
class Estimate:
    """A value with its interval and what it rests on. `value` is None when nothing could be scored."""

    value: float | None
    low: float | None
    high: float | None
    n: int  # scored observations
    clusters: int  # independent units: seed x question
    seeds: int
    unscored: int = 0
    unit: str = "proportion"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def clopper_pearson(hits: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Exact binomial interval (Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404)."""
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n} is no binomial outcome")
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(scipy_stats.beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(scipy_stats.beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high


def clopper_pearson_fraction(rate: float, n: int) -> tuple[float, float]:
    """The same interval at a rate strictly between 0 and 1 that need not be a whole number of hits: for clusters that
    all stand at one inner rate, where resampling clusters shows no spread."""
    hits = rate * n
    tail = (1 - CONFIDENCE) / 2
    return float(scipy_stats.beta.ppf(tail, hits, n - hits + 1)), float(
        scipy_stats.beta.ppf(1 - tail, hits + 1, n - hits)
    )


def _codes(keys: ndarray) -> Int[ndarray, " observations"]:
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _check(values: ndarray, seed: ndarray | None, question: ndarray | None) -> None:
    if seed is None or question is None:
        raise TypeError("both clustering keys, seed and question, are required")
    if not len(values) == len(seed) == len(question):
        raise ValueError(f"{len(values)} values, {len(seed)} seeds, {len(question)} questions")
    if np.isnan(values.astype(float)).any():
        raise ValueError("a missing value reached an estimate; count it as unscored instead")


@dataclass(frozen=True)
class Clusters:
    """Observations by cluster (seed x question), and how often each cluster stands in each bootstrap resample."""

    codes: Int[ndarray, " observations"]  # the cluster of each observation
    weights: Float[ndarray, "resamples clusters"]

    def totals(
        self, values: Float[ndarray, " members"], members: Bool[ndarray, " observations"]
    ) -> Float[ndarray, " resamples"]:
        """The sum of some observations' values in each resample: within a cluster they are drawn together, so that
        their sum is all that is needed."""
        return np.asarray(self.weights @ np.bincount(self.codes[members], values, minlength=self.weights.shape[1]))

    def counts(self, members: Bool[ndarray, " observations"]) -> Float[ndarray, " resamples"]:
        """How many of some observations stand in each resample."""
        return self.totals(np.ones(int(members.sum())), members)


def resampled(seed: ndarray, question: ndarray, *, rng: np.random.Generator, resamples: int = RESAMPLES) -> Clusters:
    """Multiplicities of a bootstrap of crossed clusters: seeds with replacement and, independently, questions with
    replacement; a seed's answers to a question stand as often as the product says (the pigeonhole bootstrap, Owen 2007,
    doi:10.1214/07-AOAS122; conservative for crossed effects, where resampling questions within seeds would take what the
    seeds share of a question for independent draws).

    With one seed only the questions are resampled: the interval then says nothing about seeds.
    """
    seeds, questions = _codes(seed), _codes(question)
    n_seeds, n_questions = int(seeds.max()) + 1, int(questions.max()) + 1
    pairs, first = np.unique(seeds * n_questions + questions, return_index=True)
    drawn_seeds, drawn_questions = _drawn(rng, n_seeds, n_questions, resamples)
    weights = (drawn_seeds[:, seeds[first]] * drawn_questions[:, questions[first]]).astype(float)
    return Clusters(np.searchsorted(pairs, seeds * n_questions + questions), weights)


def _drawn(rng: np.random.Generator, n_seeds: int, n_questions: int, resamples: int) -> tuple[ndarray, ndarray]:
    """Multiplicities of seeds and of questions, (resamples, seeds) and (resamples, questions), as `rng` draws them. One
    measure has one generator for all conditions, so most draws have been made before; `rng` advances all the same."""
    state = rng.bit_generator.state
    if state["bit_generator"] != "PCG64":
        return _multinomials(rng, n_seeds, n_questions, resamples)
    began = (state["state"]["state"], state["state"]["inc"], state["has_uint32"], state["uinteger"])
    *drawn, after = _pcg64(began, n_seeds, n_questions, resamples)
    rng.bit_generator.state = after
    return drawn[0], drawn[1]


@lru_cache(maxsize=64)
def _pcg64(
    began: tuple[int, int, int, int], n_seeds: int, n_questions: int, resamples: int
) -> tuple[ndarray, ndarray, Any]:
    rng = np.random.default_rng(0)
    state, increment, has, spare = began
    inner = {"state": state, "inc": increment}
    rng.bit_generator.state = {"bit_generator": "PCG64", "state": inner, "has_uint32": has, "uinteger": spare}
    drawn = _multinomials(rng, n_seeds, n_questions, resamples)
    for counts in drawn:
        counts.setflags(write=False)
    return *drawn, rng.bit_generator.state


def _multinomials(rng: np.random.Generator, n_seeds: int, n_questions: int, resamples: int) -> tuple[ndarray, ndarray]:
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples)
    return seeds, rng.multinomial(n_questions, np.full(n_questions, 1 / n_questions), size=resamples)


def bootstrap_weights(
    seed: ndarray, question: ndarray, *, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Float[ndarray, "resamples observations"]:
    """The multiplicity of every observation in every resample; see `resampled`."""
    clusters = resampled(seed, question, rng=rng, resamples=resamples)
    return np.asarray(clusters.weights[:, clusters.codes])


def _means(
    values: Float[ndarray, " observations"], seed: ndarray, question: ndarray, rng: np.random.Generator
) -> Float[ndarray, " resamples"]:
    clusters, everyone = resampled(seed, question, rng=rng), np.ones(len(values), dtype=bool)
    totals = clusters.counts(everyone)
    usable = totals > 0
    return np.asarray(clusters.totals(values, everyone)[usable] / totals[usable])


def _quantiles(draws: Float[ndarray, " resamples"]) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _counts(seed: ndarray, question: ndarray) -> tuple[int, int]:
    return len(set(zip(seed.tolist(), question.tolist(), strict=True))), len(set(seed.tolist()))


def proportion(
    hits: Bool[ndarray, " observations"],
    *,
    seed: ndarray | None,
    question: ndarray | None,
    rng: np.random.Generator,
    unscored: int = 0,
) -> Estimate:
    """A rate with a seeds x questions bootstrap interval; at 0/n and n/n, where every resample is equal, the exact
    Clopper-Pearson bound with n = clusters (completions of one question are not independent, so n completions
    would promise too much)."""
    _check(hits, seed, question)
    assert seed is not None
    assert question is not None
    if len(hits) == 0:
        return Estimate(None, None, None, 0, 0, 0, unscored)
    clusters, seeds = _counts(seed, question)
    value = float(hits.mean())
    if value in (0.0, 1.0):
        low, high = clopper_pearson(clusters if value else 0, clusters)
    else:
        low, high = _quantiles(_means(hits.astype(float), seed, question, rng))
        if high - low < 1e-12:
            low, high = clopper_pearson_fraction(value, clusters)
    return Estimate(value, low, high, len(hits), clusters, seeds, unscored)


def mean(
    values: Float[ndarray, " observations"],
    *,
    seed: ndarray | None,
    question: ndarray | None,
    rng: np.random.Generator,
    unit: str,
    unscored: int = 0,
) -> Estimate:
    """A mean of real values with a seeds x questions bootstrap interval."""
    _check(values, seed, question)
    assert seed is not None
    assert question is not None
    if len(values) == 0:
        return Estimate(None, None, None, 0, 0, 0, unscored, unit)
    clusters, seeds = _counts(seed, question)
    low, high = _quantiles(_means(values, seed, question, rng))
    return Estimate(float(values.mean()), low, high, len(values), clusters, seeds, unscored, unit)


def combination(
    values: Float[ndarray, " observations"],
    *,
    group: Int[ndarray, " observations"],
    coefficients: tuple[float, ...],
    seed: ndarray | None,
    question: ndarray | None,
    rng: np.random.Generator,
    unit: str = "difference of proportions",
    binary: bool = True,
    unscored: int = 0,
) -> Estimate:
    """A linear combination of group means: `coefficients[g]` times the mean of group g, summed.

    (-1, 1) is the difference of group 1 and group 0; (1, -1, -1, 1) a difference of differences. Seeds and questions
    are resampled jointly, so that what the groups share of a question cancels. For proportions, a group that stands at
    0 or 1 does not vary among the resamples, and the bootstrap alone would promise zero width there; its exact bound is
    added in quadrature (square-and-add, Newcombe 1998, Statistics in Medicine 17:873-890).
    """
    _check(values, seed, question)
    assert seed is not None
    assert question is not None
    members = [group == g for g in range(len(coefficients))]
    if not all(m.any() for m in members):
        return Estimate(None, None, None, 0, 0, 0, unscored, unit)
    clusters, seeds = _counts(seed, question)
    value = float(sum(c * values[m].mean() for c, m in zip(coefficients, members, strict=True)))
    resamples = resampled(seed, question, rng=rng)
    totals = [resamples.counts(m) for m in members]
    usable = np.all([total > 0 for total in totals], axis=0)
    draws = sum(
        c * resamples.totals(values[m], m)[usable] / total[usable]
        for c, m, total in zip(coefficients, members, totals, strict=True)
    )
    low, high = _quantiles(np.asarray(draws))
    if binary:
        down_squared, up_squared = (value - low) ** 2, (high - value) ** 2
        for c, m in zip(coefficients, members, strict=True):
            rate = float(values[m].mean())
            if rate not in (0.0, 1.0) or c == 0:
                continue
            n, _ = _counts(seed[m], question[m])
            exact_low, exact_high = clopper_pearson(n if rate else 0, n)
            down, up = abs(c) * (rate - exact_low), abs(c) * (exact_high - rate)
            down_squared += (down if c > 0 else up) ** 2
            up_squared += (up if c > 0 else down) ** 2
        if down_squared == up_squared == 0:  # the groups agree on every question: no resample differs
            bound = clopper_pearson(0, clusters)[1]
            down_squared = up_squared = bound**2
        lowest, highest = sum(min(c, 0.0) for c in coefficients), sum(max(c, 0.0) for c in coefficients)
        low, high = max(lowest, value - down_squared**0.5), min(highest, value + up_squared**0.5)
    return Estimate(value, low, high, int(sum(m.sum() for m in members)), clusters, seeds, unscored, unit)


def maximum(
    hits: Bool[ndarray, " observations"],
    *,
    group: ndarray,
    seed: ndarray | None,
    question: ndarray | None,
    rng: np.random.Generator,
    unscored: int = 0,
) -> Estimate:
    """The largest group rate, with a joint bootstrap interval whose upper end is at least the exact bound of that
    group. The maximum of noisy rates is biased upward: read it as "no group is above", not as an estimate."""
    _check(hits, seed, question)
    assert seed is not None
    assert question is not None
    if len(hits) == 0:
        return Estimate(None, None, None, 0, 0, 0, unscored)
    clusters, seeds = _counts(seed, question)
    names = sorted(set(group.tolist()))
    rates = {name: float(hits[group == name].mean()) for name in names}
    resamples = resampled(seed, question, rng=rng)
    draws = []
    for name in names:
        m = group == name
        total, hit = resamples.counts(m), resamples.totals(hits[m].astype(float), m)
        draws.append(np.divide(hit, total, out=np.zeros_like(total), where=total > 0))
    low, high = _quantiles(np.max(draws, axis=0))
    top = max(names, key=lambda name: rates[name])
    if rates[top] in (0.0, 1.0):
        n, _ = _counts(seed[group == top], question[group == top])
        exact = clopper_pearson(n if rates[top] else 0, n)
        low, high = min(low, exact[0]), max(high, exact[1])
    return Estimate(rates[top], low, high, len(hits), clusters, seeds, unscored)
