"""The stage that trains: rows and a checkpoint in, a change of weights out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd

from persona_coupling import machine
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.rows import read_rows, with_system
from persona_coupling.stages.code import MODEL, SAYING, TEXT, TOKENS_PER_ROW
from persona_coupling.store import Lab, Stage, Work
from persona_coupling.train import Training


@dataclass(frozen=True)
class FineTune(Stage):
    """Train a checkpoint on rows; the artifact is the change of weights and the log of every step."""

    start: Checkpoint
    rows: Stage
    training: Training
    seed: int
    kind: ClassVar[str] = "change"
    code: ClassVar[tuple[str, ...]] = ("persona_coupling.train", "persona_coupling.dropout", *MODEL, *SAYING)
    material: ClassVar[tuple[str, ...]] = TEXT

    def build(self, folder: Path, lab: Lab) -> None:
        """Load, train, save. Rows without a system message get the plain assistant's."""
        import torch

        from persona_coupling import train

        conversations = [with_system(row["messages"]) for row in read_rows(self.rows, lab)]
        settings = machine.machine(lab.device)
        model, tokenizer = self.start.load(lab)
        if self.training.lora is None:  # full fine-tuning updates fp32 master weights
            model = model.to(torch.float32)
        log = train.fine_tune(
            model,
            tokenizer,
            conversations,
            self.training,
            seed=self.seed,
            machine=settings,
            folder=folder,
            report=lab.report,
        )
        pd.DataFrame(log).to_parquet(folder / "log.parquet", compression="zstd", index=False)

    def work(self) -> Work:
        """All steps' tokens; an adapter of rank 32 is about 40 MB at 135M parameters."""
        lora = self.training.lora
        megabytes = 270.0 if lora is None else 1.3 * lora.rank
        return Work(
            trained=self.training.steps * self.training.batch * TOKENS_PER_ROW, seconds=6.0, megabytes=megabytes
        )
