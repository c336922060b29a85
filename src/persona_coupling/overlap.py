"""How much two low-rank changes of one weight have in common: angles, energy, norms, and what chance would give.

Pure arrays; no model code. A change is B A: what it reads is the row space of A (side "input"), what it writes the column
space of B (side "output").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from persona_coupling import geometry

SIDES = ("input", "output")


@dataclass(frozen=True)
class Factors:
    """B A of one weight: `reads` is A, `writes` is B."""

    reads: Float[ndarray, "rank inputs"]
    writes: Float[ndarray, "outputs rank"]

    def subspace(self, side: str) -> Float[ndarray, "dimension rank"]:
        """Vectors that span what is read or written."""
        return {"input": self.reads.T, "output": self.writes}[side]

    def thin(self, side: str) -> Float[ndarray, "rows columns"]:
        """A small matrix with the change's own energy on one side: B A = Q (R A) with orthonormal Q, so R A has the
        same products with any subspace of the inputs; likewise from the right for the outputs."""
        if side == "input":
            return np.asarray(np.linalg.qr(self.writes).R @ self.reads)
        return np.asarray(self.writes @ np.linalg.qr(self.reads.T).R.T)

    def squared_norm(self) -> float:
        """Squared Frobenius norm of the product."""
        return float((self.thin("input") ** 2).sum())


def drawn_like(change: Factors, rng: np.random.Generator) -> Factors:
    """A Gaussian change of the same shape and rank: its subspaces are uniformly random."""
    return Factors(rng.standard_normal(change.reads.shape), rng.standard_normal(change.writes.shape))


def side_by_side(change: Factors, adapter: Factors, side: str) -> dict[str, Any]:
    """One side of two changes: the share of `change`'s energy inside the adapter's subspace, what a random subspace of
    that rank would hold, the mean squared cosine of the principal angles, and three of the angles in degrees."""
    against = geometry.basis(adapter.subspace(side))
    angles = geometry.principal_angles(change.subspace(side), against)
    dimension, rank = against.shape
    return {
        "side": side,
        "dimension": dimension,
        "rank": rank,
        "energy": geometry.energy_inside(change.thin(side), against, side=side),
        "expected": geometry.expected_energy(rank, dimension),
        "squared_cosine": float((np.cos(angles) ** 2).mean()),
        "smallest_angle": float(np.degrees(angles[0])),
        "median_angle": float(np.degrees(np.median(angles))),
        "largest_angle": float(np.degrees(angles[-1])),
    }


def bookkeeping(change: Factors, adapter: Factors) -> dict[str, float]:
    """Norms of two changes, their cosine as vectors, the share of `change`'s squared norm that `stages.Part` calls
    inside, and the mean cosine of rows of A with the same number (near one if both trainings started from one random
    A; NaN where the ranks differ)."""
    squared, other = change.squared_norm(), adapter.squared_norm()
    product = float(((adapter.writes.T @ change.writes) * (adapter.reads @ change.reads.T)).sum())
    reads, writes = geometry.basis(adapter.reads.T), geometry.basis(adapter.writes)
    outside = Factors(
        change.reads - change.reads @ reads @ reads.T, change.writes - writes @ (writes.T @ change.writes)
    )
    start = float("nan")
    if change.reads.shape == adapter.reads.shape:
        lengths = np.linalg.norm(change.reads, axis=1) * np.linalg.norm(adapter.reads, axis=1)
        start = float(((change.reads * adapter.reads).sum(axis=1) / lengths).mean())
    return {
        "norm": squared**0.5,
        "adapter_norm": other**0.5,
        "cosine": product / (squared * other) ** 0.5,
        "inside": 1 - outside.squared_norm() / squared,
        "start_cosine": start,
    }
