"""Subspaces of low-rank weight changes: how much of one lies in another, and how much chance alone would give.

A change of one weight is B A, of shape (out, in). Its input side is the row space of A (what it reads), its output side
the column space of B (what it writes). Pure arrays; no model code.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray

RANK_TOLERANCE = (
    1e-6  # singular values below this fraction of the largest count as zero; raising it drops weak directions
)


def basis(matrix: Float[ndarray, "dimension vectors"]) -> Float[ndarray, "dimension rank"]:
    """Orthonormal basis of the column space. Raises ValueError for a zero matrix, which spans nothing."""
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    if not len(values) or values[0] == 0:
        raise ValueError("a zero matrix spans no subspace")
    return np.asarray(left[:, values > RANK_TOLERANCE * values[0]])


def principal_angles(
    one: Float[ndarray, "dimension rank_one"], other: Float[ndarray, "dimension rank_other"]
) -> Float[ndarray, " angles"]:
    """Principal angles between two column spaces, radians, ascending (Björck and Golub 1973, doi:10.2307/2005662).

    Small angles are taken from sines, large ones from cosines, as there: each is inaccurate where the other is not.
    """
    q_one, q_other = basis(one), basis(other)
    if q_one.shape[1] < q_other.shape[1]:
        q_one, q_other = q_other, q_one
    overlap = q_one.T @ q_other
    cosines = np.clip(np.linalg.svd(overlap, compute_uv=False), 0.0, 1.0)
    sines = np.clip(np.linalg.svd(q_other - q_one @ overlap, compute_uv=False)[::-1], 0.0, 1.0)
    return np.where(cosines**2 < 0.5, np.arccos(cosines), np.arcsin(sines))


def energy_inside(
    change: Float[ndarray, "rows columns"], subspace: Float[ndarray, "dimension vectors"], *, side: str
) -> float:
    """The share of a change's squared Frobenius norm that lies in a subspace of its input ("input": columns of the
    change) or output ("output": rows) space; 0 to 1. Raises ValueError for a zero change or another side."""
    q = basis(subspace)
    total = float((change**2).sum())
    if total == 0:
        raise ValueError("a zero change has no energy to share out")
    if side == "input":
        return float(((change @ q) ** 2).sum()) / total
    if side == "output":
        return float(((q.T @ change) ** 2).sum()) / total
    raise ValueError(f"side is {side!r}, not input or output")


def expected_energy(rank: int, dimension: int) -> float:
    """The expected share of energy in a uniformly random subspace: rank / dimension, whatever the change."""
    if not 0 < rank <= dimension:
        raise ValueError(f"no subspace of rank {rank} in dimension {dimension}")
    return rank / dimension


def effective_rank(values: Float[ndarray, " values"]) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007, EUSIPCO). 1 for rank one, n for n
    equal ones. Raises ValueError if all are zero."""
    total = float(np.sum(values))
    if total == 0:
        raise ValueError("no singular value is above zero")
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
