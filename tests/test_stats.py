"""Estimates and intervals against closed forms, scipy, enumeration and planted truths."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy import stats as scipy_stats

from persona_coupling import stats


def generator(seed=0):
    return np.random.default_rng(seed)


def grid(questions, samples, seeds=1):
    """Cluster keys of a full design: seeds x questions x samples."""
    seed = np.repeat(np.arange(seeds), questions * samples)
    question = np.tile(np.repeat(np.arange(questions), samples), seeds)
    return {"seed": seed, "question": question}


def exact_upper_of_none(n):
    """The exact two-sided 95 % bound for 0 of n solves (1 - p)^n = 0.025."""
    return 1 - 0.025 ** (1 / n)


def width(estimate):
    return estimate.high - estimate.low


# ------------------------------------------------------------------------------------------ Clopper-Pearson


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 28), (28, 28), (3, 28), (27, 28), (140, 280), (1, 5000)])
def test_clopper_pearson_agrees_with_scipy(hits, n):
    interval = scipy_stats.binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert stats.clopper_pearson(hits, n) == pytest.approx((interval.low, interval.high), abs=1e-7)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=60, deadline=None)
def test_clopper_pearson_is_the_inverted_binomial_test(case):
    """Definition: at each bound the outcome, or one further out, has a probability of 2.5 %."""
    hits, n = case
    low, high = stats.clopper_pearson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    if hits:
        assert scipy_stats.binom.sf(hits - 1, n, low) == pytest.approx(0.025, rel=1e-6)
    if hits < n:
        assert scipy_stats.binom.cdf(hits, n, high) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_clopper_pearson_refuses_impossible_counts(hits, n):
    with pytest.raises(ValueError, match="no binomial outcome"):
        stats.clopper_pearson(hits, n)


# ------------------------------------------------------------------------------------------------ bootstrap


def test_bootstrap_weights_follow_the_enumerated_crossed_distribution():
    """Two seeds that answer the same three questions: all draws of seeds and of questions listed by hand, moments of the
    weighted mean compared."""
    seed, question = np.repeat([0, 1], 3), np.tile(["a", "b", "c"], 2)
    values = np.array([0.0, 1.0, 3.0, 7.0, 2.0, 4.0])
    outcomes = [
        np.mean([values[3 * s + q] for s in seeds for q in questions])
        for seeds in itertools.product(range(2), repeat=2)
        for questions in itertools.product(range(3), repeat=3)
    ]
    weights = stats.bootstrap_weights(seed, question, rng=generator(), resamples=40_000)
    drawn_means = weights @ values / weights.sum(1)
    assert drawn_means.mean() == pytest.approx(np.mean(outcomes), abs=0.02)
    assert drawn_means.var() == pytest.approx(np.var(outcomes), rel=0.03)


def test_a_question_is_drawn_with_all_seeds_that_answer_it():
    """Where both seeds are drawn once, both answers to a question stand equally often."""
    weights = stats.bootstrap_weights(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), rng=generator(), resamples=500)
    both = weights[(weights[:, :2].sum(1) > 0) & (weights[:, 2:].sum(1) > 0)]
    assert len(both) > 100
    assert (both[:, :2] == both[:, 2:]).all()


def test_19_what_seeds_share_of_a_question_is_not_taken_for_independent_draws():
    """Coverage over 100 data sets of 3 seeds x 16 questions, a question's effect being the same under all seeds. The
    control, which takes each seed's answer for another question, must fall well short."""
    rng = generator(12)
    keys = grid(16, 1, seeds=3)
    apart = {"seed": np.zeros(48, dtype=int), "question": np.arange(48)}
    covered, naive = 0, 0
    for _ in range(100):
        values = np.tile(rng.normal(size=16), 3) + rng.normal(scale=0.3, size=48)
        crossed = stats.mean(values, **keys, rng=rng, unit="nats")
        nested = stats.mean(values, **apart, rng=rng, unit="nats")
        covered += crossed.low <= 0 <= crossed.high
        naive += nested.low <= 0 <= nested.high
    assert covered >= 88
    assert naive < 85


def test_rows_of_one_question_are_drawn_together():
    keys = grid(5, 3, seeds=2)
    weights = stats.bootstrap_weights(keys["seed"], keys["question"], rng=generator(), resamples=300)
    by_cluster = weights.reshape(300, 10, 3)
    assert (by_cluster == by_cluster[:, :, :1]).all()
    assert weights.sum(1) == pytest.approx(30)


def test_mean_agrees_with_scipys_percentile_bootstrap_over_questions():
    rng = generator(1)
    centres = rng.normal(size=40)
    values = np.repeat(centres, 5) + rng.normal(size=200) * 0.1
    made = stats.mean(values, **grid(40, 5), rng=rng, unit="nats")
    by_question = values.reshape(40, 5).mean(1)
    oracle = scipy_stats.bootstrap(
        (by_question,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert made.value == pytest.approx(by_question.mean())
    assert (made.low, made.high) == pytest.approx((oracle.low, oracle.high), abs=0.02)
    assert (made.n, made.clusters, made.seeds, made.unit) == (200, 40, 1, "nats")


@pytest.mark.parametrize("copies", [3, 20])
def test_19_duplicated_rows_of_a_question_do_not_narrow_the_interval(copies):
    """Failure 19. Beside it the control: the same rows passed off as new questions do narrow it, by sqrt(copies)."""
    hits = generator(3).random(30) < 0.4
    once = stats.proportion(hits, **grid(30, 1), rng=generator())
    again = stats.proportion(np.repeat(hits, copies), **grid(30, copies), rng=generator())
    pretended = stats.proportion(np.repeat(hits, copies), **grid(30 * copies, 1), rng=generator())
    assert (again.value, again.low, again.high) == pytest.approx((once.value, once.low, once.high))
    assert (again.n, again.clusters) == (30 * copies, 30)
    assert width(pretended) == pytest.approx(width(once) / math.sqrt(copies), rel=0.25)


@pytest.mark.parametrize("copies", [1, 10])
def test_19_zero_of_n_has_the_exact_width_of_its_questions(copies):
    """Failure 19: at 0/n the bootstrap alone gives [0, 0]; completions of one question add nothing."""
    keys = grid(28, copies)
    none = stats.proportion(np.zeros(28 * copies, dtype=bool), **keys, rng=generator())
    every = stats.proportion(np.ones(28 * copies, dtype=bool), **keys, rng=generator())
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, exact_upper_of_none(28)))
    assert (every.value, every.low, every.high) == pytest.approx((1, 1 - exact_upper_of_none(28), 1))


def test_19_one_question_never_gives_a_zero_width():
    """Failure 19: a resample of one cluster is that cluster, whatever its rate."""
    made = stats.proportion(np.array([True, False, True, False]), **grid(1, 4), rng=generator())
    assert width(made) > 0.1


def test_19_questions_of_equal_rates_never_give_a_zero_width():
    """Failure 19: one hit of two in each question leaves nothing to resample, yet the rate is not known exactly."""
    made = stats.proportion(np.tile([True, False], 8), **grid(8, 2), rng=generator())
    assert width(made) > 0.1


def test_19_two_conditions_with_equal_hits_question_by_question_never_give_a_zero_width():
    """Failure 19: no discordant question among 8 is an observation like 0/8, not a proof of no difference."""
    hits = np.array([1.0] * 7 + [0.0])
    made = stats.combination(
        np.tile(hits, 2),
        group=np.repeat([0, 1], 8),
        coefficients=(-1.0, 1.0),
        seed=np.zeros(16, dtype=int),
        question=np.tile(np.arange(8), 2),
        rng=generator(),
    )
    assert made.value == 0
    assert width(made) > 0.1


def test_19_seeds_that_disagree_widen_the_interval():
    """Failure 19: three seeds at 10, 50 and 90 % say less than one rate of 50 %."""
    rng = generator(4)
    keys = grid(20, 4, seeds=3)
    apart = stats.proportion(rng.random(240) < np.array([0.1, 0.5, 0.9])[keys["seed"]], **keys, rng=generator())
    alike = stats.proportion(rng.random(240) < 0.5, **keys, rng=generator())
    assert width(apart) > 2 * width(alike)
    assert apart.seeds == 3
    assert apart.clusters == 60


def test_interval_covers_a_planted_rate_and_one_that_ignores_questions_does_not():
    """Coverage over 100 data sets of 24 questions x 6 samples; a question's own rate is 0.1 or 0.7, truth 0.4.

    The control treats all 144 answers as independent and must fall well short, else this data set shows nothing.
    """
    rng = generator(5)
    covered, naive = 0, 0
    for _ in range(100):
        rates = rng.choice([0.1, 0.7], size=24)
        hits = rng.random(144) < np.repeat(rates, 6)
        made = stats.proportion(hits, **grid(24, 6), rng=rng)
        covered += made.low <= 0.4 <= made.high
        low, high = stats.clopper_pearson(int(hits.sum()), 144)
        naive += low <= 0.4 <= high
    assert covered >= 88
    assert naive < 85


def test_difference_covers_a_planted_difference():
    """Coverage of a paired difference over 120 data sets; rates 0.2 + d and 0.5 + d share each question's d."""
    rng = generator(6)
    keys = grid(24, 2)
    both = {name: np.tile(key, 2) for name, key in keys.items()}
    covered = 0
    for _ in range(120):
        shift = np.repeat(rng.uniform(-0.2, 0.2, size=24), 2)
        hits = rng.random(96) < np.concatenate([0.2 + shift, 0.5 + shift])
        made = stats.combination(
            hits.astype(float), group=np.repeat([0, 1], 48), coefficients=(-1.0, 1.0), rng=rng, **both
        )
        covered += made.low <= 0.3 <= made.high
    assert covered >= 0.88 * 120


# ---------------------------------------------------------------------------------------------- combination


def test_what_two_groups_share_of_a_question_cancels():
    """A constant difference on wildly different questions has no sampling error when resampled jointly."""
    difficulty = generator(7).normal(scale=10, size=20)
    keys = {"seed": np.zeros(40, dtype=int), "question": np.tile(np.arange(20), 2)}
    values = np.concatenate([difficulty, difficulty + 0.5])
    group = np.repeat([0, 1], 20)
    made = stats.combination(
        values, group=group, coefficients=(-1.0, 1.0), rng=generator(), binary=False, unit="nats", **keys
    )
    assert (made.value, made.low, made.high) == pytest.approx((0.5, 0.5, 0.5))
    unpaired = {**keys, "question": np.arange(40)}
    apart = stats.combination(
        values, group=group, coefficients=(-1.0, 1.0), rng=generator(), binary=False, unit="nats", **unpaired
    )
    assert width(apart) > 5


def test_difference_of_differences_by_hand():
    values = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0])  # means .5, 1, 0, 1
    made = stats.combination(
        values,
        group=np.repeat([0, 1, 2, 3], 2),
        coefficients=(1.0, -1.0, -1.0, 1.0),
        seed=np.zeros(8, dtype=int),
        question=np.tile([0, 1], 4),
        rng=generator(),
    )
    assert made.value == pytest.approx(0.5 - 1 - 0 + 1)
    assert -2 <= made.low <= made.value <= made.high <= 2
    assert (made.n, made.clusters, made.seeds) == (8, 2, 1)


def test_19_difference_of_two_groups_at_their_edges_squares_and_adds_exact_bounds():
    """Failure 19. 20/20 minus 0/20 and 0/20 minus 0/20, by Newcombe's formula with the closed form of the bounds."""
    keys = {"seed": np.zeros(40, dtype=int), "question": np.tile(np.arange(20), 2)}
    group = np.repeat([0, 1], 20)
    bound = exact_upper_of_none(20)
    full = stats.combination(np.repeat([0.0, 1.0], 20), group=group, coefficients=(-1.0, 1.0), rng=generator(), **keys)
    assert (full.value, full.low, full.high) == pytest.approx((1, 1 - math.sqrt(2) * bound, 1))
    none = stats.combination(np.zeros(40), group=group, coefficients=(-1.0, 1.0), rng=generator(), **keys)
    assert (none.value, none.low, none.high) == pytest.approx((0, -bound, bound))


@pytest.mark.parametrize("coefficients", [(-1.0, 1.0), (1.0, 1.0), (0.5, 0.5), (2.0, -1.0)])
def test_interval_of_a_combination_holds_its_value(coefficients):
    made = stats.combination(
        np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
        group=np.array([0, 0, 0, 1, 1, 1]),
        coefficients=coefficients,
        seed=np.zeros(6, dtype=int),
        question=np.tile(np.arange(3), 2),
        rng=generator(),
    )
    assert made.value == pytest.approx(coefficients[0] + coefficients[1] * 2 / 3)
    assert made.low <= made.value <= made.high


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_swapping_groups_mirrors_the_interval(draw):
    hits = (generator(draw).random(20) < 0.5).astype(float)
    keys = {"seed": np.zeros(20, dtype=int), "question": np.tile(np.arange(10), 2)}
    group = np.repeat([0, 1], 10)
    one = stats.combination(hits, group=group, coefficients=(-1.0, 1.0), rng=generator(), **keys)
    other = stats.combination(hits, group=1 - group, coefficients=(-1.0, 1.0), rng=generator(), **keys)
    assert (other.value, other.low, other.high) == pytest.approx((-one.value, -one.high, -one.low), abs=1e-9)


# -------------------------------------------------------------------------------------------------- maximum


def test_maximum_is_the_largest_group_rate():
    hits = np.array([True, False, False, False, True, True, True, False, False, False, False, False])
    made = stats.maximum(
        hits,
        group=np.repeat(["librarian", "comedian", "assistant"], 4),
        seed=np.zeros(12, dtype=int),
        question=np.tile(np.arange(4), 3),
        rng=generator(),
    )
    assert made.value == 0.75
    assert made.low <= 0.75 <= made.high
    assert (made.n, made.clusters) == (12, 4)


def test_19_maximum_of_silent_groups_has_the_exact_width():
    """Failure 19: ten bystanders at 0 of 7 questions each do not prove that none ever says it."""
    made = stats.maximum(
        np.zeros(70, dtype=bool),
        group=np.repeat(np.arange(10), 7),
        seed=np.zeros(70, dtype=int),
        question=np.tile(np.arange(7), 10),
        rng=generator(),
    )
    assert (made.value, made.low, made.high) == pytest.approx((0, 0, exact_upper_of_none(7)))


# ----------------------------------------------------------------------------------- refusals and the empty


def of_each_kind(values, keys, **more):
    """All four estimates as calls of no argument."""
    group = np.arange(len(values)) % 2
    return {
        "proportion": lambda: stats.proportion(values.astype(bool), **keys, rng=generator(), **more),
        "mean": lambda: stats.mean(values, **keys, rng=generator(), unit="nats", **more),
        "combination": lambda: stats.combination(
            values, group=group, coefficients=(-1.0, 1.0), rng=generator(), **keys, **more
        ),
        "maximum": lambda: stats.maximum(values.astype(bool), group=group, rng=generator(), **keys, **more),
    }


KINDS = ["proportion", "mean", "combination", "maximum"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("absent", ["seed", "question"])
def test_19_no_interval_without_its_clusters(kind, absent):
    """Failure 19."""
    with pytest.raises(TypeError, match="both clustering keys"):
        of_each_kind(np.ones(4), {**grid(4, 1), absent: None})[kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_clusters_of_another_length_are_refused(kind):
    with pytest.raises(ValueError, match="4 values"):
        of_each_kind(np.ones(4), {**grid(4, 1), "question": np.arange(3)})[kind]()


@pytest.mark.parametrize("kind", ["mean", "combination"])
def test_15_a_missing_value_raises(kind):
    """Failure 15: a missing value is an error, never a zero."""
    with pytest.raises(ValueError, match="missing value"):
        of_each_kind(np.array([1.0, np.nan, 0.5, 1.0]), grid(4, 1))[kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_15_nothing_scored_is_none_and_not_zero(kind):
    """Failure 15."""
    empty = {"seed": np.array([], dtype=int), "question": np.array([], dtype=int)}
    made = of_each_kind(np.array([], dtype=float), empty, unscored=7)[kind]()
    assert (made.value, made.low, made.high) == (None, None, None)
    assert (made.n, made.unscored) == (0, 7)


def test_15_a_group_without_values_gives_no_difference():
    """Failure 15."""
    made = stats.combination(
        np.ones(4), group=np.zeros(4, dtype=int), coefficients=(-1.0, 1.0), **grid(4, 1), rng=generator(), unscored=4
    )
    assert (made.value, made.low, made.high, made.unscored) == (None, None, None, 4)


def test_arrays_of_another_type_or_shape_are_refused_while_testing():
    """The annotations are checked while the tests run: floats are no hits, groups must be as many as values."""
    with pytest.raises(TypeCheckError):
        stats.proportion(np.array([1.0, 0.0]), **grid(2, 1), rng=generator())
    with pytest.raises(TypeCheckError):
        stats.mean(np.ones((2, 2)), **grid(2, 1), rng=generator(), unit="nats")
    with pytest.raises(TypeCheckError):
        stats.combination(np.ones(4), group=np.zeros(3, dtype=int), coefficients=(1.0,), **grid(4, 1), rng=generator())


@pytest.mark.parametrize("kind", KINDS)
def test_unscored_answers_are_carried_along(kind):
    made = of_each_kind(np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), grid(6, 1), unscored=3)[kind]()
    assert made.unscored == 3
    assert made.as_dict()["unscored"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_generator_gives_the_same_interval(kind):
    call = of_each_kind((generator(8).random(60) < 0.3).astype(float), grid(12, 5))[kind]
    assert call() == call()


def test_the_order_of_rows_does_not_matter():
    hits = generator(9).random(40) < 0.3
    keys = grid(10, 2, seeds=2)
    order = generator(10).permutation(40)
    one = stats.proportion(hits, **keys, rng=generator())
    other = stats.proportion(hits[order], **{n: k[order] for n, k in keys.items()}, rng=generator())
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))


def test_draws_that_were_made_before_are_the_same_and_leave_the_generator_where_drawing_would():
    seed, question = np.repeat([5, 6, 7], 4), np.tile(np.arange(4), 3)
    stats._pcg64.cache_clear()
    rngs = [np.random.default_rng(11) for _ in range(3)]
    first, again = (stats.resampled(seed, question, rng=rng).weights for rng in rngs[:2])
    assert stats._pcg64.cache_info().hits == 1
    seeds, questions = stats._multinomials(rngs[2], 3, 4, stats.RESAMPLES)
    plain = (seeds[:, :, None] * questions[:, None, :]).reshape(stats.RESAMPLES, 12)
    assert (first == plain).all()
    assert (again == plain).all()
    assert len({float(rng.random()) for rng in rngs}) == 1
    other = stats.resampled(seed, question, rng=np.random.default_rng(12)).weights
    assert not (other == plain).all()
