"""The stage that compares the subspaces of two changes, matrix by matrix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from persona_coupling import adapters, models, overlap
from persona_coupling.adapters import LowRank
from persona_coupling.errors import GuardError
from persona_coupling.store import Lab, Stage, Work


@dataclass(frozen=True)
class Overlap(Stage):
    """Of every matrix that two low-rank changes share: how much of `change` lies in the subspaces of `adapter`.

    `overlap.parquet`: one row per matrix and side, and as many with Gaussian changes of the same shape in `change`'s
    place (`draw` counts them; -1 is the change itself). `shares.parquet`: one row per matrix with norms. The column
    `question` holds the layer: matrices of one layer share their inputs and are no independent units.
    """

    change: Stage
    adapter: Stage
    draws: int
    seed: int
    kind: ClassVar[str] = "overlap"
    code: ClassVar[tuple[str, ...]] = (
        "persona_coupling.overlap",
        "persona_coupling.geometry",
        "persona_coupling.adapters",
        "persona_coupling.models",
    )

    def build(self, folder: Path, lab: Lab) -> None:
        """Compare. Raises GuardError for dense changes, and when the two share no matrix."""
        change, adapter = (adapters.read_change(lab.folder(stage)) for stage in (self.change, self.adapter))
        shared = sorted(set(change) & set(adapter))
        if not shared:
            raise GuardError("the two changes share no matrix: there are no subspaces to compare")
        rng = np.random.default_rng(self.seed)
        sides: list[dict[str, Any]] = []
        shares: list[dict[str, Any]] = []
        for number, name in enumerate(shared):
            lab.report(number / len(shared))
            layer = models.layer_of(f"{name}.")
            where = {"question": f"layer {layer}", "layer": layer, "module": name.rsplit(".", 1)[-1]}
            ours, theirs = factors(name, change[name]), factors(name, adapter[name])
            shares.append({**where, **overlap.bookkeeping(ours, theirs)})
            for draw in range(-1, self.draws):
                compared = ours if draw < 0 else overlap.drawn_like(ours, rng)
                for side in overlap.SIDES:
                    sides.append({**where, "draw": draw, **overlap.side_by_side(compared, theirs, side)})
        for stem, rows in (("overlap", sides), ("shares", shares)):
            pd.DataFrame(rows).to_parquet(folder / f"{stem}.parquet", compression="zstd", index=False)

    def work(self) -> Work:
        """Two small decompositions per matrix, side and draw."""
        return Work(seconds=1.0 + 0.8 * (1 + self.draws))


def factors(name: str, part: Any) -> overlap.Factors:
    """A low-rank change of one weight as arrays, in double precision. Raises GuardError for a dense one."""
    if not isinstance(part, LowRank):
        raise GuardError(f"{name}: a dense change has no low-rank subspaces")
    return overlap.Factors(part.a.double().numpy(), part.b.double().numpy())
