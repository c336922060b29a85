"""Timed steps of the study's trainer on a drawn model, with the micro-batch and the checkpointing asked for."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_coupling import memory, models, train
from persona_coupling.bench_material import rows_of
from persona_coupling.errors import UserError
from persona_coupling.machine import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIMED = {"sft": 3, "coupling": 3, "ultrachat": 2}  # steps, behind one that is not


@contextlib.contextmanager
def checkpointing(wanted: bool) -> Iterator[None]:
    """In here the trainer computes layers again, or does not, whatever memory it expects to need."""
    deciding = memory.checkpoints
    memory.checkpoints = lambda *_arguments, **_more: wanted
    try:
        yield
    finally:
        memory.checkpoints = deciding


def peaks(device: str) -> dict[str, int]:
    """The largest memory so far, in bytes, of a GPU; nothing is said of a CPU's."""
    import torch

    if device == "cpu":
        return {}
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


def training(values: Any, count: int, lora: train.Lora | None) -> train.Training:
    """A profile's training values over that many steps."""
    return train.Training(
        count, values.batch, values.learning_rate, values.warmup, values.weight_decay, values.loss, values.tail, lora
    )


def steps(
    model: PreTrainedModel,
    kind: str,
    wanted: list[list[int]],
    settings: train.Training,
    micro: int,
    again: bool,
    where: Machine,
    words: int,
    *,
    adjust: Callable[[Any], None] = lambda _trainer: None,
    selected_head: bool = True,
) -> dict[str, Any]:
    """Seconds of each step but the first, with its tokens, of the study's own trainer; `micro` rows at once, `again`:
    layers are computed again in the backward pass. `adjust` may change the trainer before it starts."""
    from persona_coupling.bench_stack import clock, plain_tokenizer

    stamps: list[float] = []
    longest = max(n for group in wanted for n in group)
    rows = rows_of(kind, wanted, words)
    started = time.perf_counter()
    with models.quiet_transformers(), tempfile.TemporaryDirectory() as scratch, train.seeded(0), checkpointing(again):
        trainer = train.make_trainer(
            model,
            plain_tokenizer(),
            [{"input_ids": ids, "labels": labels} for ids, labels in rows],
            settings,
            None if settings.lora is None else train.lora_config(settings.lora),
            seed=0,
            machine=replace(where, train_tokens=micro * longest),
            scratch=scratch,
            report=lambda _fraction: None,
            selected_head=selected_head,
        )
        if trainer.args.per_device_train_batch_size != micro or trainer.args.gradient_checkpointing != again:
            raise UserError(f"The trainer takes {trainer.args.per_device_train_batch_size} rows at once, not {micro}.")
        adjust(trainer)
        trainer.add_callback(clock(where.device, stamps))
        trainer.train()
    return {
        "seconds": np.diff(stamps).tolist(),
        "tokens": [sum(group) for group in wanted[1:]],
        "start_seconds": stamps[0] - started,
        "batch": settings.batch,
        "micro": micro,
        "again": again,
        "longest": longest,
        "supervised": settings.loss,
    }
