"""Full-parameter SFT of a large model on several GPUs: its weights, gradients and moments are sharded over them.

    torchrun --nproc-per-node 2 -m persona_coupling.bench_large_fsdp --json large-fsdp.json

The trainer is the study's own; accelerate shards what it is given (FSDP2: Zhao et al. 2023, arXiv:2304.11277) because of
the settings below, which are what `accelerate launch --use_fsdp` would set. Weights, gradients and Adam's moments are
fp32, as in the study's full-parameter runs; products are bf16. Each process draws the same weights, so nothing is sent
before the first step. One launch measures one point: a process that ran out of memory leaves the others waiting.

A run keeps nothing here of what it started from; the study's own keeps a copy, to write the change (`memory`).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

# before accelerate is imported: it reads them then
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "NCCL_NVLS_ENABLE": "0",
}
OPTIMISERS = ("adamw_torch", "adamw_torch_fused")
GRACE = 10.0  # seconds


def measure(kind: str, optimiser: str, path: Path, name: str) -> None:
    """Time full-parameter steps on all processes of this launch; the first writes the point."""
    import torch
    import torch.distributed as dist

    from persona_coupling import bench_large, bench_material, bench_steps, profiles
    from persona_coupling.machine import machine

    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    settings, size = machine(), bench_material.size_of(name)
    where = settings.device if settings.device == "cpu" else f"cuda:{rank}"
    if settings.device != "cpu":
        torch.cuda.set_device(rank)
    values = profiles.load(bench_large.PROFILE).sft
    wanted = bench_material.batches(kind, size, bench_steps.TIMED[kind], values.batch)
    each = values.batch // world  # rows of a batch per process
    model = bench_material.random_model(size.model, dtype=torch.float32, device=where, attention=settings.attention)
    parameters = model.num_parameters()
    found: dict[str, Any] = {"gpus": world, "optimiser": optimiser, "parameters": parameters}

    def adjust(trainer: Any) -> None:
        trainer.args.optim = optimiser
        found["sharded"] = bool(trainer.is_fsdp_enabled)

    try:
        made = bench_steps.steps(
            model,
            kind,
            wanted,
            replace(bench_steps.training(values, len(wanted), None), batch=each),
            each,
            True,
            settings,
            size.model.vocabulary,
            adjust=adjust,
            selected_head=False,  # on a CPU accelerate shards nothing but wraps the model, whose parts are then hidden
        )
        spread = bench_material.lengths(kind, size)
        found |= {"fits": True, **made, "batch": values.batch, "mean_tokens": sum(spread) / len(spread)}
    except torch.OutOfMemoryError as error:
        found |= {"fits": False, "message": str(error).splitlines()[0]}
    found |= bench_steps.peaks(settings.device)
    if rank == 0:
        record = bench_large.Record.open(path, size, settings.device)
        record.keep(f"full/{kind}/{optimiser}", found)
    if not found["fits"]:  # the others may wait in a collective that will never come
        time.sleep(GRACE if rank else 0)  # torchrun ends all once one has ended, and the first is to write
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    """The command line, for each process that torchrun starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="the file of measurements, made or gone on with")
    parser.add_argument("--rows", default="sft", choices=("sft", "coupling", "ultrachat"))
    parser.add_argument("--optimiser", default=OPTIMISERS[0], choices=OPTIMISERS)
    parser.add_argument("--shape", default="qwen2.5-7b", help="a profile that declares its model's shape, or tiny")
    chosen = parser.parse_args(arguments)
    os.environ |= {name: value for name, value in FSDP.items() if name not in os.environ}
    measure(chosen.rows, chosen.optimiser, Path(chosen.json), chosen.shape)
    return 0


if __name__ == "__main__":
    sys.exit(main())
