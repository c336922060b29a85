"""Models as descriptions: a source with changes of weights merged into it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_coupling import adapters, machine, models
from persona_coupling.store import Lab, Stage
from persona_coupling.train import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from persona_coupling import adapters


@dataclass(frozen=True)
class Merged:
    """A change of weights as merged into a checkpoint: restricted to layers (numbers, or `early`, `mid`, `late`) and
    modules (None: all), scaled."""

    change: Stage
    layers: tuple[int | str, ...] | None = None
    modules: tuple[str, ...] | None = None
    scale: float = 1.0

    def read(self, lab: Lab, depth: int) -> adapters.Change:
        """The change as it is added to a model of `depth` layers."""
        from persona_coupling import adapters

        change = adapters.read_change(lab.folder(self.change))
        return adapters.restrict(change, self.layers, self.modules, self.scale, depth=depth)


@dataclass(frozen=True)
class Checkpoint:
    """A model: a source with changes merged into it, in order. Nothing is computed until a stage needs its weights."""

    source: Stage
    merged: tuple[Merged, ...] = ()

    def merge(
        self,
        change: Stage,
        *,
        layers: Iterable[int | str] | None = None,
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

    def beside(self, lab: Lab, base: Checkpoint, depth: int) -> tuple[adapters.Change, ...]:
        """The changes that this checkpoint has and `base` lacks, as merged here into a model of `depth` layers."""
        return tuple(merged.read(lab, depth) for merged in self.merged if merged not in base.merged)

    def load(self, lab: Lab) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Weights merged in fp32 on the machine's device, then cast to the format in which it measures such a model."""
        import torch

        settings = machine.machine(lab.device)
        if settings.exact:  # for this process: what is loaded here is measured in TF32, see `machine.products`
            torch.set_float32_matmul_precision("high")
        tokenizer = models.load_tokenizer(self.source, lab)
        model = load_fp32(self.source, lab, device=settings.device, attention=settings.attention)
        for merged in self.merged:
            adapters.add(model, merged.read(lab, model.config.num_hidden_layers))
        return models.cast(model, getattr(torch, settings.of(model.num_parameters()).dtype_name)), tokenizer


KEPT = 2  # small sources in memory at a time


def load_fp32(source: Stage, lab: Lab, *, device: str, attention: str) -> PreTrainedModel:
    """A copy of the source's model in fp32 on the device, the caller's to change. A small source is read once per
    process; a large one each time, since its copy would take the memory that the model needs."""
    folder = models.files(source, lab)
    key = (source.key, str(folder), device, attention)
    with _keeping:
        model = _kept.pop(key, None)
        if model is None:
            import torch

            model = models.load_raw(source, lab, dtype=torch.float32, attention=attention).to(device)
            if sum(p.numel() for p in model.parameters()) >= machine.SMALL:
                return model
        _kept[key] = model  # last: the most recently used
        while len(_kept) > KEPT:
            del _kept[next(iter(_kept))]
        return copy.deepcopy(model)


_kept: dict[tuple[str, str, str, str], PreTrainedModel] = {}
_keeping = threading.Lock()
