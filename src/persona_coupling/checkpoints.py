"""Models as descriptions: a source with changes of weights merged into it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_coupling import adapters, machine, models
from persona_coupling.store import Lab, Stage
from persona_coupling.train import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Merged:
    """A change of weights as merged into a checkpoint: restricted to layers and modules (None: all), scaled."""

    change: Stage
    layers: tuple[int, ...] | None = None
    modules: tuple[str, ...] | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Checkpoint:
    """A model: a source with changes merged into it, in order. Nothing is computed until a stage needs its weights."""

    source: Stage
    merged: tuple[Merged, ...] = ()

    def merge(
        self,
        change: Stage,
        *,
        layers: Iterable[int] | None = None,
        modules: Iterable[str] | None = None,
        scale: float = 1.0,
    ) -> Checkpoint:
        """This checkpoint with a change added."""
        added = Merged(
            change,
            None if layers is None else tuple(layers),
            None if modules is None else tuple(modules),
            scale,
        )
        return Checkpoint(self.source, (*self.merged, added))

    def fine_tune(self, rows: Stage, training: Training, *, seed: int) -> Checkpoint:
        """This checkpoint after training on rows: the change, merged."""
        from persona_coupling.stages import FineTune  # a stage holds checkpoints, so it is defined after them

        return self.merge(FineTune(self, rows, training, seed))

    @property
    def last_change(self) -> Stage:
        """The most recent change: an adapter that can be merged elsewhere."""
        if not self.merged:
            raise ValueError("the raw model has no change to take")
        return self.merged[-1].change

    def beside(self, lab: Lab, base: Checkpoint) -> tuple[adapters.Change, ...]:
        """The changes that this checkpoint has and `base` lacks, as merged here."""
        return tuple(
            adapters.restrict(adapters.read_change(lab.folder(m.change)), m.layers, m.modules, m.scale)
            for m in self.merged
            if m not in base.merged
        )

    def load(self, lab: Lab) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Weights merged in fp32, then cast to the machine's format, on its device."""
        import torch

        settings = machine.machine(lab.device)
        tokenizer = models.load_tokenizer(self.source, lab)
        model = models.load_raw(self.source, lab, dtype=torch.float32, attention=settings.attention)
        for merged in self.merged:
            change = adapters.read_change(lab.folder(merged.change))
            adapters.add(model, adapters.restrict(change, merged.layers, merged.modules, merged.scale))
        return model.to(dtype=getattr(torch, settings.dtype_name)).to(settings.device), tokenizer
