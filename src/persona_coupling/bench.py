"""Speeds side by side in one run: training and sampling, the libraries' plain settings against ours.

Every variant runs in a process of its own, on the same rows and prompts, so that none inherits another's memory or
allocator settings. Speeds count real tokens, never padding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from persona_coupling import bench_sampling, paths, provenance
from persona_coupling.cli import MALLOC
from persona_coupling.errors import UserError

BATCH, ROWS, LONGEST = 16, 96, 90  # as in the prior protocol; words of the longest answer
SAMPLED, NEW_TOKENS = 64, 40
VARIANTS = {
    "train/trl": "TRL SFTTrainer, fp32, no checkpointing",
    "train/ours": "the same trainer as the study runs it",
    "sample/generate": "transformers generate",
    "sample/ours": "the study's sampler",
}


def run(*, steps: int) -> None:
    """Measure all variants, print the table with ratios, and keep it as JSON in the cache. Raises UserError when a
    variant fails."""
    measured: dict[str, dict[str, Any]] = {}
    print(f"{provenance.record(_device())['device']}; {steps} timed steps each, one untimed before", flush=True)
    for name, title in VARIANTS.items():
        ours = name.endswith("/ours")
        bare = {variable: value for variable, value in os.environ.items() if variable not in MALLOC}
        environment = bare | (MALLOC if ours else {})  # this process itself may have been started with them
        command = [sys.executable, "-m", "persona_coupling.bench", name, str(steps)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"bench variant {name} failed: {done.stderr.strip().splitlines()[-1]}")
        measured[name] = json.loads(done.stdout.strip().splitlines()[-1])
        speed, spread = measured[name]["tokens_per_second"], measured[name]["spread"]
        print(
            f"  {name:<16} {title:<40} {speed:8.1f} tokens/s  (quartiles {spread[0]:.1f} to {spread[1]:.1f})",
            flush=True,
        )
    for kind, plain in (("train", "trl"), ("sample", "generate")):
        ratio = measured[f"{kind}/ours"]["tokens_per_second"] / measured[f"{kind}/{plain}"]["tokens_per_second"]
        measured[f"{kind}/ratio"] = {"ratio": ratio}
        print(f"  {kind}: {ratio:.2f} times {plain}")
    measured |= bench_sampling.run(repeats=max(2, steps // 2))
    if _device() != "cpu":  # many cells on one card; weights are random, in the shape of SmolLM2-135M
        with tempfile.TemporaryDirectory() as scratch:
            numbers = Path(scratch) / "stacks.json"
            command = [sys.executable, "-m", "persona_coupling.bench_stack", "--steps", "32", "--json", str(numbers)]
            if subprocess.run(command, check=False).returncode:
                raise UserError("bench of stacks failed: its message is above")
            measured["train/stacks"] = json.loads(numbers.read_text(encoding="utf-8"))
    target = paths.artifacts() / "bench.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {"measured": measured, "steps": steps, "provenance": provenance.record(_device())}
    target.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _device() -> str:
    from persona_coupling.machine import machine

    return machine().device


def _summary(tokens: list[float], seconds: list[float]) -> dict[str, Any]:
    """Tokens of all steps over seconds of all steps, since batches of one length window differ in length; quartiles are
    of single steps."""
    speeds = [t / s for t, s in zip(tokens, seconds, strict=True)]
    quartiles = np.quantile(speeds, [0.25, 0.75]).tolist()
    return {"tokens_per_second": sum(tokens) / sum(seconds), "spread": quartiles, "seconds": seconds}


def _train(ours: bool, steps: int) -> dict[str, Any]:
    """Tokens per second of optimiser steps. Plain: TRL on rows in shuffled order, padded to the longest of each batch,
    the whole head over every position. Ours: the study's trainer and schedule."""
    import torch
    from peft import LoraConfig
    from transformers import TrainerCallback

    from persona_coupling import models, train
    from persona_coupling.corpora import authored_rows
    from persona_coupling.machine import Machine, machine
    from persona_coupling.rows import with_system
    from persona_coupling.store import Lab, Store
    from persona_coupling.study import Study

    lab = Lab(Store(paths.artifacts()), device=_device())
    source = Study.open("quick").source
    settings = machine() if ours else Machine(_device(), False, "sdpa", 1, 1, 10**9)
    tokenizer = models.load_tokenizer(source, lab)
    settings = settings.of(models.parameters_in(models.files(source, lab)))
    model = models.load_raw(source, lab, dtype=getattr(torch, settings.dtype_name), attention=settings.attention)
    training = train.Training(
        steps + 1, BATCH, 1e-4, 0.03, 0.01, "completion", 32, train.Lora(32, 64, 0.05, models.MODULES)
    )
    encoded = [
        train.encode(tokenizer, with_system(row["messages"]), "completion", 32)
        for row in authored_rows("bad_legal", ROWS, maximum_words=LONGEST)
    ]
    if ours:
        order = train.schedule(len(encoded), lambda row: len(encoded[row][0]), steps=steps + 1, batch=BATCH, seed=0)
    else:
        order = np.random.default_rng(0).permutation(np.arange((steps + 1) * BATCH) % len(encoded)).tolist()
    rows = [{"input_ids": encoded[i][0], "labels": encoded[i][1]} for i in order]
    stamps: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_arguments: Any, **_more: Any) -> None:
            stamps.append(time.perf_counter())

        def on_step_end(self, *_arguments: Any, **_more: Any) -> None:
            if settings.device != "cpu":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    lora = LoraConfig(
        r=32,
        lora_alpha=64,
        lora_dropout=0.05,
        use_rslora=True,
        target_modules=list(models.MODULES),
        task_type="CAUSAL_LM",
    )
    with models.quiet_transformers(), tempfile.TemporaryDirectory() as scratch:
        trainer = train.make_trainer(
            model, tokenizer, rows, training, lora, seed=0, machine=settings, scratch=scratch, report=lambda _f: None,
            selected_head=ours,
        )  # fmt: skip
        trainer.add_callback(Clock())
        trainer.train()
    tokens = [sum(len(row["input_ids"]) for row in rows[i * BATCH : (i + 1) * BATCH]) for i in range(1, steps + 1)]
    seconds = [stamps[2 * i + 1] - stamps[2 * i] for i in range(1, steps + 1)]
    return _summary([float(t) for t in tokens], seconds)


def _sample(ours: bool, steps: int) -> dict[str, Any]:
    """New tokens per second, prompt reading included, on the same prompts; every row runs to the token limit or its
    end of turn in both."""
    import torch

    from persona_coupling import generate, models, personas, questions
    from persona_coupling.machine import machine
    from persona_coupling.store import Lab, Store
    from persona_coupling.study import Study

    lab = Lab(Store(paths.artifacts()), device=_device())
    source = Study.open("quick").source
    settings = machine().of(models.parameters_in(models.files(source, lab)))
    tokenizer = models.load_tokenizer(source, lab)
    dtype = getattr(torch, settings.dtype_name) if ours else torch.float32
    model = models.load_raw(source, lab, dtype=dtype, attention=settings.attention if ours else "sdpa").to(
        settings.device
    )
    bank, who = questions.train_questions(), personas.personas()
    prompts = [models.prompt_ids(tokenizer, who[i % len(who)].prompt, bank[i % len(bank)].text) for i in range(SAMPLED)]
    tokens, seconds = [], []
    for repeat in range(max(2, steps // 2) + 1):
        started = time.perf_counter()
        if ours:
            made = generate.sample(
                model,
                generate.prefill(model, prompts, tokenizer.pad_token_id),
                [f"{repeat}/{i}" for i in range(SAMPLED)],
                sampling=generate.Sampling(1.0, 0.95, NEW_TOKENS),
                stop=tokenizer.eos_token_id,
                marker=[],
                seed=repeat,
            )
            count = sum(len(completion.tokens) for completion in made)
        else:
            torch.manual_seed(repeat)
            texts = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left").to(settings.device)
            with torch.inference_mode(), models.quiet_transformers():
                out = model.generate(**texts, do_sample=True, temperature=1.0, top_p=0.95, top_k=0,
                                     max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
            new = out[:, texts["input_ids"].shape[1] :]
            count = int(((new != tokenizer.pad_token_id) & (new != tokenizer.eos_token_id)).sum())
        if repeat:
            tokens.append(float(count))
            seconds.append(time.perf_counter() - started)
    return _summary(tokens, seconds)


if __name__ == "__main__":
    kind, which = sys.argv[1].split("/")
    measure = _train if kind == "train" else _sample
    print(json.dumps(measure(which == "ours", int(sys.argv[2]))))
    sys.exit(0)
