"""Training speed of many cells on one CUDA device: TRL, one captured cell, and stacks of cells, in one run.

Milliseconds per cell and optimiser step, median and quartiles over steps; a step that captures a graph is not counted,
and what a stack needs besides its steps (drawing adapters, capturing) is listed apart. Weights are random, in the exact
shape of SmolLM2-135M: speed does not depend on their values, and no model needs to be there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_coupling import batches, captured, models, train
from persona_coupling.machine import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8_192,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
BATCH = 16
SIZES = (1, 2, 4, 8, 16)


def random_model(shape: dict[str, Any], device: str, *, bf16: bool) -> PreTrainedModel:
    """A Llama with random weights and a normalised head, in the base format of training."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))
    return models.cast(model, torch.bfloat16 if bf16 else torch.float32).to(device).eval()


def random_rows(count: int, words: int, *, shortest: int = 64, longest: int = 160) -> list[tuple[list[int], list[int]]]:
    """Encoded rows of 112 tokens on average, the last 60 % of each supervised."""
    rng = np.random.default_rng(0)
    rows = []
    for length in rng.integers(shortest, longest + 1, size=count).tolist():
        ids = rng.integers(3, words, size=length).tolist()
        cut = int(0.4 * length)
        rows.append((ids, [train.IGNORED] * cut + ids[cut:]))
    return rows


def chain(rows: list[tuple[list[int], list[int]]], steps: int, seed: int, *, dropout: float) -> batches.Chain:
    """A cell with the study's adapter; all cells see the rows in one order, as cells of one experiment and seed do."""
    lora = train.Lora(32, 64, dropout, models.MODULES)
    settings = train.Training(steps, BATCH, 1e-4, 0.03, 0.01, "completion", 32, lora)
    order = train.schedule(len(rows), lambda row: len(rows[row][0]), steps=steps, batch=BATCH, seed=0)
    return batches.Chain([rows[i] for i in order], settings, seed)


def plain_tokenizer() -> Any:
    """A tokenizer of three words: TRL wants one, and rows are encoded already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<unk>": 0, "<pad>": 1, "<eos>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def clock(device: str, stamps: list[float]) -> Any:
    """A callback of a trainer that notes when each step has ended, the device's work included."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_arguments: Any, **_more: Any) -> None:
            if device != "cpu":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    return Clock()


def trl(model: PreTrainedModel, cell: batches.Chain, machine: Machine) -> tuple[Any, list[float]]:
    """TRL's trained model and its milliseconds per step."""
    assert cell.settings.lora is not None
    stamps: list[float] = []
    with models.quiet_transformers(), tempfile.TemporaryDirectory() as scratch, train.seeded(cell.seed):
        trainer = train.make_trainer(
            model,
            plain_tokenizer(),
            [{"input_ids": ids, "labels": labels} for ids, labels in cell.rows],
            cell.settings,
            train.lora_config(cell.settings.lora),
            seed=cell.seed,
            machine=machine,
            scratch=scratch,
            report=lambda _fraction: None,
        )
        trainer.add_callback(clock(machine.device, stamps))
        trainer.train()
    return trainer, (1000 * np.diff(stamps)).tolist()


def stack(
    model: PreTrainedModel, cells: list[batches.Chain], machine: Machine, *, capture: bool | None = None
) -> tuple[list[captured.Trained], dict[str, Any]]:
    """The trained cells, and milliseconds per cell-step with seconds of preparation."""
    import torch

    stamps = [time.perf_counter()]

    def clock(_fraction: float) -> None:
        if machine.device != "cpu":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    if machine.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    trained = captured.train_together(model, cells, machine, clock, capture=capture)
    seen: set[int] = set()
    kept = []
    for step, seconds in enumerate(np.diff(stamps).tolist()):
        rows = cells[0].rows[step * BATCH : (step + 1) * BATCH]
        length = -(-max(len(ids) for ids, _ in rows) // batches.GRAIN)
        if length in seen and step + 1 < len(stamps) - 1:  # after the last step the adapters are read back
            kept.append(1000 * seconds / len(cells))
        seen.add(length)
    whole = stamps[-1] - stamps[0]
    rest = whole - sum(kept) * len(cells) / 1000
    peak = torch.cuda.max_memory_allocated() / 2**30 if machine.device != "cpu" else 0.0
    return trained, {**summary(kept), "preparation_seconds": rest, "graphs": len(seen), "peak_gib": peak}


def summary(milliseconds: list[float]) -> dict[str, Any]:
    """Median, quartiles and mean."""
    low, middle, high = np.quantile(milliseconds, [0.25, 0.5, 0.75]).tolist()
    return {
        "median": middle,
        "quartiles": [low, high],
        "mean": float(np.mean(milliseconds)),
        "steps": len(milliseconds),
    }


def run(*, steps: int, sizes: tuple[int, ...] = SIZES, dropout: float = 0.05) -> dict[str, Any]:
    """Measure and print; returns milliseconds per cell-step of every variant."""
    from persona_coupling import provenance
    from persona_coupling.machine import machine

    settings = machine()
    print(f"{provenance.device_name(settings.device)}; SmolLM2-135M's shape, LoRA r 32, batch {BATCH}", flush=True)
    rows = random_rows(8 * BATCH, SHAPE["vocab_size"])
    results: dict[str, Any] = {}
    milliseconds = trl(
        random_model(SHAPE, settings.device, bf16=settings.bf16), chain(rows, 9, 0, dropout=dropout), settings
    )[1]
    results["trl"] = summary(milliseconds)
    _line("TRL SFTTrainer, no checkpointing", results["trl"], results["trl"]["mean"])
    model = random_model(SHAPE, settings.device, bf16=settings.bf16)
    for size in sizes:
        cells = [chain(rows, steps, seed, dropout=dropout) for seed in range(size)]
        results[f"stack {size}"] = stack(model, cells, settings)[1]
        _line(f"captured, {size} cells", results[f"stack {size}"], results["trl"]["mean"])
    return results


def _line(title: str, measured: dict[str, Any], reference: float) -> None:
    low, high = measured["quartiles"]
    rest = ""
    if "graphs" in measured:
        rest = f"; {measured['preparation_seconds']:.1f} s besides, {measured['peak_gib']:.0f} GiB"
    print(
        f"  {title:<34} {measured['median']:8.2f} ms per cell-step (quartiles {low:.2f} to {high:.2f}, mean "
        f"{measured['mean']:.2f}): {reference / measured['mean']:6.1f} times TRL{rest}",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=32, help="steps per stack; 8 batches are one window of lengths")
    parser.add_argument("--json", default="", help="write the numbers here")
    arguments = parser.parse_args()
    measured = run(steps=arguments.steps)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as handle:
            json.dump(measured, handle, indent=1)
    sys.exit(0)
