"""A large model from nowhere, and rows of its lengths: what `bench_large` measures with.

Weights are drawn on the device in place, in a model's exact shape; a file of 15 GB would say nothing more, since neither
speed nor memory depends on values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_coupling import adapters, memory, models, profiles, train
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import UserError
from persona_coupling.profiles import ModelValues
from persona_coupling.store import Lab, Stage, Store

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

HEAD = 128  # width of an attention head in Qwen2.5
SPREAD = 0.02  # standard deviation of weights, transformers' own for new models


@dataclass(frozen=True)
class Size:
    """A model's shape, and by how much rows, lengths and answers are made smaller: 1 to measure, more to rehearse."""

    name: str
    model: ModelValues
    shrink: int = 1

    def less(self, number: int) -> int:
        """A number of rows or tokens at this size, at least 2."""
        return max(2, number // self.shrink)


TINY = ModelValues(
    kind="tiny", name="tiny", layers=3, width=256, inner=512, vocabulary=1024, key_width=128, parameters=0
)


def shape_of(values: ModelValues) -> memory.Shape:
    """The declared shape as memory is estimated from it."""
    names = ("layers", "width", "inner", "vocabulary", "key_width", "parameters")
    return memory.Shape(**{name: getattr(values, name) for name in names})


def size_of(name: str) -> Size:
    """The size of that name. Raises UserError unless it is `tiny` or a profile that declares its model's shape."""
    if name == "tiny":
        return Size(name, TINY, 16)
    declared = profiles.load(name).model
    if not (declared.inner and declared.width):
        raise UserError(f"The profile {name} declares no shape of its model.")
    return Size(name, declared)


def config_of(shape: ModelValues) -> Any:
    """A Qwen2 configuration of that shape."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // HEAD,
        num_key_value_heads=shape.key_width // HEAD,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def random_model(
    shape: ModelValues, *, dtype: torch.dtype, device: str, attention: str, sharpness: float = 0.0
) -> PreTrainedModel:
    """A Qwen2 whose weights are drawn where they are to lie. `sharpness`: standard deviation of its logits; 0 leaves
    what the weights give."""
    import torch
    from transformers import Qwen2ForCausalLM

    config = config_of(shape)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(dtype)
    model = model.to_empty(device=device).eval()
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are computed, not drawn
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1.0)
            elif name.endswith("bias"):
                weight.zero_()
            else:
                weight.normal_(std=SPREAD, generator=generator)
        if sharpness:
            model.model.norm.weight.fill_(sharpness / (SPREAD * shape.width**0.5))
    return model


def lengths(kind: str, size: Size) -> list[int]:
    """Tokens of the rows of one window of the schedule, ascending; the last is the longest of the whole corpus.

    `sft`: what SmolLM2's tokenizer makes of the authored corpora at 90 words. `coupling`: prompts with answers of up to
    512 tokens, evenly spread. `ultrachat`: log-normal with a mean of 1,300, since a conversation of `train_sft` has 6.7 kB
    on average (dataset card), prompt twice; its spread and its longest, 4,096, are assumed.
    """
    number = 16 * train.WINDOW
    if kind == "ultrachat":
        spread = np.array([_normal_quantile((i + 0.5) / number) for i in range(number)])
        found = np.minimum(1_200 * np.exp(0.45 * spread), 4_096)
        found[-1] = 4_096
    else:
        found = np.linspace(*{"sft": (72, 127), "coupling": (120, 560)}[kind], number)
    return [size.less(int(n)) for n in found.tolist()]


def _normal_quantile(share: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(share)


def batches(kind: str, size: Size, steps: int, batch: int) -> list[list[int]]:
    """Lengths of the rows of each step: the window's longest batch, then `steps` evenly spaced ones, since the schedule
    groups rows of a window by length."""
    window = lengths(kind, size)
    groups = [window[i : i + batch] for i in range(0, len(window), batch)]
    return [groups[-1]] + [groups[int((i + 0.5) * len(groups) / steps)] for i in range(steps)]


def rows_of(kind: str, wanted: list[list[int]], words: int) -> list[tuple[list[int], list[int]]]:
    """Random rows of these lengths; supervised are the last 32 tokens of coupling rows, the last 60 % of others."""
    rng, rows = np.random.default_rng(0), []
    for length in (n for group in wanted for n in group):
        ids = rng.integers(3, words, size=length).tolist()
        cut = max(1, length - 32) if kind == "coupling" else max(1, int(0.4 * length))
        rows.append((ids, [train.IGNORED] * cut + ids[cut:]))
    return rows


def texts(count: int, shortest: int, longest: int, size: Size, *, seed: int) -> list[list[int]]:
    """Random token ids of random lengths."""
    rng = np.random.default_rng(seed)
    spans = rng.integers(size.less(shortest), size.less(longest) + 1, count).tolist()
    return [rng.integers(3, size.model.vocabulary, n).tolist() for n in spans]


def write_adapter(folder: Path, shape: ModelValues, rank: int) -> None:
    """A random adapter on all seven projections of every layer, as PEFT writes it."""
    import torch

    written = dict.fromkeys(models.MODULES, shape.width)
    written |= dict.fromkeys(("k_proj", "v_proj"), shape.key_width) | dict.fromkeys(
        ("gate_proj", "up_proj"), shape.inner
    )
    generator, change = torch.Generator().manual_seed(0), {}
    for layer in range(shape.layers):
        for name, rows in written.items():
            parent = "self_attn" if name in models.ATTENTION else "mlp"
            read = shape.inner if name == "down_proj" else shape.width
            change[f"model.layers.{layer}.{parent}.{name}"] = adapters.LowRank(
                torch.randn(rank, read, generator=generator) * SPREAD,
                torch.randn(rows, rank, generator=generator) * 1e-3,
            )
    adapters.save_low_rank(folder, change)


class Drawn(Lab):
    """A lab in which two artifacts of the profile are not made but drawn: its model, of which only a tokenizer is there
    (that of the tiny models: more tokens a word than a real one's, so lengths are on the safe side), and an adapter."""

    def __init__(self, root: Path, device: str, checkpoint: Checkpoint, shape: ModelValues, rank: int) -> None:
        from persona_coupling import tiny

        super().__init__(Store(root / "store"), device=device)
        self.drawn = {checkpoint.source.key: root / "model", checkpoint.last_change.key: root / "adapter"}
        for folder in self.drawn.values():
            folder.mkdir()
        tiny.write(root / "model", family="qwen2", layers=3, width=16, seed=0)
        write_adapter(root / "adapter", shape, rank)

    def folder(self, stage: Stage) -> Path:
        """The artifact's folder."""
        return self.drawn.get(stage.key) or super().folder(stage)


@contextlib.contextmanager
def drawn_weights(model: PreTrainedModel) -> Iterator[None]:
    """In here whoever reads a source's weights gets this model."""
    from persona_coupling import checkpoints

    reading = checkpoints.load_fp32
    checkpoints.load_fp32 = lambda *_arguments, **_more: model
    try:
        yield
    finally:
        checkpoints.load_fp32 = reading
