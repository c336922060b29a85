"""Where and how to compute: device, number formats, batch sizes. The one place for what must not change a result's key."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from persona_coupling.errors import UserError

SMALL = 1_000_000_000  # parameters of what counts as a small model
CPU_WORKERS, WORKER_BYTES = 4, 5e9  # at most so many, with room for a small model's full fine-tuning in each
# gigabytes of a GPU that a 135M model takes at most: a stack, each cell of it, a cell that is trained alone, a process that
# samples and each answer of those it samples at once, one that does neither, and any for its CUDA context. Guesses, of
# which most are measured, on one H100 in a run of `full`: a stack of four 11 GB where its cells have 100 steps, 15 for 250
# and 20 for 750 of longer texts, a cell alone 8 to 11, 1,232 answers 11.7, most others 0.6 to 6; a context's is the rest of
# the 81 GB that were in use when a sampler found the card full. See `room`, which learns the needs of each kind
STACK_GB, CELL_GB, TRAINER_GB, SAMPLER_GB, ROW_GB, WORKER_GB, CONTEXT_GB = 1.5, 4.0, 11.0, 2.5, 0.0075, 3.0, 1.0
STACKS = 2  # trained side by side: two thirds of a small stack's time is its host's


@dataclass(frozen=True)
class Machine:
    """Compute settings of a device. Results agree across them up to rounding, which `merge` measures."""

    device: str
    bf16: bool  # products, and the base weights of LoRA, in bf16 (adapters stay fp32); else fp32 throughout
    attention: str
    sample_batch: int  # prompts that are decoded together
    score_batch: int  # sequences per scoring forward
    train_tokens: int  # upper bound of padded tokens per micro-batch; more accumulates gradients
    workers: int = 1  # processes that build stages of small models side by side
    score_tokens: int = 4_096  # upper bound of padded tokens per scoring forward
    stack: int = 1  # small-model cells trained together on one base (`captured`); 1: TRL, each alone
    stacks: int = 1  # of such groups at a time
    samplers: int = 0  # of the workers, those that sample answers; 0: all of them
    trainers: int = 0  # likewise those that train a cell alone
    gigabytes: float = 0.0  # of a GPU that they share; 0: without bound
    exact: bool = False  # small models are measured, and trained alone, in fp32 all the same

    @property
    def dtype_name(self) -> str:
        """The base weights' format."""
        return "bfloat16" if self.bf16 else "float32"

    def of(self, parameters: int) -> Machine:
        """The settings for measuring a model of that size, and for training it alone. Rounding merged weights to bf16
        takes back part of a small change (up to 0.09 nats of held-out loss after full fine-tuning), and for a small model
        an H100 waits for launches, not for products. See `products` for their precision."""
        return replace(self, bf16=False) if self.exact and parameters < SMALL else self


@cache
def cpu_has_fast_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware (AMX or AVX-512 BF16). Without it bf16 training is
    some 25 times slower than fp32."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            flags = next((line for line in handle if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


@contextmanager
def products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """fp32 matrix products on CUDA in here: with all bits, or with factors of 11 significant bits (TF32; bf16 has 8) on the
    tensor cores, several times as fast. What TF32 costs is part of every merge check."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


_tuned: dict[str, Any] = {}


@contextmanager
def tuned(**changes: Any) -> Iterator[None]:
    """In here, and in this process alone, `machine` gives settings with these changes: what was measured to be best for a
    large model, which `machine` cannot know."""
    before = dict(_tuned)
    _tuned.update(changes)
    try:
        yield
    finally:
        _tuned.clear()
        _tuned.update(before)


def machine(device: str | None = None) -> Machine:
    """The settings for a device (default: CUDA if present, else CPU). Raises UserError for a device that is not there."""
    return replace(_usual(device), **_tuned)


def _usual(device: str | None) -> Machine:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError("No CUDA device is visible. Run on the CPU, or install a driver and a CUDA build of torch.")
        gigabytes = torch.cuda.get_device_properties(device).total_memory / 2**30
        large = gigabytes > 30
        # a step of many answers costs the card little more than one of few, and few processes then keep it busy
        batch = min(1_232, int(16 * gigabytes)) if large else 96
        stack = max(1, min(8, int(gigabytes / (19 if large else 5))))
        samplers, trainers = max(1, int(gigabytes / 35)), max(1, int(gigabytes / 70))
        others = max(2, min(6, int(gigabytes / 13)))
        workers = min(STACKS + trainers + samplers + others, os.cpu_count() or 1) if gigabytes > 35 else 1
        scored = 16_384
        train = 16_384 if large else 4_096
        made = Machine(device, True, "sdpa", batch, 1_024, train, workers, scored, stack, STACKS, exact=True)
        return replace(made, samplers=samplers, trainers=trainers, gigabytes=gigabytes) if workers > 1 else made
    # eager attention: SDPA's CPU backward costs 15 % of a step
    return Machine("cpu", cpu_has_fast_bf16(), "eager", 128, 32, 4_096, _cpu_workers())


def _cpu_workers() -> int:
    """Processes that share the cores of a machine without a GPU: small batches keep no two of them busy. It hangs on what
    the machine has and not on what is free just now, since sums of one thread and of two differ in rounding: a run that was
    cut off goes on as it began."""
    from persona_coupling import memory

    return max(1, int(min(os.cpu_count() or 1, CPU_WORKERS, memory.installed() / WORKER_BYTES)))
