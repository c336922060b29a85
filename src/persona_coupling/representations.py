"""Where a model keeps its personas, as arrays: centroids, how far training moves them, what a probe and an adapter read.

A state is a vector of the residual stream, one per persona and question; a centroid is a persona's mean over questions.
Quantities that are not linear in the questions (norms, cosines, ratios) become one number per question by the jackknife,
so that they meet the same seeds x questions intervals as everything else. Pure arrays; no model code.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

SHIFTS = (
    "shift",
    "shift_others",
    "own_shift",
    "own_shift_others",
    "cosine",
    "own_cosine",
    "common",
    "common_share",
    "spread",
    "spread_ratio",
)


def folds(count: int, number: int) -> Int[ndarray, " count"]:
    """The fold of each of `count` questions, in turn. Raises ValueError unless 2 <= number <= count: with fewer there is
    nothing to train on, with more a fold is empty."""
    if not 2 <= number <= count:
        raise ValueError(f"{count} questions do not make {number} folds")
    return np.arange(count, dtype=np.int64) % number


# ------------------------------------------------------------------------------------------------------ the jackknife


def leave_one_out(
    values: Float[ndarray, "questions *rest"],
) -> tuple[Float[ndarray, "*rest"], Float[ndarray, "questions *rest"]]:
    """The mean over questions, and the means without each of them."""
    total = values.sum(axis=0)
    return np.asarray(total / len(values)), np.asarray((total - values) / (len(values) - 1))


def pseudovalues(
    whole: Float[ndarray, "*rest"], without: Float[ndarray, "questions *rest"]
) -> Float[ndarray, "questions *rest"]:
    """n T - (n - 1) T without a question: one number per question whose mean is the bias-corrected statistic and whose
    spread gives its error (Tukey 1958; Miller 1974, doi:10.1093/biomet/61.1.1). Right for smooth statistics, which norms
    and cosines away from zero are; a bounded statistic may leave its bounds in a single pseudo-value."""
    n = len(without)
    return np.asarray(n * whole - (n - 1) * without)


# -------------------------------------------------------------------------------------------------- centroids, shifts


def spread(centroids: Float[ndarray, "personas width"]) -> float:
    """Root mean squared distance of the personas' centroids from their mean: the yardstick of all shifts."""
    return float(np.sqrt(((centroids - centroids.mean(axis=0)) ** 2).sum(axis=1).mean()))


def cosine(one: Float[ndarray, " width"], other: Float[ndarray, " width"]) -> float:
    """Cosine of two vectors; NaN if one is zero, which points nowhere."""
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length > 0 else float("nan")


def shift_measures(
    before: Float[ndarray, "personas width"], after: Float[ndarray, "personas width"], source: int
) -> Float[ndarray, " measures"]:
    """How training moved the centroids, in the order of `SHIFTS`.

    Lengths are in units of the spread before. `own_` quantities are taken after the mean over personas is subtracted on
    either side, so that what happens to everybody is gone. `common` is the cosine between the source's shift and the mean
    shift of all others, `common_share` its square: the share of the source's shift, as squared length, that lies along
    the others'. `spread` is the yardstick itself, `spread_ratio` the spread after over before.
    """
    others = np.arange(len(before)) != source
    unit, moved = spread(before), after - before
    own_before, own_after = before - before.mean(axis=0), after - after.mean(axis=0)
    own_moved = own_after - own_before
    if unit == 0:
        return np.full(len(SHIFTS), np.nan)
    common = cosine(moved[source], moved[others].mean(axis=0))
    lengths, own_lengths = (np.linalg.norm(v, axis=1) / unit for v in (moved, own_moved))
    return np.array(
        [
            lengths[source],
            lengths[others].mean(),
            own_lengths[source],
            own_lengths[others].mean(),
            cosine(before[source], after[source]),
            cosine(own_before[source], own_after[source]),
            common,
            common**2,
            unit,
            spread(after) / unit,
        ]
    )


def shift_pseudovalues(
    before: Float[ndarray, "personas questions width"], after: Float[ndarray, "personas questions width"], source: int
) -> Float[ndarray, "questions measures"]:
    """`shift_measures` of the centroids, one pseudo-value per question."""
    whole_before, without_before = leave_one_out(before.swapaxes(0, 1))
    whole_after, without_after = leave_one_out(after.swapaxes(0, 1))
    without = [shift_measures(b, a, source) for b, a in zip(without_before, without_after, strict=True)]
    return pseudovalues(shift_measures(whole_before, whole_after, source), np.stack(without))


def planes(
    before: Float[ndarray, "personas width"], after: Float[ndarray, "personas width"], *, own: bool
) -> tuple[Float[ndarray, "personas 2"], Float[ndarray, "personas 2"]]:
    """Coordinates of the centroids in a plane, in units of the spread before.

    Plain: the two principal components of all centroids of both models together, about the mean before. `own`: each
    model's mean over personas is subtracted, and the plane is that of the personas before. An axis has no sign of its
    own: the first persona stands on its positive side.
    """
    unit = spread(before)
    if own:
        before, after = before - before.mean(axis=0), after - after.mean(axis=0)
        fitted = before
    else:
        before, after = before - before.mean(axis=0), after - before.mean(axis=0)
        fitted = np.concatenate([before, after])
        fitted = fitted - fitted.mean(axis=0)
    axes = np.linalg.svd(fitted, full_matrices=False)[2][:2]
    axes = axes * np.where(axes @ before[0] < 0, -1.0, 1.0)[:, None]
    return np.asarray(before @ axes.T / unit), np.asarray(after @ axes.T / unit)


# ------------------------------------------------------------------------------------------------------------- probes


def ridge_scores(
    train: Float[ndarray, "rows width"],
    labels: Int[ndarray, " rows"],
    test: Float[ndarray, "cases width"],
    *,
    classes: int,
    ridge: float,
) -> Float[ndarray, "cases classes"]:
    """Scores of a linear ridge classifier: least squares on class indicators (Hoerl and Kennard 1970,
    doi:10.1080/00401706.1970.10488634), in its dual form, since there are fewer rows than dimensions.

    The penalty is `ridge` times the mean squared length of a centred row; raising it leans on the leading directions.
    """
    mean = train.mean(axis=0)
    rows = train - mean
    indicators = np.eye(classes)[labels]
    gram = rows @ rows.T
    penalty = ridge * max(float(np.trace(gram)) / len(rows), np.finfo(float).tiny)
    weights = np.linalg.solve(gram + penalty * np.eye(len(rows)), indicators - indicators.mean(axis=0))
    return np.asarray((test - mean) @ rows.T @ weights + indicators.mean(axis=0))


def probe(
    train: Float[ndarray, "personas questions width"],
    test: Float[ndarray, "personas questions width"],
    labels: Int[ndarray, "personas questions"],
    fold: Int[ndarray, " questions"],
    *,
    ridge: float,
) -> Bool[ndarray, "personas questions"]:
    """Whether each state of `test` is assigned to its label by a probe that was trained on `train` at the questions of
    the other folds, and so has never met the question."""
    classes = int(labels.max()) + 1
    hits = np.zeros(labels.shape, dtype=bool)
    width = train.shape[-1]
    for held in np.unique(fold):
        seen, unseen = fold != held, fold == held
        scores = ridge_scores(
            train[:, seen].reshape(-1, width),
            labels[:, seen].reshape(-1),
            test[:, unseen].reshape(-1, width),
            classes=classes,
            ridge=ridge,
        )
        hits[:, unseen] = (scores.argmax(axis=1) == labels[:, unseen].reshape(-1)).reshape(labels[:, unseen].shape)
    return hits


def among_personas(states: Float[ndarray, "personas questions width"]) -> Float[ndarray, "personas questions width"]:
    """States minus their mean over personas at every question: what the question contributes is gone, and so is a shift
    common to all personas."""
    return np.asarray(states - states.mean(axis=0))


def permuted_labels(personas: int, questions: int, rng: np.random.Generator) -> Int[ndarray, "personas questions"]:
    """Persona labels shuffled within every question: what a probe finds in them is chance."""
    return np.stack([rng.permutation(personas) for _ in range(questions)], axis=1).astype(np.int64)


# ------------------------------------------------------------------------------------------------ what an adapter reads


def energy(
    one: Float[ndarray, "*batch sites width"],
    other: Float[ndarray, "*batch sites width"],
    forms: Float[ndarray, "sites width width"],
) -> Float[ndarray, "*batch sites"]:
    """`one` times the form times `other`, at every site. With the form A'B'BA it is the inner product of an adapter's two
    answers; with the projector on the rows of A, of what its A lets through."""
    sites, width = forms.shape[0], forms.shape[-1]
    left, right = (v.reshape(-1, sites, width).swapaxes(0, 1) for v in (one, other))  # a matrix product per site
    return np.asarray(((left @ forms) * right).sum(axis=-1).T.reshape(one.shape[:-1]))


def chance_energy(
    vectors: Float[ndarray, "*batch sites width"], forms: Float[ndarray, "sites width width"]
) -> Float[ndarray, "*batch sites"]:
    """The expected `energy` of uniformly random vectors of the same lengths: squared length times trace / width. For a
    projector that is rank / dimension."""
    return np.asarray((vectors**2).sum(axis=-1) * np.trace(forms, axis1=-2, axis2=-1) / forms.shape[-1])


def random_like(
    vectors: Float[ndarray, "*batch width"], draws: int, rng: np.random.Generator
) -> Float[ndarray, "draws *batch width"]:
    """Vectors of the same lengths in uniformly random directions."""
    drawn = rng.normal(size=(draws, *vectors.shape))
    return np.asarray(
        drawn / np.linalg.norm(drawn, axis=-1, keepdims=True) * np.linalg.norm(vectors, axis=-1, keepdims=True)
    )


def rotated(vectors: Float[ndarray, "count width"], rng: np.random.Generator) -> Float[ndarray, "count width"]:
    """The vectors under a random rotation: same lengths, same angles among them, no direction in common with what they
    were. For no more vectors than dimensions; zero vectors stay zero. A QR factor of a Gaussian matrix is uniform only
    once its signs are fixed (Mezzadri 2007, arXiv:math-ph/0609050)."""
    frame, signs = np.linalg.qr(rng.normal(size=vectors.T.shape))
    frame = frame * np.sign(np.diag(signs))
    triangle = np.linalg.qr(vectors.T, mode="r")
    return np.asarray((frame @ triangle).T)
