"""Sampling without a library in the loop: a static cache, all bookkeeping on the device, the step a captured graph.

`generate` needs some 85 ms per token step of a 135M model on an H100, whatever the batch: the GPU waits for thousands of
kernel launches. Here a step (one forward, the draw, the bookkeeping of finished and forced rows) reads and writes only
tensors that stay where they are, so it can be recorded once as a CUDA graph and replayed with one launch. The host looks
in every few steps to let finished rows go. On a CPU the same step runs uncaptured, which is what the tests compare.

The draw is exact and needs no sort of the vocabulary: see `kernels.nucleus`, and where its kernels do not serve,
`narrow_draw`. There the most probable `NUCLEUS_CANDIDATES` tokens are ranked; if their mass reaches top_p, the nucleus
lies within them and the draw is as in `generate.draw`. If not, the nucleus' mass is at least top_p and at most top_p plus
the last candidate's probability, since the token that crosses the threshold is no more probable than that; a uniform
that falls on the same candidate under both masses has decided. A row that neither decides is held: it keeps its place
and repeats its step, which changes nothing, until the host draws for it from all its logits.

A row's cache slots, counters and outputs are addressed by the row; only the cache itself and the list of who sits where
move when rows are let go. Graphs belong to a shape (places, positions read), and to buffers that outlive a call: the
next checkpoint of the same shape copies its weights in (a third of a gigabyte, under a millisecond) and captures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from persona_coupling import decode_kernels as kernels
from persona_coupling import generate
from persona_coupling.generate import Completion, Prefill, Sampling
from persona_coupling.transformer import Transformer, supports

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

BURST = 8  # captured steps between two looks of the host; more saves little and lets finished rows idle
STRIDE = 32  # positions by which the read part of the cache grows: smaller saves bandwidth and captures more graphs
SLACK = 1e-6  # of a nucleus' mass: fp32 rounding of the sums that bound it
TOKEN, SLOT, PAD, COUNT, FORCED, ACTIVE, STOPPED, HELD = range(8)  # columns of the rows' state


def bucket(rows: int) -> int:
    """The smallest batch of the form 2^k, 1.25 x 2^k or 1.5 x 2^k (at least 32) that holds `rows`."""
    size = 32
    while True:
        for candidate in (size, size * 5 // 4, size * 3 // 2):
            if rows <= candidate:
                return candidate
        size *= 2


class Sampler:
    """Buffers for up to `places` rows of up to `length` positions, and the graphs captured over them."""

    def __init__(
        self,
        weights: Transformer,
        *,
        places: int,
        length: int,
        sampling: Sampling,
        stop: int,
        marker: list[int],
        capture: bool,
        cache: torch.dtype,
    ) -> None:
        self.weights = weights.detached() if capture else weights
        self.places, self.length, self.capture = places, length, capture
        self.sampling, self.stop, self.marker_length = sampling, stop, len(marker)
        device, answer = weights.device, sampling.max_new_tokens
        self.fused = kernels.attends(
            weights.embedding, weights.head
        )  # attention then finds out by itself how far to read
        self.marker = torch.tensor(marker or [0], device=device)
        shape = (len(weights.layers), places, weights.groups, length, weights.head)
        # zeros: what is masked is multiplied by a weight of 0, and 0 times garbage may be NaN
        self.keys = torch.zeros(shape, dtype=cache, device=device)
        self.values = torch.zeros_like(self.keys)
        self.logits = torch.zeros(places, len(weights.readout), dtype=weights.dtype, device=device)
        # per row; the last row is nobody's, and so is the last column of what is written token by token
        self.state = torch.zeros(places + 1, 8, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(places + 1, answer, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(places + 1, answer + 1, dtype=torch.long, device=device)
        self.scores = torch.zeros(places + 1, answer + 1, device=device)  # log-probabilities of the tokens
        self.forced = torch.zeros(places + 1, len(marker) + 1, device=device)
        self.order = torch.zeros(places, dtype=torch.long, device=device)  # the row in each place
        self.waiting = torch.zeros(2, dtype=torch.long, device=device)  # rows that are active, rows that are held
        self.graphs: dict[tuple[int, int], Any] = {}
        self.stream = torch.cuda.Stream(device) if capture else None
        self.pool = torch.cuda.graph_pool_handle() if capture else None  # shared: nothing in it outlives a replay

    # ------------------------------------------------------------------------------------------- one step

    def step(self, count: int, reach: int) -> None:
        """Read each row's input token, draw, keep the books; places 0 to `count`, cache positions 0 to `reach`."""
        state = self.state[self.order[:count]]
        slots, pads, mask = state[:, SLOT].contiguous(), state[:, PAD].contiguous(), None
        if not self.fused:
            at = torch.arange(reach, device=slots.device)
            hidden = (at > slots[:, None]) | (at < pads[:, None])
            mask = torch.zeros(hidden.shape, dtype=self.weights.dtype, device=slots.device)
            mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
        logits = self.weights.step(state[:, TOKEN], slots, pads, mask, self.keys, self.values)
        self.logits[:count] = logits
        self.follow(count)

    def follow(self, count: int) -> None:
        """Draw from the logits of places 0 to `count` and keep the books."""
        logits, state = self.logits[:count], self.state[self.order[:count]]
        norm = kernels.norms(logits)
        token, decided = self._draw(logits, norm, self._uniform(state, count))
        answering = (state[:, ACTIVE] == 1) & (state[:, FORCED] < 0)
        self.advance(count, token, answering & ~decided, norm)

    def _draw(
        self, logits: torch.Tensor, norm: torch.Tensor, uniform: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token per row, and whether it is decided; `norm` are the logits' norms at temperature 1."""
        if not kernels.fused(logits) or self.sampling.top_p >= 1:
            return narrow_draw(logits, uniform, self.sampling)
        coldness = 1 / self.sampling.temperature
        return kernels.nucleus(
            logits, norm if coldness == 1 else kernels.norms(logits, coldness), uniform, coldness, self.sampling.top_p
        )

    def _uniform(self, state: torch.Tensor, count: int) -> torch.Tensor:
        at = state[:, COUNT].clamp(max=self.sampling.max_new_tokens - 1)
        return self.uniforms[self.order[:count], at]

    def advance(self, count: int, token: torch.Tensor, held: torch.Tensor, norm: torch.Tensor) -> None:
        """Move every row that is active and not held by the token drawn from its logits, whose `kernels.norms` are `norm`,
        as `generate.sample` does."""
        rows, longest, marker = self.order[:count], self.sampling.max_new_tokens, self.marker
        logits, state = self.logits[:count], self.state[rows]
        live = (state[:, ACTIVE] == 1) & ~held
        forced, written = state[:, FORCED], state[:, COUNT]
        answering = live & (forced < 0)
        stops = answering & (token == self.stop)
        writes = answering & ~stops
        at = torch.where(writes, written, longest)
        self.tokens[rows, at] = token
        self.scores[rows, at] = logits.gather(-1, token[:, None])[:, 0].float() - norm
        written = written + writes
        ends = stops | (writes & (written == longest))
        following, done = token, ends
        if self.marker_length:
            last = written[:, None] + torch.arange(-self.marker_length, 0, device=token.device)
            ended_so = (self.tokens[rows[:, None], last.clamp(min=0)] == marker).all(-1) & (last[:, 0] >= 0)
            starts = ends & ~ended_so
            forcing = (stops & starts) | (live & (forced >= 0))  # after a cut-off the answer's last token is read first
            index = forced.clamp(0, self.marker_length - 1)
            chosen = logits.gather(-1, marker[index][:, None])[:, 0].float() - norm
            self.forced[rows, torch.where(forcing, index, self.marker_length)] = chosen
            following = torch.where(forcing, marker[index], token)
            forced = torch.where(forcing, index + 1, torch.where(starts, 0, forced))
            done = (ends & ended_so) | (forcing & (index + 1 == self.marker_length))
        moves = live & ~done
        new = {
            TOKEN: torch.where(moves, following, state[:, TOKEN]),
            SLOT: state[:, SLOT] + moves,
            PAD: state[:, PAD],
            COUNT: written,
            FORCED: forced,
            ACTIVE: state[:, ACTIVE] * ~done,
            STOPPED: state[:, STOPPED] | stops,
            HELD: held.long(),
        }
        self.state[rows] = torch.stack([new[column] for column in range(8)], 1)
        self.waiting.copy_(torch.stack([new[ACTIVE].sum(), new[HELD].sum()]))

    # ------------------------------------------------------------------------------------------- the host's part

    def run(self, count: int, reach: int) -> None:
        """One step; on CUDA the first of its shape runs as it is and is then recorded, later ones are replayed."""
        graph = self.graphs.get((count, reach))
        if graph is not None:
            graph.replay()
            return
        self.step(count, reach)
        if self.stream is None:
            return
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):  # not `torch.cuda.graph`: it collects garbage and empties the cache
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            self.step(count, reach)
            graph.capture_end()
        self.graphs[count, reach] = graph

    def release(self, count: int, smaller: int, reach: int) -> None:
        """Move the active rows of places `smaller` to `count` into idle places below."""
        idle = self.state[self.order[:count], ACTIVE] == 0
        movers = (~idle[smaller:]).nonzero()[:, 0] + smaller
        holes = idle[:smaller].nonzero()[: len(movers), 0]
        self.order[holes] = self.order[movers]
        for cache in (*self.keys, *self.values):
            cache[holes, :, :reach] = cache[movers, :, :reach]

    def resolve(self, count: int) -> None:
        """Draw for the held rows from all their logits."""
        rows = self.order[:count]
        state = self.state[rows]
        held = state[:, HELD] == 1
        token = state[:, TOKEN].clone()
        token[held] = generate.draw(self.logits[:count][held].float(), self._uniform(state, count)[held], self.sampling)
        self.advance(count, token, ~held, kernels.norms(self.logits[:count]))
        self.state[rows, HELD] = 0

    def sample(
        self, weights: Transformer, read: Prefill, uniforms: np.ndarray, report: Callable[[float], None]
    ) -> list[Completion]:
        """One answer per prefilled prompt."""
        rows, width = read.mask.shape
        device, total = read.mask.device, self.sampling.max_new_tokens + self.marker_length
        if self.capture:
            for mine, theirs in zip(self.weights.tensors(), weights.tensors(), strict=True):
                mine.copy_(theirs)
        for number, layer in enumerate(read.cache.layers):
            self.keys[number, :rows, :, :width] = layer.keys[read.rows]
            self.values[number, :rows, :, :width] = layer.values[read.rows]
        read.cache = None  # consumed
        count = bucket(rows) if self.capture else rows
        self.order.fill_(self.places)
        self.order[:rows] = torch.arange(rows, device=device)
        self.state.zero_()
        self.state[:rows, ACTIVE] = 1
        self.state[:rows, FORCED] = -1
        self.state[:rows, SLOT] = width - 1
        self.state[:rows, PAD] = width - read.mask.sum(1)
        self.uniforms[:rows] = torch.from_numpy(uniforms).to(device)
        self.logits[:rows] = read.logits
        self.follow(count)
        steps, stride = 0, self.length if self.fused else STRIDE if self.capture else 1
        while True:
            report(min(steps, total - 1) / total)
            active, held = self.waiting.tolist()
            if held:
                self.resolve(count)
                active = self.waiting.tolist()[0]
            if not active:
                break
            smaller = bucket(active) if self.capture else active
            if smaller <= (count // 2 if self.capture else count - 1):
                self.release(count, smaller, min(width + steps + 1, self.length))
                count = smaller
            # rows that are held today will likely be so tomorrow: look often while there are many
            burst = 1 if not self.capture or held * 8 > active else BURST
            for _ in range(min(burst, max(1, total - 1 - steps))):
                steps += 1
                needed = min(width + steps, self.length)
                self.run(count, min(-(-needed // stride) * stride, self.length))
        return self._completions(rows)

    def _completions(self, rows: int) -> list[Completion]:
        tokens, scores, forced = (x[:rows].tolist() for x in (self.tokens, self.scores, self.forced))
        marker, made = self.marker.tolist()[: self.marker_length], []
        for row, state in enumerate(self.state[:rows].tolist()):
            answer = tokens[row][: state[COUNT]]
            own = bool(marker) and answer[-len(marker) :] == marker
            of_marker = scores[row][: state[COUNT]][-len(marker) :] if own else forced[row][:-1]
            made.append(Completion(answer, "stop" if state[STOPPED] else "length", of_marker))
        return made


def narrow_draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row from the nucleus of `logits` (rows, vocabulary) at `uniform` (rows,), and whether the most
    probable candidates alone decide it (where not, the token is to be ignored)."""
    k, coldness = min(generate.NUCLEUS_CANDIDATES, logits.shape[-1]), 1 / sampling.temperature
    top, ids = logits.topk(k, dim=-1)
    probabilities = (top.float() * coldness - kernels.norms(logits, coldness)[:, None]).exp().double()
    cumulative = probabilities.cumsum(-1)
    whole = k == logits.shape[-1]
    size = (cumulative < sampling.top_p).sum(-1, keepdim=True).clamp(max=k - 1)
    mass = cumulative.gather(-1, size)
    if whole:
        low = high = mass
    else:
        narrow = cumulative[:, -1:] >= sampling.top_p
        low = torch.where(narrow, mass, sampling.top_p - SLACK)
        high = torch.where(narrow, mass, (sampling.top_p + probabilities[:, -1:]).clamp(max=1) + SLACK)
    targets = uniform.double()[:, None] * torch.cat([low, high], -1)
    positions = torch.searchsorted(cumulative, targets, right=True)
    positions = positions.minimum(size) if whole else torch.where(narrow, positions.minimum(size), positions)
    token = ids.gather(-1, positions[:, :1].clamp(max=k - 1))[:, 0]
    return token, (positions[:, 0] == positions[:, 1]) & (positions[:, 1] < k)


def _cache_format(weights: Transformer, read: Prefill) -> torch.dtype:
    """`kernels.cache_format`, unless what was read lies outside of that format's range."""
    wanted = kernels.cache_format(weights.embedding, weights.head)
    if wanted == torch.float16:
        largest = torch.stack(
            [x.abs().amax() for layer in read.cache.layers for x in (layer.keys, layer.values)]
        ).amax()
        if not largest < kernels.RANGE:
            return weights.dtype
    return wanted


_kept: dict[tuple, Sampler] = {}  # at most one: its buffers are as large as a batch's cache


def sample(
    model: PreTrainedModel,
    read: Prefill,
    uniforms: np.ndarray,
    *,
    sampling: Sampling,
    stop: int,
    marker: list[int],
    report: Callable[[float], None],
) -> list[Completion] | None:
    """As `generate.sample`, with `uniforms` of shape (rows, max_new_tokens); None for a model that needs its own
    forward (see `transformer.supports`), or whose weights do not fit twice."""
    if not supports(model):
        return None
    rows, width = read.mask.shape
    capture = model.device.type == "cuda"
    with torch.inference_mode():
        weights = Transformer(model)
        needed = width + sampling.max_new_tokens + len(marker)
        places, length = (bucket(rows), -(-needed // STRIDE) * STRIDE) if capture else (rows, needed)
        cache = _cache_format(weights, read)
        settings = {"sampling": sampling, "stop": stop, "marker": marker, "capture": capture, "cache": cache}
        if not capture:
            return Sampler(weights, places=places, length=length, **settings).sample(weights, read, uniforms, report)
        key = (weights.signature(), sampling, stop, tuple(marker), generate.NUCLEUS_CANDIDATES, cache)
        kept = _kept.get(key)
        if kept is None or kept.places < places or kept.length < length:
            if kept is not None:
                places, length = max(places, kept.places), max(length, kept.length)
            del kept
            _kept.clear()
            _kept[key] = Sampler(weights, places=places, length=length, **settings)
        return _kept[key].sample(weights, read, uniforms, report)
