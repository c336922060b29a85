"""Subspaces against planted ones, scipy, and chance."""

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from persona_coupling import geometry

rng = np.random.default_rng(0)


def test_planted_angles():
    """Two planes in space that share one axis and are tilted by a known angle about it."""
    tilt = 0.3
    one = np.array([[1.0, 0], [0, 1], [0, 0], [0, 0]])
    other = np.array([[1.0, 0], [0, np.cos(tilt)], [0, np.sin(tilt)], [0, 0]])
    np.testing.assert_allclose(geometry.principal_angles(one, other), [0, tilt], atol=1e-12)


@pytest.mark.parametrize(("left", "right"), [(3, 3), (2, 5), (5, 2), (1, 4)])
def test_angles_agree_with_scipy(left, right):
    one, other = rng.normal(size=(12, left)), rng.normal(size=(12, right))
    np.testing.assert_allclose(
        geometry.principal_angles(one, other), np.sort(subspace_angles(one, other)), rtol=1e-8, atol=1e-10
    )


def test_angles_do_not_depend_on_the_basis():
    one, other = rng.normal(size=(9, 3)), rng.normal(size=(9, 2))
    mixed = one @ rng.normal(size=(3, 3))
    np.testing.assert_allclose(
        geometry.principal_angles(one, other), geometry.principal_angles(mixed, other), rtol=1e-7, atol=1e-9
    )


def test_energy_of_a_planted_change():
    """Half of the squared norm is put inside the subspace."""
    inside, outside = np.eye(6)[:, :1], np.eye(6)[:, 3:4]
    change = np.outer([1.0, 2.0], inside[:, 0]) + np.outer([2.0, -1.0], outside[:, 0])
    assert geometry.energy_inside(change, inside, side="input") == pytest.approx(0.5)
    assert geometry.energy_inside(change.T, inside, side="output") == pytest.approx(0.5)
    assert geometry.energy_inside(change, np.eye(6), side="input") == pytest.approx(1.0)


def test_chance_overlap_is_rank_over_dimension():
    """And its positive control: the change's own row space holds all of it."""
    change = rng.normal(size=(5, 3)) @ rng.normal(size=(3, 40))
    shares = [geometry.energy_inside(change, rng.normal(size=(40, 8)), side="input") for _ in range(400)]
    assert np.mean(shares) == pytest.approx(geometry.expected_energy(8, 40), abs=4 * np.std(shares) / 20)
    assert geometry.energy_inside(change, change.T, side="input") == pytest.approx(1.0)


def test_effective_rank_of_known_spectra():
    assert geometry.effective_rank(np.array([5.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert geometry.effective_rank(np.full(7, 0.2)) == pytest.approx(7.0)
    assert 1 < geometry.effective_rank(np.array([1.0, 0.1])) < 2


def test_nothing_is_refused():
    with pytest.raises(ValueError, match="spans no subspace"):
        geometry.basis(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="zero change"):
        geometry.energy_inside(np.zeros((2, 4)), np.eye(4), side="input")
    with pytest.raises(ValueError, match="not input or output"):
        geometry.energy_inside(np.ones((2, 2)), np.eye(2), side="left")
    with pytest.raises(ValueError, match="no singular value"):
        geometry.effective_rank(np.zeros(3))
    with pytest.raises(ValueError, match="no subspace of rank"):
        geometry.expected_energy(5, 4)
