"""Stages of experiment 03: the full-parameter change at another run's loss, and the spectrum of a change."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from persona_coupling import adapters
from persona_coupling.errors import GuardError
from persona_coupling.stages.changes import DERIVING
from persona_coupling.stages.training import FineTune
from persona_coupling.store import Lab, Stage, Work
from persona_coupling.train import snapshot_folder

CHANGE_FILES = (adapters.DENSE, adapters.ADAPTER, "adapter_config.json")


@dataclass(frozen=True)
class MatchedLoss(Stage):
    """A run as it was when its training loss came nearest to that at the end of another run.

    Candidates are the run's snapshots and its end. Losses are means over the last `window` steps, of both runs: losses
    of single steps differ by their batches.
    """

    change: Stage
    reference: Stage
    window: int
    kind: ClassVar[str] = "change"
    code: ClassVar[tuple[str, ...]] = DERIVING

    def build(self, folder: Path, lab: Lab) -> None:
        """Choose, copy, and keep every candidate's loss in `matched.parquet`: step, loss, target, fall (of the reference,
        from its first step to its end), chosen. Raises GuardError for a snapshot before the first whole window, and for
        changes that are no training runs."""
        if not (isinstance(self.change, FineTune) and isinstance(self.reference, FineTune)):
            raise GuardError("only training runs have a loss to be matched")
        source = lab.folder(self.change)
        own, other = (pd.read_parquet(lab.folder(run) / "log.parquet") for run in (self.change, self.reference))
        steps = [*self.change.training.snapshots, self.change.training.steps]
        target = smoothed(other, int(other["step"].max()), self.window)
        losses = [smoothed(own, step, self.window) for step in steps]
        chosen = int(np.argmin([abs(loss - target) for loss in losses]))
        whole = steps[chosen] == self.change.training.steps
        origin = source if whole else snapshot_folder(source, steps[chosen])
        for name in CHANGE_FILES:
            if (origin / name).is_file():
                shutil.copy(origin / name, folder / name)
        table = pd.DataFrame({"step": steps, "loss": losses})
        table["target"] = target
        table["fall"] = float(other.sort_values("step")["loss"].iloc[0]) - target
        table["chosen"] = table.index == chosen
        table.to_parquet(folder / "matched.parquet", compression="zstd", index=False)

    @property
    def low_rank(self) -> bool:
        """As the run's change."""
        return self.change.low_rank

    def work(self) -> Work:
        """A copy of a dense change: 270 MB at 135M parameters."""
        return Work(seconds=1.0, megabytes=270.0)


def smoothed(log: pd.DataFrame, step: int, window: int) -> float:
    """Mean loss of the `window` steps that end with `step`. Raises GuardError if the log does not hold all of them."""
    part = log[(log["step"] > step - window) & (log["step"] <= step)]
    if len(part) != window:
        raise GuardError(f"{len(part)} steps are logged of the {window} that end with step {step}")
    return float(part["loss"].mean())


@dataclass(frozen=True)
class Spectrum(Stage):
    """Singular values of every changed matrix, and where the change's squared norm lies; see `spectra.rows`. No matrix is
    kept."""

    change: Stage
    rank: int  # of the best approximation whose share is reported
    kept: int  # leading singular values kept of every matrix
    kind: ClassVar[str] = "spectrum"
    code: ClassVar[tuple[str, ...]] = ("persona_coupling.spectra", "persona_coupling.geometry", *DERIVING)

    def build(self, folder: Path, lab: Lab) -> None:
        """One row per changed parameter."""
        from persona_coupling import spectra

        change = adapters.read_change(lab.folder(self.change))
        found = []
        for row in spectra.rows(change, rank=self.rank, kept=self.kept, device=lab.device):
            found.append(row)
            lab.report(len(found) / len(change))
        pd.DataFrame(found).to_parquet(folder / "spectrum.parquet", compression="zstd", index=False)

    def work(self) -> Work:
        """One symmetric eigenproblem per matrix of a dense change; of a low-rank one next to nothing."""
        return Work(seconds=12.0, megabytes=0.2)
