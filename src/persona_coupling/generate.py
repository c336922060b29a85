"""Sampling and teacher forcing on one shared prefill.

Sampling is `generate` without what makes it slow here: prompts are read once (equal ones in one row) and serve both the
sampled answer and the fixed one, finished rows leave the batch, and a token is drawn by inverse CDF from the nucleus
instead of by `torch.multinomial` over the vocabulary. Each row has its own stream of uniforms, keyed by seed and row
label, so that a row's answer does not depend on which rows share its batch (up to rounding).

Plain models (`transformer.supports`) are decoded by `decode` and scored by `transformer`; here stands what any causal
model of transformers can do, hooks included, and the two agree up to rounding.

When an answer ends, by itself or by the cut-off, the marker is forced behind it token by token: its log-probability at
the end of the model's own answer costs six more tokens instead of a second reading.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

HEAD_POSITIONS = (256, 8192)  # CPU, CUDA: positions whose whole vocabulary is in memory at once
FORCED = 512  # distinct rows whose continuations are read together: each has a copy of its prompt's keys and values
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
    """Prompts that have been read: key-value cache of the distinct ones, attention mask (rows, length), logits of the
    next token (rows, vocabulary), and which row of the cache each row has."""

    cache: Any
    mask: torch.Tensor
    logits: torch.Tensor
    rows: torch.Tensor

    def chosen(self, places: Sequence[int]) -> Prefill:
        """The rows at these places, each as often as it is named; the cache is shared, not copied."""
        import torch

        index = torch.tensor(places, device=self.rows.device)
        return Prefill(self.cache, self.mask[index], self.logits[index], self.rows[index])


def prefill(model: PreTrainedModel, prompts: list[list[int]], pad: int) -> Prefill:
    """Read prompts; the cache has them left-padded."""
    import torch
    from transformers import DynamicCache

    from persona_coupling import transformer

    width, device = max(map(len, prompts)), model.device
    place: dict[tuple[int, ...], int] = {}
    rows = torch.tensor([place.setdefault(tuple(p), len(place)) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in place], device=device)
    at = torch.arange(width, device=device) - (width - lengths[:, None])  # each cache position's place in its prompt
    mask, at = (at >= 0).long(), at.clamp(min=0)
    ids = torch.from_numpy(_padded(list(place), pad)).to(device)
    cache = DynamicCache(config=model.config)
    each = torch.arange(len(place), device=device)
    with torch.inference_mode():
        if transformer.supports(model):
            hidden = transformer.Transformer(model).states(
                ids,
                lambda layer, *both: cache.update(*(x[each[:, None], at].transpose(1, 2) for x in both), layer),
            )
            logits = model.get_output_embeddings()(hidden[each, lengths - 1])
        else:
            logits = model(
                input_ids=torch.where(mask == 1, ids[each[:, None], at], pad),
                attention_mask=mask,
                position_ids=at,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
    return Prefill(cache, mask[rows], logits.float()[rows], rows)


def _padded(texts: Sequence[Sequence[int]], pad: int) -> np.ndarray:
    """Token ids, right-padded, shape (rows, length)."""
    lengths = np.array([len(text) for text in texts])
    ids = np.full((len(texts), lengths.max()), pad)
    ids[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate([np.asarray(text) for text in texts])
    return ids


def continuation_logprobs(
    model: PreTrainedModel, read: Prefill, continuations: list[list[int]], tail: int, *, apart: bool = False
) -> np.ndarray:
    """Log-probability of each of the last `tail` tokens of each continuation, in nats, shape (rows, tail).

    Equal continuations of one prompt are read once; with `apart` every row is read on its own, in the rows' order, for
    hooks that treat rows differently. At most `FORCED` rows are read together, each batch by one forward. The prefill is
    left as it was. Continuations must be longer than `tail`.
    """
    import torch

    place: dict[tuple[int, ...], int] = {}
    keys = [(row, *continuation) for row, continuation in zip(read.rows.tolist(), continuations, strict=True)]
    back = [place.setdefault((number if apart else -1, *key), len(place)) for number, key in enumerate(keys)]
    first = np.unique(back, return_index=True)[1]
    parts = [first[begin : begin + FORCED].tolist() for begin in range(0, len(first), FORCED)]
    found = torch.cat([_forced(model, read, part, [continuations[i] for i in part], tail) for part in parts])
    return np.asarray(found[torch.tensor(back, device=found.device)].cpu().numpy())


def _forced(
    model: PreTrainedModel, read: Prefill, places: list[int], texts: list[list[int]], tail: int
) -> torch.Tensor:
    """`continuation_logprobs` of the rows at `places`, in one forward."""
    import torch

    device, first = model.device, torch.tensor(places, device=model.device)
    width = max(map(len, texts))
    ids = torch.tensor([t + [0] * (width - len(t)) for t in texts], device=device)
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts], device=device)
    start = read.mask[first].sum(1, keepdim=True)
    with torch.inference_mode():
        hidden = model.base_model(
            input_ids=ids,
            attention_mask=torch.cat([read.mask[first], mask], 1),
            position_ids=start + torch.arange(width, device=device),
            past_key_values=_copied(read.cache, read.rows[first]),
            use_cache=True,
        ).last_hidden_state
        rows = torch.arange(len(texts), device=device)[:, None]
        targets = mask.sum(1, keepdim=True) - tail + torch.arange(tail, device=device)  # positions of the scored tokens
        logprobs = _chosen(model, hidden[rows, targets - 1].flatten(0, 1), ids[rows, targets].flatten())
    return logprobs.view(-1, tail)


def _copied(cache: Any, rows: torch.Tensor) -> Any:
    """A cache of its own with these rows of `cache`, each as often as it is named: what it takes is held once."""
    from transformers.cache_utils import DynamicLayer

    if not all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers):
        made = copy.deepcopy(cache)  # a layer with a window keeps more than keys and values
        made.batch_select_indices(rows)
        return made
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
    return made


def _chosen(model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability, double, of each target (positions,) under the head at its hidden state (positions, width)."""
    import torch

    from persona_coupling import architecture
    from persona_coupling import decode_kernels as kernels

    step = HEAD_POSITIONS[model.device.type == "cuda"]
    parts = []
    for some, wanted in zip(hidden.split(step), targets.split(step), strict=True):
        logits = architecture.logits(model, some)
        parts.append(logits.gather(-1, wanted[:, None])[:, 0].double() - kernels.norms(logits).double())
    return torch.cat(parts)


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
    kept: Callable[[torch.Tensor], None] = lambda _index: None,
) -> list[Completion]:
    """Sample one answer per prefilled prompt; consumes the prefill. `stop` is the end-of-turn id, `marker` the token
    ids that are forced behind each answer (may be empty). `kept` is called with the places that stay whenever
    rows leave the batch, for hooks that treat rows differently (`residual.steering`); without hooks a plain model takes
    the way that never calls it."""
    import torch

    from persona_coupling import decode

    device = model.device
    streams = np.stack([uniforms(seed, label, sampling.max_new_tokens) for label in labels])
    if sampling.max_new_tokens:
        made = decode.sample(model, read, streams, sampling=sampling, stop=stop, marker=marker, report=report)
        if made is not None:
            return made
    table = torch.tensor(streams, device=device)
    completions = [Completion() for _ in labels]
    logprobs: list[list[float]] = [[] for _ in labels]  # of sampled tokens, then reused for forced ones
    forced = [-1] * len(labels)  # how many marker tokens have been scored; -1: still answering
    rows = list(range(len(labels)))
    cache, mask, logits = read.cache, read.mask, read.logits
    if len(set(read.rows.tolist())) < len(labels):
        cache.batch_select_indices(read.rows)
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
            kept(index)
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
    """Mean log-probability per answer token, nats, shape (rows,): the negative loss on each answer. At most `batch`
    sequences are read together, fewer if they are long (`Machine.score_tokens`)."""
    import torch

    from persona_coupling import machine, transformer

    device, lengths = model.device, np.array([len(a) for a in answers])
    sequences = [p + a for p, a in zip(prompts, answers, strict=True)]
    plain = transformer.Transformer(model) if transformer.supports(model) else None
    read: list[tuple[list[int], np.ndarray, torch.Tensor]] = []
    for chunk in _chunks([len(s) for s in sequences], batch, machine.machine(str(device)).score_tokens):
        ids = torch.from_numpy(_padded([sequences[i] for i in chunk], 0)).to(device)
        rows = np.repeat(np.arange(len(chunk)), lengths[chunk])
        columns = np.concatenate([np.arange(len(prompts[i]), len(sequences[i])) for i in chunk])
        row, column = torch.from_numpy(np.stack([rows, columns])).to(device)
        with torch.inference_mode():
            if plain is None:
                ends = torch.tensor([len(sequences[i]) for i in chunk], device=device)
                mask = (torch.arange(ids.shape[1], device=device) < ends[:, None]).long()
                hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            else:
                hidden = plain.states(ids)
            read.append((chunk, rows, _chosen(model, hidden[row, column - 1], ids[row, column])))
    result = np.full(len(prompts), np.nan)
    for chunk, rows, chosen in read:  # only now: the host prepares a batch while the device reads the one before
        result[chunk] = np.bincount(rows, chosen.cpu().numpy(), len(chunk)) / lengths[chunk]
    return result


def _chunks(lengths: list[int], rows: int, tokens: int) -> list[list[int]]:
    """Indices in batches of neighbours in length: at most `rows`, and at most `tokens` with padding (but at least one)."""
    chunks: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):  # so each is the longest of its batch when it joins
        if chunks and len(chunks[-1]) < rows and (len(chunks[-1]) + 1) * lengths[i] <= tokens:
            chunks[-1].append(i)
        else:
            chunks.append([i])
    return chunks
