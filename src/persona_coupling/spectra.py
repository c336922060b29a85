"""Spectra of weight changes: the singular values of every changed matrix, and where a change's squared norm lies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from persona_coupling import geometry, models
from persona_coupling.adapters import Change, LowRank
from persona_coupling.models import layer_of

if TYPE_CHECKING:
    import torch

PARTS = ("attention", "mlp", "embedding", "norm", "other")
OUTSIDE = PARTS[2:]  # what an adapter of the seven projections leaves alone


def singular_values(part: LowRank | torch.Tensor, device: str = "cpu") -> Float[ndarray, " values"]:
    """Singular values of a changed matrix, descending, fp64; those below `geometry.RANK_TOLERANCE` of the largest are 0.

    Of B A by way of the two small triangular factors; of a dense matrix as square roots of the eigenvalues of its smaller
    Gram matrix, in fp64. That is several times cheaper than a decomposition of the matrix, and inexact only for values
    below 1e-8 of the largest.
    """
    import torch

    if isinstance(part, LowRank):
        inner = torch.linalg.qr(part.b.double()).R @ torch.linalg.qr(part.a.double().T).R.T
        values = torch.linalg.svdvals(inner)
    else:
        matrix = part.to(device).double()
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    found = np.asarray(values.cpu().numpy(), dtype=float)
    return np.where(found > geometry.RANK_TOLERANCE * found.max(initial=0.0), found, 0.0)


def rank_share(values: Float[ndarray, " values"], rank: int) -> float:
    """The share of a matrix's squared Frobenius norm that its best approximation of rank at most `rank` holds (Eckart and
    Young 1936, doi:10.1007/BF02288367). Raises ValueError for a zero matrix."""
    total = float((values**2).sum())
    if total == 0:
        raise ValueError("a zero change has no energy to share out")
    return float((values[:rank] ** 2).sum()) / total


@cache
def by_chance(rows: int, columns: int) -> Float[ndarray, " values"]:
    """Singular values of a Gaussian matrix of that shape: what a change without any structure looks like."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return singular_values(torch.randn(rows, columns, generator=generator, dtype=torch.float64))


def place(name: str) -> tuple[int, str, str]:
    """Layer (-1 outside the layers), module and part of the model of a changed parameter's dotted name."""
    module = name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]
    layer = layer_of(name + ".") if ".layers." in name else -1
    if module in models.ATTENTION:
        return layer, module, "attention"
    if module in models.MLP:
        return layer, module, "mlp"
    if module in ("embed_tokens", "lm_head"):  # one and the same matrix in a tied model, listed once
        return layer, module, "embedding"
    return layer, module, "norm" if "norm" in module else "other"


def rows(change: Change, *, rank: int, kept: int, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """One row for each changed parameter: place, shape, squared norm; of matrices also the leading `kept` singular values,
    effective rank, the share of the best approximation of rank `rank`, and both for a Gaussian matrix of that shape.

    Vectors (norms, biases) have no spectrum: their values are missing and their lists empty. A low-rank part is compared
    with no Gaussian matrix, whose rank would be another.
    """
    for name, part in change.items():
        layer, module, where = place(name)
        shape = (part.b.shape[0], part.a.shape[1]) if isinstance(part, LowRank) else tuple(part.shape)
        row = {"name": name, "layer": layer, "module": module, "part": where, "rows": shape[0]}
        if len(shape) != 2:
            assert not isinstance(part, LowRank)
            squared = float((part.double() ** 2).sum())
            yield {**row, "columns": 1, "squared": squared, **_described(np.zeros(0), rank), "singular": []}
            continue
        values = singular_values(part, device)
        chance = np.zeros(0) if isinstance(part, LowRank) else by_chance(shape[0], shape[1])
        yield {
            **row,
            "columns": shape[1],
            "squared": float((values**2).sum()),
            **_described(values, rank),
            **{f"chance_{measure}": value for measure, value in _described(chance, rank).items()},
            "singular": values[:kept].astype(np.float32).tolist(),
        }


def _described(values: Float[ndarray, " values"], rank: int) -> dict[str, float]:
    if not len(values) or not values.any():
        return {"effective_rank": float("nan"), "rank_share": float("nan")}
    return {"effective_rank": geometry.effective_rank(values), "rank_share": rank_share(values, rank)}
