"""The stage that trains: rows and a checkpoint in, a change of weights out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from persona_coupling import machine, models
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError, UserError
from persona_coupling.rows import read_rows, with_system
from persona_coupling.stages.code import FAST, MODEL, SAYING, TEXT, TOKENS_PER_ROW
from persona_coupling.store import Lab, Stage, Work
from persona_coupling.train import Encoded, Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class FineTune(Stage):
    """Train a checkpoint on rows; the artifact is the change of weights and the log of every step."""

    start: Checkpoint
    rows: Stage
    training: Training
    seed: int
    kind: ClassVar[str] = "change"
    code: ClassVar[tuple[str, ...]] = ("persona_coupling.train", "persona_coupling.train_cpu", *FAST, *MODEL, *SAYING)
    material: ClassVar[tuple[str, ...]] = TEXT

    def build(self, folder: Path, lab: Lab) -> dict[str, Any]:
        """Load, train, save. Rows without a system message get the plain assistant's."""
        if machine.machine(lab.device).stack > 1 and self.stack_key() is not None:
            return _raised(self.build_together([self], [folder], lab))
        if machine.machine(lab.device).stack > 1 and self.training.lora is not None:
            return self.on_merged(folder, lab)
        return self.by_trl(folder, lab)

    def on_merged(self, folder: Path, lab: Lab) -> dict[str, Any]:
        """`build` of an adapter through `captured`, alone, on the merged start in fp32; through TRL where the machine would
        round what was merged, or the model does not suit."""
        from persona_coupling import captured

        model, tokenizer = self.start.load(lab)
        settings = machine.machine(lab.device).of(model.num_parameters())
        if settings.bf16 or not captured.suits(model):
            return self.by_trl(folder, lab, loaded=(model, tokenizer))
        return _raised(_write([self], [folder], [()], model, tokenizer, settings, lab, how=" fp32"))

    def by_trl(self, folder: Path, lab: Lab, *, loaded: tuple[Any, Any] | None = None) -> dict[str, Any]:
        """`build` through TRL's trainer, on the merged start; `loaded` is that start with its tokenizer, where it is at
        hand."""
        import torch

        from persona_coupling import train

        model, tokenizer = loaded or self.start.load(lab)
        settings = machine.machine(lab.device).of(model.num_parameters())
        if self.training.lora is None:  # full fine-tuning updates fp32 master weights
            model = models.cast(model, torch.float32)
        log = train.fine_tune(
            model,
            tokenizer,
            self.conversations(lab),
            self.training,
            seed=self.seed,
            machine=settings,
            folder=folder,
            report=lab.report,
        )
        pd.DataFrame(log).to_parquet(folder / "log.parquet", compression="zstd", index=False)
        return {"trainer": "trl"}

    def conversations(self, lab: Lab) -> list[list[dict[str, str]]]:
        """The rows' messages, every one with a system message."""
        return [with_system(row["messages"]) for row in read_rows(self.rows, lab)]

    @property
    def low_rank(self) -> bool:
        """What an adapter is."""
        return self.training.lora is not None

    def stack_key(self) -> Hashable:
        """Cells that share source, batch size and dropout can be trained on the source, what their starts add to it beside
        it. A dense change has no such form, and a base that is rounded to bf16 would undo part of it: on one, each cell is
        trained alone, on its merged start in fp32 (`on_merged`)."""
        lora = self.training.lora
        if lora is None or not all(merged.change.low_rank for merged in self.start.merged):
            return None
        return self.start.source.key, self.training.batch, lora.dropout

    @staticmethod
    def build_together(stages: list[FineTune], folders: list[Path], lab: Lab) -> list[dict[str, Any] | Exception]:
        """Train on the source. The low-rank changes of a start are added in the forward pass, unrounded, and not to the
        weights."""
        import torch

        from persona_coupling import captured

        settings, base = machine.machine(lab.device), Checkpoint(stages[0].start.source)
        model, tokenizer = base.load(lab)
        if not captured.suits(model):
            return [_attempt(stage.by_trl, folder, lab) for stage, folder in zip(stages, folders, strict=True)]
        model = models.cast(model, getattr(torch, settings.dtype_name))
        frozen = [stage.start.beside(lab, base, model.config.num_hidden_layers) for stage in stages]
        return _write(stages, folders, frozen, model, tokenizer, settings, lab)

    def work(self) -> Work:
        """All steps' tokens; an adapter of rank 32 is about 40 MB at 135M parameters."""
        lora = self.training.lora
        megabytes = 270.0 if lora is None else 1.3 * lora.rank
        return Work(
            trained=self.training.steps * self.training.batch * TOKENS_PER_ROW, seconds=6.0, megabytes=megabytes
        )


@dataclass(frozen=True)
class Twin(FineTune):
    """The same training once more under a description of its own: what differs between twins is the machine's noise."""

    code: ClassVar[tuple[str, ...]] = ("persona_coupling.stages.training", *FineTune.code)


def twin(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with every training of its chain run again from the source. Raises ValueError where the chain has
    changes that were not trained one upon the other."""
    whole, again = Checkpoint(checkpoint.source), Checkpoint(checkpoint.source)
    for merged in checkpoint.merged:
        change = merged.change
        if not isinstance(change, FineTune) or change.start != whole:
            raise ValueError(f"{change} was not trained on what stands before it")
        again = again.merge(Twin(again, change.rows, change.training, change.seed))
        whole = whole.merge(change)
    return again


FAILURES = (GuardError, UserError, OSError, RuntimeError, ValueError, KeyError)


def _raised(outcomes: list[dict[str, Any] | Exception]) -> dict[str, Any]:
    """The record of a stage that was built alone; its error is raised."""
    (outcome,) = outcomes
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _attempt(do: Callable[..., Any], *arguments: Any) -> Any:
    """What `do` returns, or the error it raises: a member's failure is not the stack's."""
    try:
        return do(*arguments)
    except FAILURES as error:
        return error


ENCODED = 16  # corpora whose encoded rows a process keeps, about 2 MB each
_kept: dict[tuple[PreTrainedTokenizerBase, str, str, int], Encoded] = {}


def _encoded(stage: FineTune, tokenizer: PreTrainedTokenizerBase, lab: Lab) -> Encoded:
    """A cell's rows, to be encoded when they are first asked for. Those of the last corpora are kept: cells of one stack and
    of the next share them, and a corpus takes longer to encode than a GPU takes to train on it."""
    key = (tokenizer, stage.rows.key, stage.training.loss, stage.training.tail)
    rows = _kept.pop(key, None)
    if rows is None:
        rows = Encoded(tokenizer, stage.conversations(lab), stage.training)
    _kept[key] = rows  # last: the most recently used
    while len(_kept) > ENCODED:
        del _kept[next(iter(_kept))]
    return rows


def _write(
    stages: Sequence[FineTune],
    folders: Sequence[Path],
    frozen: Sequence[tuple[Any, ...]],
    model: Any,
    tokenizer: Any,
    settings: machine.Machine,
    lab: Lab,
    *,
    how: str = "",
) -> list[dict[str, Any] | Exception]:
    """Train stages on one model through `captured` and write each into its folder; their records end in `how`."""
    from persona_coupling import batches, captured, drawn, train

    def chain(stage: FineTune, beside: tuple[Any, ...]) -> batches.Chain:
        rows = train.arranged(_encoded(stage, tokenizer, lab), stage.training, stage.seed)
        return batches.Chain(rows, stage.training, stage.seed, beside)

    def write(chained: batches.Chain, made: Any, folder: Path) -> dict[str, Any]:
        if isinstance(made, Exception):
            raise made
        trained, size = made
        drawer.save(chained.settings, trained.adapter, trained.snapshots, folder)
        pd.DataFrame(trained.log).to_parquet(folder / "log.parquet", compression="zstd", index=False)
        return {"trainer": f"captured x{size}{how}"}

    drawer = drawn.Drawer(model)
    outcomes = [_attempt(chain, stage, beside) for stage, beside in zip(stages, frozen, strict=True)]
    sound = []
    for i, outcome in enumerate(outcomes):
        if isinstance(outcome, batches.Chain) and captured.fits(outcome.rows, outcome.settings.batch, settings):
            sound.append(i)
        elif isinstance(outcome, batches.Chain):
            outcomes[i] = _attempt(stages[i].by_trl, folders[i], lab)
    for i, made in zip(
        sound, captured.train_each(model, [outcomes[i] for i in sound], settings, lab.report), strict=True
    ):
        outcomes[i] = _attempt(write, outcomes[i], made, folders[i])
    return outcomes
