"""Fused passes over memory for the plain forward: on CUDA in Triton, elsewhere the same in torch.

What is left of a small model's forward beside its matrix products is traffic: torch reads and writes a tensor once for
every operation, and slowly where one side is broadcast or strided. Each function here makes one pass. Arithmetic is in
fp32 and rounded once, where torch in bf16 rounds after every operation.

Triton comes with torch's CUDA builds; where it is missing, torch's operations serve on CUDA too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

# tokens among which `nucleus` looks, in a pass for most rows and one for the few that need it; a nucleus that may be wider
# still is left undecided
CANDIDATES = (4_096, 16_384)
RANGE = 2.0**15  # of keys and values that are kept in fp16, whose largest number is nearly twice that

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch
    triton = tl = None


def fused(tensor: Tensor) -> bool:
    """Whether the Triton kernels serve this tensor."""
    return triton is not None and tensor.device.type == "cuda"


def attends(tensor: Tensor, head: int) -> bool:
    """Whether `attend` has a kernel for heads of that width on this tensor's device: Triton's product takes powers of two
    from 16."""
    return fused(tensor) and head >= 16 and head & (head - 1) == 0


def cache_format(weights: Tensor, head: int) -> torch.dtype:
    """The format of a cache of keys and values for `attend`: that of the weights, but fp16 where products round their fp32
    factors to TF32, which has as many significant bits (11). Reading the cache is what a step with many rows waits for."""
    rounds = weights.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return torch.float16 if rounds and attends(weights, head) else weights.dtype


def rotate(
    heads: Tensor,
    cosine: Tensor,
    sine: Tensor,
    turning: int,
    cache: tuple[Tensor, Tensor, Tensor, int] | None = None,
) -> None:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of the first `turning` of the heads, in place.

    `heads` has shape (tokens, heads, head) and holds queries, keys and values in this order; `cosine` and `sine` have
    shape (positions, head), and token i stands at position i modulo their length; sines of the first half are negated,
    so that swapping the halves is a roll. With a `cache` (keys, values, slots, groups) the last `groups` of the turning
    heads and the rest are also written to keys and values of shape (rows, groups, length, head) at each row's slot.
    """
    count, number, size = heads.shape
    if not fused(heads):
        turned, repeats = heads[:, :turning], count // len(cosine)
        cosine, sine = (x.repeat(repeats, 1)[:, None] for x in (cosine, sine))
        turned.copy_((turned * cosine).addcmul_(turned.roll(size // 2, -1), sine))
        if cache is not None:
            keys, values, slots, groups = cache
            place, group = torch.arange(count, device=heads.device)[:, None], torch.arange(groups, device=heads.device)
            keys[place, group, slots[:, None]] = heads[:, turning - groups : turning]
            values[place, group, slots[:, None]] = heads[:, turning:]
        return
    keys, values, slots, groups = cache if cache is not None else (heads, heads, heads, 1)
    _rotate[(count,)](
        heads, cosine, sine, keys, values, slots, len(cosine), keys.shape[-2],
        HEADS=number, TURNING=turning, GROUPS=groups, HALF=size // 2, WRITE=cache is not None,
        PADDED=triton.next_power_of_2(number), num_warps=4,
    )  # fmt: skip


def gated(both: Tensor) -> Tensor:
    """silu(gate) x up of a stacked product, (tokens, 2 width) to (tokens, width)."""
    width = both.shape[1] // 2
    if not fused(both):
        gate, up = both.chunk(2, -1)
        return functional.silu(gate).mul_(up)
    out = both.new_empty(len(both), width)
    _gated[(len(both), triton.cdiv(width, 1024))](both, out, width, BLOCK=1024, num_warps=4)
    return out


def norms(logits: Tensor, scale: float = 1.0) -> Tensor:
    """Log of the sum of exp(scale x logits) over the last axis, fp32, shape (rows,)."""
    if not fused(logits):
        logits = logits.float()
        return (logits if scale == 1 else logits * scale).logsumexp(-1)
    out = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    _norms[(len(logits),)](logits, out, logits.shape[1], scale, BLOCK=4096, num_warps=8)
    return out


def nucleus(logits: Tensor, norm: Tensor, uniform: Tensor, scale: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF at `uniform` (rows,) from the nucleus of scale x `logits` (rows, vocabulary), whose
    `norms` are `norm`, and whether it is decided; on CUDA only.

    As `generate.draw`, without ranking anything. A first kernel keeps the tokens above the highest of some probabilities
    that leaves enough mass. The second finds by bisection over the bits of their probabilities, which as integers are in
    the same order, the last level that belongs to the nucleus, and then the level at which the drawn token lies. Tokens
    of equal probability are taken in the vocabulary's order.
    """
    rows, most = len(logits), CANDIDATES[-1]
    chance = torch.empty(rows, most, device=logits.device, dtype=torch.float32)
    token = torch.empty(rows, most, device=logits.device, dtype=torch.int32)
    count = torch.empty(rows, device=logits.device, dtype=torch.int32)
    drawn = torch.zeros(rows, device=logits.device, dtype=torch.long)  # a token, too, where nothing is decided
    _candidates[(rows,)](
        logits, norm, chance, token, count, logits.shape[1], scale, top_p,
        CAPACITY=most, WEIGHED=2048, BLOCK=4096, EDGES=8, num_warps=8,
    )  # fmt: skip
    for fewer, capacity in zip((-1, *CANDIDATES), CANDIDATES, strict=False):
        _pick[(rows,)](
            chance, token, count, uniform, drawn, top_p, most, fewer, CAPACITY=capacity, num_warps=capacity // 1024 * 2
        )
    return drawn, count <= most


def attend(queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor, pads: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query per row and head over the row's cache, shape (rows, heads x head).

    `queries` (rows, heads, head) may be strided; caches have shape (rows or more, groups, length, head), and products are
    computed in their format; a row sees positions `pads` to `slots`, both included. Heads that share a key are so many
    queries of it: keys are never repeated. `mask` says the same for torch, (rows, 1, 1, reach), added to scores; the
    kernel reads only what a row sees.
    """
    count, heads, size = queries.shape
    groups, length = keys.shape[1], keys.shape[2]
    if mask is not None:
        reach = mask.shape[-1]
        mixed = functional.scaled_dot_product_attention(
            queries.reshape(count, groups, heads // groups, size),
            keys[:count, :, :reach],
            values[:count, :, :reach],
            attn_mask=mask.expand(-1, groups, heads // groups, -1),
        )
        return mixed.reshape(count, -1)
    out = queries.new_empty(count, heads * size)
    _attend[(count, groups)](
        queries, keys, values, slots, pads, out, queries.stride(0), length, size**-0.5,
        GROUPS=groups, SHARED=heads // groups, PADDED=max(16, triton.next_power_of_2(heads // groups)), SIZE=size,
        BLOCK=64, PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32", num_warps=4,
    )  # fmt: skip
    return out


if triton is not None:  # untyped: the compiler looks annotations up, and knows only its own

    @triton.jit
    def _rotate(  # type: ignore[no-untyped-def]
        heads, cosine, sine, keys, values, slots, positions, length,
        HEADS: tl.constexpr, TURNING: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, WRITE: tl.constexpr,
        PADDED: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        head = tl.arange(0, PADDED)[:, None]
        at = tl.arange(0, HALF)[None, :]
        turns = (head < TURNING) & (at < HALF)
        inside = (head < HEADS) & (at < HALF)
        start = heads + token * HEADS * HALF * 2 + head * HALF * 2 + at
        one = tl.load(start, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(start + HALF, mask=inside, other=0.0).to(tl.float32)
        angle = (token % positions) * HALF * 2 + at
        cos = tl.load(cosine + angle).to(tl.float32)
        sin = tl.load(sine + angle + HALF).to(tl.float32)
        first = one * cos - two * sin
        second = two * cos + one * sin
        tl.store(start, first.to(heads.dtype.element_ty), mask=turns)
        tl.store(start + HALF, second.to(heads.dtype.element_ty), mask=turns)
        if WRITE:
            slot = tl.load(slots + token)
            is_key = turns & (head >= TURNING - GROUPS)
            place = ((token * GROUPS + head - (TURNING - GROUPS)) * length + slot) * HALF * 2 + at
            tl.store(keys + place, first.to(keys.dtype.element_ty), mask=is_key)
            tl.store(keys + place + HALF, second.to(keys.dtype.element_ty), mask=is_key)
            is_value = inside & (head >= TURNING)
            place = ((token * GROUPS + head - TURNING) * length + slot) * HALF * 2 + at
            tl.store(values + place, one.to(values.dtype.element_ty), mask=is_value)
            tl.store(values + place + HALF, two.to(values.dtype.element_ty), mask=is_value)

    @triton.jit
    def _gated(both, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < width
        gate = tl.load(both + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(both + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * width + at, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _norms(logits, out, vocabulary, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < vocabulary
            value = tl.load(logits + row * vocabulary + at, mask=inside, other=0.0).to(tl.float32) * scale
            value = tl.where(inside, value, float("-inf"))
            higher = tl.maximum(highest, value)
            reference = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(highest - reference) + tl.exp(value - reference)
            highest = higher
        top = tl.max(highest, 0)
        tl.store(out + row, tl.log(tl.sum(total * tl.exp(highest - top), 0)) + top)

    @triton.jit
    def _candidates(  # type: ignore[no-untyped-def]
        logits, norm, chance, token, count, vocabulary, scale, top_p,
        CAPACITY: tl.constexpr, WEIGHED: tl.constexpr, BLOCK: tl.constexpr, EDGES: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        shift = tl.load(norm + row)
        edge = tl.exp2(-6.0 - 2.0 * tl.arange(0, EDGES).to(tl.float32))  # 1/64 to 1/1,048,576
        masses = tl.zeros([WEIGHED, EDGES], tl.float32)
        for start in range(0, vocabulary, WEIGHED):
            at = start + tl.arange(0, WEIGHED)
            value = tl.load(logits + row * vocabulary + at, mask=at < vocabulary, other=float("-inf"))
            likely = tl.exp(value.to(tl.float32) * scale - shift)[:, None]
            masses += tl.where(likely >= edge[None, :], likely, 0.0)
        enough = tl.sum(masses, 0) >= top_p + 1e-5  # more than the rounding of such a sum
        least = tl.max(tl.where(enough, edge, 0.0), 0)
        found = 0
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(logits + row * vocabulary + at, mask=at < vocabulary, other=float("-inf"))
            likely = tl.exp(value.to(tl.float32) * scale - shift)
            kept = (likely >= least) & (at < vocabulary)
            place = found + tl.cumsum(kept.to(tl.int32), 0) - 1
            fits = kept & (place < CAPACITY)
            tl.store(chance + row * CAPACITY + place, likely, mask=fits)
            tl.store(token + row * CAPACITY + place, at, mask=fits)
            found += tl.sum(kept.to(tl.int32), 0)
        tl.store(count + row, found)

    @triton.jit
    def _pick(  # type: ignore[no-untyped-def]
        chance, token, count, uniform, drawn, top_p, most, fewer, CAPACITY: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        number = tl.load(count + row)
        if (number > fewer) & (number <= CAPACITY):
            at = tl.arange(0, CAPACITY)
            inside = at < number
            likely = tl.load(chance + row * most + at, mask=inside, other=0.0)
            level = likely.to(tl.int32, bitcast=True)
            exact = likely.to(tl.float64)
            low, high = 0, 1 << 30  # as a float: 2
            for _ in range(30):
                middle = (low + high) // 2
                enough = tl.sum(tl.where(level >= middle, exact, 0.0), 0) >= top_p
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            last = low
            above = tl.sum(tl.where(level > last, exact, 0.0), 0)
            each = tl.max(tl.where(level == last, exact, 0.0), 0)
            equal = tl.sum((level == last).to(tl.int32), 0)
            taken = tl.minimum(tl.maximum(tl.ceil((top_p - above) / each), 1.0), equal.to(tl.float64))
            target = tl.load(uniform + row).to(tl.float64) * (above + taken * each)
            high = 1 << 30
            for _ in range(30):
                middle = (low + high) // 2
                beyond = tl.sum(tl.where(level >= middle, exact, 0.0), 0) > target
                low = tl.where(beyond, middle, low)
                high = tl.where(beyond, high, middle)
            above = tl.sum(tl.where(level > low, exact, 0.0), 0)
            each = tl.max(tl.where(level == low, exact, 0.0), 0)
            equal = tl.sum((level == low).to(tl.int32), 0).to(tl.float64)
            rank = tl.minimum(tl.floor((target - above) / each), tl.where(low == last, taken, equal) - 1.0)
            rank = tl.maximum(rank, 0.0).to(tl.int32)
            order = tl.cumsum((level == low).to(tl.int32), 0) - 1
            here = (level == low) & (order == rank)
            tl.store(drawn + row, tl.sum(tl.where(here, tl.load(token + row * most + at, mask=inside, other=0), 0), 0))

    @triton.jit
    def _attend(  # type: ignore[no-untyped-def]
        queries, keys, values, slots, pads, out, stride, length, scale,
        GROUPS: tl.constexpr, SHARED: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        group = tl.program_id(1)
        slot = tl.load(slots + row)
        pad = tl.load(pads + row)
        head = tl.arange(0, PADDED)
        at = tl.arange(0, SIZE)
        real = (head < SHARED)[:, None] & (at < SIZE)[None, :]
        offset = (group * SHARED + head)[:, None] * SIZE + at[None, :]
        query = tl.load(queries + row * stride + offset, mask=real, other=0.0).to(keys.dtype.element_ty)
        cache = (row * GROUPS + group) * length * SIZE
        highest = tl.full([PADDED], float("-inf"), tl.float32)
        total = tl.zeros([PADDED], tl.float32)
        mixed = tl.zeros([PADDED, SIZE], tl.float32)
        for start in range(pad, slot + 1, BLOCK):
            position = start + tl.arange(0, BLOCK)
            seen = position <= slot
            place = cache + position[:, None] * SIZE + at[None, :]
            key = tl.load(keys + place, mask=seen[:, None], other=0.0)
            score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
            score = tl.where(seen[None, :], score, float("-inf"))
            higher = tl.maximum(highest, tl.max(score, 1))
            weight = tl.exp(score - higher[:, None])
            fade = tl.exp(highest - higher)
            value = tl.load(values + place, mask=seen[:, None], other=0.0)
            mixed = mixed * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
            total = total * fade + tl.sum(weight, 1)
            highest = higher
        mixed = mixed / total[:, None]
        tl.store(out + row * GROUPS * SHARED * SIZE + offset, mixed.to(out.dtype.element_ty), mask=real)
