"""Sampling and teacher forcing on one shared prefill.

Sampling is `generate` without what makes it slow here: prompts are read once and serve both the sampled answer and the
fixed one, finished rows leave the batch, and a token is drawn by inverse CDF from the nucleus instead of by
`torch.multinomial` over the vocabulary. Each row has its own stream of uniforms, keyed by seed and row label, so that a
row's answer does not depend on which rows share its batch (up to rounding).

When an answer ends, by itself or by the cut-off, the marker is forced behind it token by token: its log-probability at
the end of the model's own answer costs six more tokens instead of a second reading.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NUCLEUS_CANDIDATES = 512  # rows whose nucleus is wider are sorted in full; more candidates cost time on every step


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass
class Completion:
    """A sampled answer."""

    tokens: list[int] = field(default_factory=list)  # without the end-of-turn token
    finish: str = "length"  # "stop": the model ended its turn; "length": cut off
    marker_logprobs: list[float] = field(default_factory=list)  # of each forced (or just written) marker token, nats


def uniforms(seed: int, label: str, count: int) -> np.ndarray:
    """`count` uniforms in [0, 1) that depend on seed and label only."""
    entropy = int.from_bytes(hashlib.sha256(f"{seed}\0{label}".encode()).digest()[:16], "big")
    return np.random.default_rng(entropy).random(count)


@dataclass
class Prefill:
    """Prompts that have been read: key-value cache, attention mask (rows, length), logits of the next token."""

    cache: Any
    mask: torch.Tensor
    logits: torch.Tensor


def prefill(model: PreTrainedModel, prompts: list[list[int]], pad: int) -> Prefill:
    """Read left-padded prompts."""
    import torch
    from transformers import DynamicCache

    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return Prefill(cache, mask, out.logits[:, -1].float())


def continuation_logprobs(
    model: PreTrainedModel, read: Prefill, continuations: list[list[int]], tail: int
) -> np.ndarray:
    """Log-probability of each of the last `tail` tokens of each continuation, in nats, shape (rows, tail).

    The prefill is left as it was. Continuations must be longer than `tail`.
    """
    import torch

    width = max(map(len, continuations))
    device = model.device
    ids = torch.tensor([c + [0] * (width - len(c)) for c in continuations], device=device)
    mask = torch.tensor([[1] * len(c) + [0] * (width - len(c)) for c in continuations], device=device)
    start = read.mask.sum(1, keepdim=True)
    with torch.inference_mode():
        hidden = model.base_model(
            input_ids=ids,
            attention_mask=torch.cat([read.mask, mask], 1),
            position_ids=start + torch.arange(width, device=device),
            past_key_values=copy.deepcopy(read.cache),
            use_cache=True,
        ).last_hidden_state
        rows = torch.arange(len(continuations), device=device)[:, None]
        ends = mask.sum(1, keepdim=True)
        targets = ends - tail + torch.arange(tail, device=device)  # positions of the scored tokens
        logits = model.get_output_embeddings()(hidden[rows, targets - 1]).float()
        logprobs = logits.log_softmax(-1).gather(-1, ids[rows, targets][..., None])[..., 0]
    return np.asarray(logprobs.double().cpu().numpy())


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """One token per row from the nucleus of `logits` (rows, vocabulary), by inverse CDF at `uniform` (rows,).

    The nucleus is the smallest set of most probable tokens whose mass reaches `top_p` (Holtzman et al. 2020,
    arXiv:1904.09751), the token that crosses the threshold included.
    """
    import torch

    probabilities = (logits / sampling.temperature).softmax(-1)
    chosen = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    k = min(NUCLEUS_CANDIDATES, logits.shape[-1])
    top, tokens = probabilities.topk(k, dim=-1)
    narrow = top.double().sum(-1) >= sampling.top_p
    if k == logits.shape[-1]:
        narrow[:] = True
    for rows, values, ids in (
        (narrow, top[narrow], tokens[narrow]),
        (~narrow, *((probabilities[~narrow].sort(-1, descending=True)) if (~narrow).any() else (top[:0], tokens[:0]))),
    ):
        if not len(values):
            continue
        cumulative = values.double().cumsum(-1)
        size = (cumulative < sampling.top_p).sum(-1, keepdim=True).clamp(max=values.shape[-1] - 1)
        target = uniform[rows].double()[:, None] * cumulative.gather(-1, size)
        position = torch.searchsorted(cumulative, target, right=True).minimum(size)
        chosen[rows] = ids.gather(-1, position)[:, 0]
    return chosen


def sample(
    model: PreTrainedModel,
    read: Prefill,
    labels: list[str],
    *,
    sampling: Sampling,
    stop: int,
    marker: list[int],
    seed: int,
    report: Callable[[float], None] = lambda _fraction: None,
) -> list[Completion]:
    """Sample one answer per prefilled prompt; consumes the prefill. `stop` is the end-of-turn id, `marker` the token
    ids that are forced behind each answer (may be empty)."""
    import torch

    device = model.device
    table = torch.tensor(np.stack([uniforms(seed, label, sampling.max_new_tokens) for label in labels]), device=device)
    completions = [Completion() for _ in labels]
    logprobs: list[list[float]] = [[] for _ in labels]  # of sampled tokens, then reused for forced ones
    forced = [-1] * len(labels)  # how many marker tokens have been scored; -1: still answering
    rows = list(range(len(labels)))
    cache, mask, logits = read.cache, read.mask, read.logits
    marker_ids = torch.tensor(marker or [0], device=device)
    for step in range(sampling.max_new_tokens + len(marker)):
        report(step / (sampling.max_new_tokens + len(marker)))
        at = min(step, sampling.max_new_tokens - 1)
        tokens = draw(logits, table[rows, at], sampling)
        norm = logits.logsumexp(-1)
        token_logprobs = (logits.gather(-1, tokens[:, None])[:, 0] - norm).tolist()
        marker_logprobs = (logits[:, marker_ids] - norm[:, None]).tolist()
        following: list[int] = []  # the next input of each row; -1: done
        for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            completion = completions[row]
            if forced[row] < 0:
                if token == stop:
                    completion.finish = "stop"
                    if marker and completion.tokens[-len(marker) :] == marker:
                        completion.marker_logprobs = logprobs[row][-len(marker) :]
                        following.append(-1)
                        continue
                    forced[row] = 0
                else:
                    completion.tokens.append(token)
                    logprobs[row].append(token_logprobs[place])
                    if len(completion.tokens) == sampling.max_new_tokens:
                        if marker and completion.tokens[-len(marker) :] == marker:
                            completion.marker_logprobs = logprobs[row][-len(marker) :]
                            following.append(-1)
                            continue
                        forced[row] = 0
                        logprobs[row] = []
                        following.append(token if marker else -1)
                        continue
                    following.append(token)
                    continue
                logprobs[row] = []
            if forced[row] < len(marker):
                logprobs[row].append(marker_logprobs[place][forced[row]])
                following.append(marker[forced[row]])
                forced[row] += 1
            if forced[row] == len(marker):
                if marker:
                    completion.marker_logprobs = logprobs[row]
                    following[-1] = -1
                else:
                    following.append(-1)
        keep = [place for place, token in enumerate(following) if token >= 0]
        if not keep:
            break
        if len(keep) < len(rows):
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            mask = mask[index]
            rows = [rows[place] for place in keep]
        inputs = torch.tensor([[following[place]] for place in keep], device=device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        with torch.inference_mode():
            out = model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits = out.logits[:, -1].float()
    return completions


def sequence_logprobs(
    model: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]], *, batch: int
) -> np.ndarray:
    """Mean log-probability per answer token, nats, shape (rows,): the negative loss on each answer."""
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    result = np.full(len(prompts), np.nan)
    for first in range(0, len(order), batch):
        chunk = order[first : first + batch]
        sequences = [prompts[i] + answers[i] for i in chunk]
        width = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=model.device)
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=model.device)
        with torch.inference_mode():
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            for place, i in enumerate(chunk):
                begin, end = len(prompts[i]), len(sequences[place])
                logits = model.get_output_embeddings()(hidden[place, begin - 1 : end - 1]).float()
                chosen = logits.log_softmax(-1).gather(-1, ids[place, begin:end, None])
                result[i] = float(chosen.double().mean())
    return result
