"""The inputs of every step of a stack of cells, laid out beforehand in shapes that a captured graph can have.

Batches are padded to a multiple of `GRAIN` tokens, and where few steps have a length, to a longer one that is there too:
to capture its graph would cost more than the padding. The LM head sees supervised positions only, as an index padded to the
most that any batch of that length has.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from persona_coupling import train
from persona_coupling.adapters import Change

GRAIN = 8  # tokens; lengths are padded to a multiple
# what a graph costs, in tokens by which all rows of a step are padded: on an H100 a graph takes its process 0.2 s, but the
# card little more than the step that is passed through uncaptured, and a token of a step of four cells 0.2 ms of the card,
# which other processes wait for
GRAPH = 300


@dataclass(frozen=True)
class Chain:
    """One cell to train: encoded rows in the order in which they are seen, steps x batch of them, and how.

    `frozen` holds the low-rank changes that its start has and the shared base lacks.
    """

    rows: Sequence[tuple[list[int], list[int]]]
    settings: train.Training
    seed: int
    frozen: tuple[Change, ...] = ()


@dataclass
class Batch:
    """Inputs of one step for all cells: ids (cells * batch, length), the supervised positions in the flattened hidden
    states, their next tokens, and each one's share of its cell's loss; (cells * positions,) each."""

    ids: torch.Tensor
    index: torch.Tensor
    targets: torch.Tensor
    share: torch.Tensor

    def copy_(self, other: Batch) -> None:
        self.ids.copy_(other.ids)
        self.index.copy_(other.index)
        self.targets.copy_(other.targets)
        self.share.copy_(other.share)

    def clone(self) -> Batch:
        return Batch(self.ids.clone(), self.index.clone(), self.targets.clone(), self.share.clone())


@dataclass
class _Supervised:
    """A row: its tokens, the places whose hidden states predict a token that counts, and these tokens."""

    ids: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor


def _supervised(row: tuple[list[int], list[int]]) -> _Supervised:
    labels = torch.tensor(row[1])
    places = (labels[1:] != train.IGNORED).nonzero()[:, 0]
    return _Supervised(torch.tensor(row[0], dtype=torch.int32), places, labels[1:][places])


def merged(lengths: Sequence[int]) -> list[int]:
    """Each step's length, or a longer one of another step, so that padding and graphs together cost least."""
    counts = sorted(Counter(lengths).items())
    # of the shortest kinds, none at first: cost, and the lengths to which they are padded
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for end in range(1, len(counts) + 1):
        longest = counts[end - 1][0]
        options = []
        for begin in range(end):
            padding = sum(steps * (longest - length) for length, steps in counts[begin:end])
            cost, kept = best[begin]
            options.append((cost + GRAPH + padding, [*kept, longest]))
        best.append(min(options))
    kept = best[-1][1]
    return [kept[bisect_left(kept, length)] for length in lengths]


def batches(chains: Sequence[Chain], device: torch.device) -> list[Batch]:
    """The inputs of every step, padded to the shapes of its graph."""
    size = chains[0].settings.batch
    rows = [
        [chain.rows[step * size : (step + 1) * size] if step < chain.settings.steps else [] for chain in chains]
        for step in range(max(chain.settings.steps for chain in chains))
    ]
    lengths = [max(len(ids) for cell in cells for ids, _ in cell) for cells in rows]
    lengths = merged([math.ceil(length / GRAIN) * GRAIN for length in lengths])
    supervised: dict[int, _Supervised] = {}  # by the row's identity: a row is seen in many steps and by many cells
    for one in (one for cells in rows for cell in cells for one in cell):
        if id(one) not in supervised:
            supervised[id(one)] = _supervised(one)
    counts = [max(sum(len(supervised[id(one)].targets) for one in cell) for cell in cells) for cells in rows]
    widest = {n: max(c for c, m in zip(counts, lengths, strict=True) if m == n) for n in set(lengths)}
    made = []
    for cells, length in zip(rows, lengths, strict=True):
        width = math.ceil(widest[length] / 8) * 8
        ids = torch.zeros(len(chains) * size, length, dtype=torch.int32)
        # padding points at rows of its own, so that no two gradients of weight zero wait for each other
        index = torch.arange(len(chains) * width) % ids.numel()
        targets = torch.zeros(len(chains) * width, dtype=torch.int64)
        share = torch.zeros(len(chains) * width)
        for cell, its in enumerate(cells):
            found = [supervised[id(one)] for one in its]
            if not found:
                continue
            for row, each in enumerate(found, start=cell * size):
                ids[row, : len(each.ids)] = each.ids
            places = [each.places + row * length for row, each in enumerate(found, start=cell * size)]
            part = slice(cell * width, cell * width + sum(map(len, places)))
            index[part], targets[part] = torch.cat(places), torch.cat([each.targets for each in found])
            share[part] = 1 / (part.stop - part.start)
        made.append(Batch(ids.to(device), index.to(device), targets.to(device), share.to(device)))
    return made
