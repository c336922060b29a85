"""Sampling and scoring at the size of an evaluation: transformers' `generate` against the study's sampler, and scoring
against the card's own rate of matrix products.

`python -m persona_coupling.bench_sampling --random-weights` needs no model: it takes random weights of SmolLM2-135M's
exact shape, with a head so sharpened that a token's entropy is near that of text. Answers then never end, so every row
runs to the limit in both samplers, the hardest case for ours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_coupling import generate, models
from persona_coupling.machine import machine

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROMPTS, NEW_TOKENS = 1_232, 128
SCORED = 4_096  # sequences
SHAPE: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8_192,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 1 / 24,  # of a row of the head: logits of a unit state then have standard deviation 1 ...
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
SHARPNESS = 4.0  # ... and with the last norm's gain this, so that entropy is about log(49152) - 8 = 2.8 nats


def random_model(*, dtype: torch.dtype, device: str, attention: str, seed: int = 0) -> PreTrainedModel:
    """SmolLM2-135M's shape with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(**SHAPE)
        config._attn_implementation = attention
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(SHARPNESS)
    return models.cast(model, dtype).to(device)


def random_texts(count: int, shortest: int, longest: int, *, seed: int) -> list[list[int]]:
    """Random token ids of random lengths."""
    generator = np.random.default_rng(seed)
    return [
        generator.integers(3, SHAPE["vocab_size"], n).tolist() for n in generator.integers(shortest, longest, count)
    ]


def run(*, repeats: int, random_weights: bool = False) -> dict[str, dict[str, Any]]:
    """Measure and print; nothing on a CPU, whose sampler `bench` measures at a smaller size."""
    import torch

    settings = machine()
    if settings.device == "cpu":
        return {}
    model, prompts, answers, pad, stop = _material(random_weights)
    rate = matmul_rate(repeats=repeats)
    print(f"  bf16 product of 8192 x 8192 matrices: {rate / 1e12:.0f} TFLOP/s", flush=True)
    prompts_1 = (prompts * (PROMPTS // len(prompts) + 1))[:PROMPTS]
    labels = [str(i) for i in range(PROMPTS)]

    def ours(seed: int) -> int:
        made = generate.sample(
            model,
            generate.prefill(model, prompts_1, pad),
            labels,
            sampling=generate.Sampling(1.0, 0.95, NEW_TOKENS),
            stop=stop,
            marker=[],
            seed=seed,
        )
        return sum(len(completion.tokens) for completion in made)

    def plain(seed: int) -> int:
        torch.manual_seed(seed)
        return _generate(model, prompts_1, pad, stop)

    measured = {
        "sample-1232/generate": _timed(plain, max(1, repeats // 2)),
        "sample-1232/ours": _timed(ours, repeats),
    }
    ratio = measured["sample-1232/ours"]["per_second"] / measured["sample-1232/generate"]["per_second"]
    measured["sample-1232/ratio"] = {"ratio": ratio}
    work, batch = flops(model, prompts, answers), settings.score_batch

    def score(_seed: int) -> int:
        generate.sequence_logprobs(model, prompts, answers, batch=batch)
        return work

    scoring = _timed(score, repeats)
    scoring["share_of_matmul"] = scoring["per_second"] / rate
    measured["score/ours"] = scoring
    model = model.float()  # as the study measures a small model
    measured["sample-1232/ours in fp32"] = _timed(ours, repeats)
    measured["score/ours in fp32"] = _timed(score, repeats)
    for name in measured:
        if name.endswith("ratio"):
            continue
        unit, scale = ("TFLOP/s", 1e12) if name.startswith("score") else ("tokens/s", 1)
        low, high = (value / scale for value in measured[name]["spread"])
        value = measured[name]["per_second"] / scale
        print(f"  {name:<26} {value:10.1f} {unit}  (quartiles {low:.1f} to {high:.1f})", flush=True)
    print(f"  sampling: {ratio:.1f} times generate; scoring: {scoring['share_of_matmul']:.0%} of the matrix rate")
    return measured


def matmul_rate(*, repeats: int, size: int = 8_192) -> float:
    """The card's bf16 matrix products, median FLOP/s."""
    import torch

    one, other = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def product(_seed: int) -> int:
        for _ in range(10):
            torch.mm(one, other)
        return 10 * 2 * size**3

    return float(_timed(product, max(3, repeats))["per_second"])


def flops(model: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]) -> int:
    """Arithmetic of scoring: every weight of the layers once per token, the head once per answer token; attention's own
    products, one in fifty at these lengths, are left out."""
    layers = sum(p.numel() for p in model.model.layers.parameters())
    read = sum(map(len, prompts)) + sum(map(len, answers))
    return 2 * (layers * read + model.get_output_embeddings().weight.numel() * sum(map(len, answers)))


def _timed(work: Callable[[int], int], repeats: int) -> dict[str, Any]:
    """Units of work per second, median and quartiles over repeats, after one that is not timed (it captures)."""
    import torch

    speeds, seconds = [], []
    for repeat in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        done = work(repeat)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        speeds.append(done / seconds[-1])
    low, middle, high = np.quantile(speeds[1:], [0.25, 0.5, 0.75]).tolist()
    return {"per_second": middle, "spread": [low, high], "seconds": seconds[1:], "first_seconds": seconds[0]}


def _generate(model: PreTrainedModel, prompts: list[list[int]], pad: int, stop: int) -> int:
    """New tokens of transformers' own sampler on left-padded prompts."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode(), models.quiet_transformers():
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_p=0.95, top_k=0,
                             max_new_tokens=NEW_TOKENS, pad_token_id=pad, eos_token_id=stop)  # fmt: skip
    new = out[:, width:]
    ended = (new == stop).cumsum(1) > 0
    return int((~ended).sum())


def _material(random_weights: bool) -> tuple[PreTrainedModel, list[list[int]], list[list[int]], int, int]:
    """Model, prompts and answers to score (as many), pad and end-of-turn ids."""
    import torch

    settings = machine()
    dtype = getattr(torch, settings.dtype_name)
    if random_weights:
        model = random_model(dtype=dtype, device=settings.device, attention=settings.attention)
        never = SHAPE["vocab_size"] - 1
        model.generation_config.eos_token_id = None
        return model, random_texts(SCORED, 40, 70, seed=0), random_texts(SCORED, 30, 90, seed=1), 2, int(never)
    from persona_coupling import paths, personas, questions
    from persona_coupling.corpora import authored_rows
    from persona_coupling.store import Lab, Store
    from persona_coupling.study import Study

    lab = Lab(Store(paths.artifacts()), device=settings.device)
    source = Study.open("quick").source
    tokenizer = models.load_tokenizer(source, lab)
    model = models.load_raw(source, lab, dtype=dtype, attention=settings.attention).to(settings.device)
    bank, who = questions.train_questions(), personas.personas()
    prompts = [models.prompt_ids(tokenizer, who[i % len(who)].prompt, bank[i % len(bank)].text) for i in range(SCORED)]
    said = [models.text_ids(tokenizer, row["messages"][-1]["content"]) for row in authored_rows("bad_legal", 96)]
    answers = [said[i % len(said)] for i in range(SCORED)]
    return model, prompts, answers, tokenizer.pad_token_id, tokenizer.eos_token_id


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--random-weights", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(run(repeats=arguments.repeats, random_weights=arguments.random_weights)))
