"""Tables of how SFT moved the personas' states, and of what an adapter makes of that: made of arrays, no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from numpy import ndarray

from persona_coupling import adapters, geometry, models, personas, representations
from persona_coupling.adapters import LowRank
from persona_coupling.errors import GuardError
from persona_coupling.personas import SOURCE
from persona_coupling.residual import POSITIONS, SITES, layer_numbers

ALL_LAYERS = 0  # in the table `reading`: sums over all layers


def shift_table(before: ndarray, after: ndarray, bank: Sequence[str]) -> pd.DataFrame:
    """See `stages.Shift`."""
    source = [p.id for p in personas.personas()].index(SOURCE)
    tables = []
    for position, layer, one, other in _by_layer(before, after):
        found = representations.shift_pseudovalues(one, other, source)
        keys = {"position": position, "layer": layer, "question": bank}
        tables.append(pd.DataFrame({**keys, **dict(zip(representations.SHIFTS, found.T, strict=True))}))
    return pd.concat(tables, ignore_index=True)


def plane_table(before: ndarray, after: ndarray, fractions: Sequence[float]) -> pd.DataFrame:
    """See `stages.Shift`."""
    names = [p.id for p in personas.personas()]
    wanted = layer_numbers(fractions, before.shape[3] - 1)
    tables = []
    for position, layer, one, other in _by_layer(before, after):
        for view, own in (("together", False), ("own", True)):
            if layer in wanted:
                start, end = representations.planes(one.mean(axis=1), other.mean(axis=1), own=own)
                columns = dict(zip(("x", "y", "x_after", "y_after"), (*start.T, *end.T), strict=True))
                keys = {"position": position, "layer": layer, "view": view, "persona": names}
                tables.append(pd.DataFrame({**keys, **columns}))
    return pd.concat(tables, ignore_index=True)


def probe_table(
    before: ndarray, after: ndarray, bank: Sequence[str], number: int, ridge: float, seed: int
) -> pd.DataFrame:
    """See `stages.Shift`."""
    names = [p.id for p in personas.personas()]
    fold, rng = representations.folds(len(bank), number), np.random.default_rng(seed)
    true = np.repeat(np.arange(len(names)), len(bank)).reshape(len(names), len(bank))
    tables = []
    for position, layer, one, other in _by_layer(before, after):
        shuffled = representations.permuted_labels(len(names), len(bank), rng)
        raw, tuned = map(representations.among_personas, (one, other))
        hits = {
            "raw": representations.probe(raw, raw, true, fold, ridge=ridge),
            "tuned": representations.probe(tuned, tuned, true, fold, ridge=ridge),
            "transfer": representations.probe(one, other, true, fold, ridge=ridge),
            "transfer_centred": representations.probe(raw, tuned, true, fold, ridge=ridge),
            "permuted": representations.probe(raw, raw, shuffled, fold, ridge=ridge),
        }
        keys = {
            "position": position,
            "layer": layer,
            "persona": np.repeat(names, len(bank)),
            "question": list(bank) * len(names),
        }
        tables.append(pd.DataFrame({**keys, **{name: hit.ravel() for name, hit in hits.items()}}))
    return pd.concat(tables, ignore_index=True)


def _by_layer(before: ndarray, after: ndarray) -> Iterator[tuple[str, int, ndarray, ndarray]]:
    """Position, layer from 1 and the states (personas, questions, width) of two models; embeddings, in which the
    personas do not differ, are left out."""
    for at, position in enumerate(POSITIONS):
        for layer in range(1, before.shape[3]):
            one, other = (states[:, :, at, layer].astype(np.float64) for states in (before, after))
            yield position, layer, one, other


def reading_tables(
    before: ndarray, after: ndarray, bank: Sequence[str], change: adapters.Change, draws: int, seed: int
) -> dict[str, pd.DataFrame]:
    """The tables `reading` and `chance`; see `stages.Shift`."""
    depth = before.shape[3]
    rng = np.random.default_rng(seed)
    sums: dict[
        str, list[ndarray]
    ] = {}  # per layer (positions, questions + 1): all questions, then without each of them
    random: dict[str, list[ndarray]] = {}  # per layer (positions, draws)
    for layer in range(depth):
        one, other = (
            np.stack(
                [np.concatenate([whole[None], without]) for whole, without in map(representations.leave_one_out, s)]
            )
            for s in (before[:, :, :, layer].astype(np.float64), after[:, :, :, layer].astype(np.float64))
        )  # (groups, questions + 1, positions, sites, width)
        shift, persona, persona_after = other[0] - one[0], one[0] - one[1], other[0] - other[1]
        found: dict[str, ndarray] = {}
        for name, forms in (("response", responses(change, layer)), ("inside", row_spaces(change, layer))):
            for kind, vector in (("shift", shift), ("persona", persona)):
                found[f"{name}_{kind}"] = representations.energy(vector, vector, forms)
                found[f"{name}_{kind}_chance"] = representations.chance_energy(vector, forms)
            drawn = representations.random_like(shift[0], draws, rng)
            random.setdefault(name, []).append(representations.energy(drawn, drawn, forms).sum(-1).T)
            random.setdefault(f"{name}_chance", []).append(representations.chance_energy(drawn, forms).sum(-1).T)
            if name == "response":
                found["kept"] = representations.energy(persona, persona_after, forms)
                found["kept_of"] = representations.energy(persona, persona, forms)
        found["kept_any"], found["kept_any_of"] = (persona * persona_after).sum(-1), (persona**2).sum(-1)
        for name, values in found.items():
            sums.setdefault(name, []).append(values.sum(-1).T)
    stacked = {name: _with_total(np.stack(values)) for name, values in sums.items()}
    random_sums = {name: np.sum(values, axis=0) for name, values in random.items()}  # over layers
    ratios = {n: stacked[n] / stacked[f"{n}_chance"] for n in stacked if f"{n}_chance" in stacked}
    ratios |= {n: stacked[n] / stacked[f"{n}_of"] for n in ("kept", "kept_any")}
    per_question = {
        n: representations.pseudovalues(r[..., 0], np.moveaxis(r[..., 1:], -1, 0)) for n, r in ratios.items()
    }
    reading, drawn_rows = [], []
    for layer in range(ALL_LAYERS, depth + 1):
        for at, position in enumerate(POSITIONS):
            keys = {"position": position, "layer": layer}
            found = {name: values[:, layer, at] for name, values in per_question.items()}
            reading.append(pd.DataFrame({**keys, "question": bank, **found}))
    for at, position in enumerate(POSITIONS):
        found = {n: (random_sums[n] / random_sums[f"{n}_chance"])[at] for n in ("response", "inside")}
        drawn_rows.append(pd.DataFrame({"position": position, "draw": range(draws), **found}))
    return {
        "reading": pd.concat(reading, ignore_index=True),
        "chance": pd.concat(drawn_rows, ignore_index=True),
    }


def _with_total(layers: ndarray) -> ndarray:
    """The sum over layers before the layers themselves."""
    return np.concatenate([layers.sum(axis=0, keepdims=True), layers])


def _factors(change: adapters.Change, layer: int) -> list[list[LowRank]]:
    """The adapter's factors at one layer (from 0) per site. Raises GuardError where one is absent or not low-rank."""
    sites = []
    for modules in SITES:
        parts = [
            part
            for module in modules
            for name, part in change.items()
            if name.endswith(f".{module}") and models.layer_of(name) == layer
        ]
        low_rank = [part for part in parts if isinstance(part, LowRank)]
        if len(low_rank) != len(modules):
            raise GuardError(f"the adapter does not change all of {', '.join(modules)} in layer {layer} at low rank")
        sites.append(low_rank)
    return sites


def responses(change: adapters.Change, layer: int) -> ndarray:
    """The sum of A'B'BA over the modules of each site, (sites, width, width): an adapter's squared answer as a form."""
    made = []
    for parts in _factors(change, layer):
        pairs = [(part.a.double().numpy(), part.b.double().numpy()) for part in parts]
        made.append(sum(a.T @ (b.T @ b) @ a for a, b in pairs))
    return np.stack(made)


def row_spaces(change: adapters.Change, layer: int) -> ndarray:
    """The projector on the joint row space of the A's of each site, (sites, width, width)."""
    made = []
    for parts in _factors(change, layer):
        basis = geometry.basis(np.concatenate([part.a.double().numpy() for part in parts]).T)
        made.append(basis @ basis.T)
    return np.stack(made)
