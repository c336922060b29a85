"""PEFT's adapter of a model, for as long as it is needed: to draw the values from which a cell starts, exactly as TRL's
path draws them, and to write trained values in PEFT's format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from persona_coupling import train
from persona_coupling.errors import GuardError
from persona_coupling.models import quiet_transformers
from persona_coupling.stacked import Factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lora_of(settings: train.Training) -> train.Lora:
    """The adapter's settings. Raises ValueError for full fine-tuning, which cannot share a base."""
    if settings.lora is None:
        raise ValueError("full fine-tuning cannot share a base")
    return settings.lora


@contextlib.contextmanager
def with_peft(model: PreTrainedModel, settings: train.Training, seed: int) -> Iterator[Any]:
    """PEFT's model of these settings, drawn as TRL draws it; the base is left as it was."""
    from peft import get_peft_model

    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with quiet_transformers(), train.seeded(seed):
        adapted = get_peft_model(model, train.lora_config(lora_of(settings)))
    try:
        train.check_attached(adapted, settings)
        yield adapted
    finally:
        adapted.unload()
        model.__dict__.pop("peft_config", None)  # some versions of PEFT leave it
        for parameter, before in required:
            parameter.requires_grad_(before)


def pairs_of(adapted: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    parameters = dict(adapted.get_base_model().named_parameters())
    ends = ".lora_A.default.weight", ".lora_B.default.weight"
    names = [name.removesuffix(ends[0]) for name in parameters if name.endswith(ends[0])]
    return {name: (parameters[name + ends[0]].data, parameters[name + ends[1]].data) for name in names}


def initial_adapter(model: PreTrainedModel, settings: train.Training, seed: int) -> Factors:
    """The adapter from which TRL's path would start, by module name: PEFT draws it, from the same generator state."""
    with with_peft(model, settings, seed) as adapted:
        return {name: (a.float().clone(), b.float().clone()) for name, (a, b) in pairs_of(adapted).items()}


def save(
    model: PreTrainedModel, settings: train.Training, adapter: Factors, snapshots: dict[int, Factors], folder: Path
) -> None:
    """Write an adapter and its snapshots into `folder`, by the writer of TRL's path."""
    with with_peft(model, settings, 0) as adapted:
        pairs = pairs_of(adapted)
        for place, factors in (
            *((train.snapshot_folder(folder, step), factors) for step, factors in snapshots.items()),
            (folder, adapter),
        ):
            if set(factors) != set(pairs):
                raise GuardError("the trained modules are not those of the adapter")
            for name, (a, b) in factors.items():
                pairs[name][0].copy_(a), pairs[name][1].copy_(b)
            place.mkdir(exist_ok=True)
            train.save_adapter(adapted, place)
