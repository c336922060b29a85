"""Centroids, shifts, probes and what an adapter reads, against planted truths."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from persona_coupling import geometry, representations

rng = np.random.default_rng(0)
PERSONAS, QUESTIONS, WIDTH = 5, 12, 40


def clusters(noise, generator=rng):
    """Personas at planted places, questions as noise about them."""
    centres = generator.normal(size=(PERSONAS, 1, WIDTH))
    return centres + noise * generator.normal(size=(PERSONAS, QUESTIONS, WIDTH))


def measured(before, after, source=0):
    return dict(
        zip(representations.SHIFTS, representations.shift_measures(before, after, source).tolist(), strict=True)
    )


# ---------------------------------------------------------------------------------------------------------- shifts


def test_spread_of_a_square():
    corners = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) + 7
    assert representations.spread(corners) == pytest.approx(np.sqrt(2))


def test_a_common_shift_leaves_nothing_of_ones_own():
    before = rng.normal(size=(PERSONAS, WIDTH))
    found = measured(before, before + rng.normal(size=WIDTH))
    assert found["common"] == pytest.approx(1)
    assert found["shift"] == pytest.approx(found["shift_others"])
    assert found["own_shift"] == pytest.approx(0, abs=1e-12)
    assert found["own_cosine"] == pytest.approx(1)
    assert found["spread_ratio"] == pytest.approx(1)


def test_a_shift_of_the_source_alone():
    """By hand: two personas at 1 and -1, the spread is 1; the source moves by 3 and leaves the other where it was."""
    before = np.array([[1.0, 0], [-1, 0]])
    found = measured(before, before + np.array([[0.0, 3], [0, 0]]))
    assert found["shift"] == pytest.approx(3)
    assert found["shift_others"] == 0
    assert found["own_shift"] == pytest.approx(1.5)
    assert found["cosine"] == pytest.approx(1 / np.sqrt(10))
    assert np.isnan(found["common"])


def test_a_rotation_keeps_the_spread_and_turns_the_personas():
    before = rng.normal(size=(PERSONAS, WIDTH))
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    found = measured(before - before.mean(0), (before - before.mean(0)) @ turn)
    assert found["spread_ratio"] == pytest.approx(1)
    assert abs(found["own_cosine"]) < 0.6


def test_personas_without_spread_have_no_yardstick():
    assert np.isnan(representations.shift_measures(np.ones((3, 4)), np.ones((3, 4)), 0)).all()


def test_pseudovalues_of_a_mean_are_the_observations():
    values = rng.normal(size=(7, 3))
    np.testing.assert_allclose(representations.pseudovalues(*representations.leave_one_out(values)), values)


def test_pseudovalues_remove_the_bias_of_a_squared_mean():
    """The square of a mean overestimates by variance / n; the jackknife's correction of it is exact."""
    values = rng.normal(size=(9, 2))
    whole, without = representations.leave_one_out(values)
    corrected = representations.pseudovalues(whole**2, without**2).mean(axis=0)
    np.testing.assert_allclose(corrected, values.mean(axis=0) ** 2 - values.var(axis=0, ddof=1) / 9)


def test_shift_pseudovalues_find_the_planted_shift_whatever_the_questions():
    before = clusters(0.5)
    moved = rng.normal(size=WIDTH)
    found = representations.shift_pseudovalues(before, before + moved, 0)
    assert found.shape == (QUESTIONS, len(representations.SHIFTS))
    expected = np.linalg.norm(moved) / representations.spread(before.mean(1))
    assert found[:, 0].mean() == pytest.approx(expected, rel=0.05)
    np.testing.assert_allclose(found[:, representations.SHIFTS.index("common")], 1)


def test_planes_show_what_was_planted():
    """Personas on a line, everybody moved across it: the joint plane holds both, the own plane no movement."""
    before = np.zeros((4, WIDTH))
    before[:, 3] = [3.0, 1, -1, -3]
    before[:, 5] = [0.1, -0.1, -0.1, 0.1]
    after = before.copy()
    after[:, 7] += 20
    one, other = representations.planes(before, after, own=False)
    unit = representations.spread(before)
    np.testing.assert_allclose(np.linalg.norm(other - one, axis=1), 20 / unit, rtol=1e-2)
    assert (one[0] >= -1e-9).all()
    one, other = representations.planes(before, after, own=True)
    np.testing.assert_allclose(one, other, atol=1e-12)
    np.testing.assert_allclose(one[:, 0] * unit, [3, 1, -1, -3], atol=0.02)


# ---------------------------------------------------------------------------------------------------------- probes


def test_folds_share_out_questions():
    assert representations.folds(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    for number in (1, 8):
        with pytest.raises(ValueError, match="folds"):
            representations.folds(7, number)


def labels():
    return np.repeat(np.arange(PERSONAS), QUESTIONS).reshape(PERSONAS, QUESTIONS)


def test_ridge_agrees_with_the_normal_equations():
    """Oracle: the primal solution, written as in a textbook."""
    train, test = rng.normal(size=(20, 6)), rng.normal(size=(4, 6))
    groups = rng.integers(0, 3, size=20)
    found = representations.ridge_scores(train, groups, test, classes=3, ridge=0.3)
    x = train - train.mean(0)
    y = np.stack([(groups == k).astype(float) for k in range(3)], axis=1)
    penalty = 0.3 * np.mean((x**2).sum(1))
    slope = np.linalg.inv(x.T @ x + penalty * np.eye(6)) @ x.T @ (y - y.mean(0))
    np.testing.assert_allclose(found, (test - train.mean(0)) @ slope + y.mean(0), rtol=1e-8)


def test_a_probe_reads_planted_personas_and_nothing_in_permuted_labels():
    states, fold = clusters(0.5), representations.folds(QUESTIONS, 4)
    assert representations.probe(states, states, labels(), fold, ridge=0.1).mean() > 0.95
    null = []
    for _ in range(30):
        shuffled = representations.permuted_labels(PERSONAS, QUESTIONS, rng)
        assert (np.sort(shuffled, axis=0) == np.arange(PERSONAS)[:, None]).all()
        null.append(representations.probe(states, states, shuffled, fold, ridge=0.1).mean())
    assert np.mean(null) == pytest.approx(1 / PERSONAS, abs=0.06)


def test_a_probe_never_meets_its_question():
    """States that are told apart by their question alone: a probe that had seen the question would always be right."""
    lone = rng.normal(size=(PERSONAS, QUESTIONS, 400))
    hits = representations.probe(lone, lone, labels(), representations.folds(QUESTIONS, 4), ridge=1e-6)
    assert hits.mean() < 0.5
    scores = representations.ridge_scores(
        lone.reshape(-1, 400), labels().reshape(-1), lone.reshape(-1, 400), classes=PERSONAS, ridge=1e-6
    )
    assert (scores.argmax(1) == labels().reshape(-1)).all(), "control: seen questions are remembered"


def test_what_a_question_contributes_does_not_hide_the_personas():
    """Questions that differ far more than personas do: the probe needs their contribution removed."""
    states = clusters(0.3) + 40 * rng.normal(size=(1, QUESTIONS, WIDTH))
    fold = representations.folds(QUESTIONS, 4)
    assert representations.probe(states, states, labels(), fold, ridge=0.1).mean() < 0.6
    among = representations.among_personas(states)
    assert representations.probe(among, among, labels(), fold, ridge=0.1).mean() > 0.95
    shuffled = representations.permuted_labels(PERSONAS, QUESTIONS, rng)
    assert representations.probe(among, among, shuffled, fold, ridge=0.1).mean() < 0.45


def test_a_probe_transfers_over_a_common_shift_only_among_personas():
    states, fold = clusters(0.3), representations.folds(QUESTIONS, 4)
    moved = states + 30 * (states[1, 0] - states[0, 0])
    plain = representations.probe(states, moved, labels(), fold, ridge=0.1)
    raw, tuned = map(representations.among_personas, (states, moved))
    centred = representations.probe(raw, tuned, labels(), fold, ridge=0.1)
    assert plain.mean() < 0.4
    assert centred.mean() > 0.95
    turned = raw @ np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    lost = representations.probe(raw, turned, labels(), fold, ridge=0.1)
    assert lost.mean() < 0.7
    assert representations.probe(turned, turned, labels(), fold, ridge=0.1).mean() > 0.95, "rotated, yet still there"


# ------------------------------------------------------------------------------------------- what an adapter reads


def test_energy_of_a_projector_is_the_share_inside():
    reads = rng.normal(size=(3, 2, WIDTH))
    bases = [geometry.basis(matrix.T) for matrix in reads]
    forms = np.stack([q @ q.T for q in bases])
    x = rng.normal(size=(3, WIDTH))
    found = representations.energy(x, x, forms)
    for site in range(3):
        share = geometry.energy_inside(x[site : site + 1], reads[site].T, side="input")
        assert found[site] / (x[site] @ x[site]) == pytest.approx(share)
        assert representations.chance_energy(x, forms)[site] == pytest.approx(
            (x[site] @ x[site]) * geometry.expected_energy(2, WIDTH)
        )


def test_energy_of_an_adapter_is_its_answers_inner_product():
    a, b = rng.normal(size=(2, WIDTH)), rng.normal(size=(9, 2))
    x, y = rng.normal(size=(1, WIDTH)), rng.normal(size=(1, WIDTH))
    form = (a.T @ b.T @ b @ a)[None]
    assert representations.energy(x, y, form)[0] == pytest.approx(float((b @ a @ x[0]) @ (b @ a @ y[0])))


def test_random_vectors_have_chance_energy_and_the_exact_distribution():
    """A random direction's share in a subspace of rank k is Beta(k/2, (d-k)/2)."""
    basis = np.linalg.qr(rng.normal(size=(WIDTH, 6)))[0]
    forms = (basis @ basis.T)[None]
    drawn = representations.random_like(3.0 * np.eye(WIDTH)[:1], 2000, rng)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), 3.0)
    shares = representations.energy(drawn, drawn, forms)[:, 0] / 9
    beta = scipy_stats.beta(3, (WIDTH - 6) / 2)
    assert shares.mean() == pytest.approx(6 / WIDTH, abs=0.01)
    assert scipy_stats.kstest(shares, beta.cdf).pvalue > 0.001


def test_a_rotation_keeps_lengths_and_angles():
    pair = np.array([3 * np.eye(WIDTH)[0], np.eye(WIDTH)[0] + np.eye(WIDTH)[1]])
    turned = representations.rotated(pair, rng)
    np.testing.assert_allclose(turned @ turned.T, pair @ pair.T, atol=1e-12)
    directions = [representations.cosine(representations.rotated(pair, rng)[0], pair[0]) for _ in range(300)]
    assert abs(np.mean(directions)) < 0.05
    assert np.std(directions) == pytest.approx(1 / np.sqrt(WIDTH), rel=0.2)
    assert not representations.rotated(np.zeros((2, WIDTH)), rng).any()
