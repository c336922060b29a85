"""Triton kernels for what a training step does between its matrix products. Imported only where Triton works.

A step of a small model moves more bytes between products than it multiplies: each kernel here reads its inputs and
writes its outputs once, where the library's separate operations pass over them several times.
"""

import triton
import triton.language as tl


@triton.jit
def _scramble(x):
    # Wellons' lowbias32, a bijection of 32-bit words with low avalanche bias (nullprogram.com, "Prospecting for hash
    # functions", 2018)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(random, number, place, threshold):
    # one round per element, keyed twice by words that differ between steps and layers: with one key shared, the masks
    # of two layers correlate by up to 0.01; with both their own, by nothing that a million elements show. The keys cost
    # a program nothing, the round costs an element more than its memory traffic. Nothing is stored for backward.
    salt = _scramble(number.to(tl.uint32) + 1)
    first = _scramble(tl.load(random).to(tl.uint32) ^ salt)
    second = _scramble(tl.load(random + 1).to(tl.uint32) + salt)
    x = place.to(tl.uint32) ^ first
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15) ^ second
    x = x * 0x846CA68B
    return (x ^ (x >> 16)) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["number", "threshold"])
def inner(
    x, a, fixed, out, random, number, threshold, scale, tokens, stride,
    IN: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, FIXED: tl.constexpr, FIXED_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """drop(x) A' beside x F' for modules of one input, each with a mask of its own: x (cells, tokens, IN), A (cells, modules
    * RANK, IN) with `stride` between cells, F (cells, modules, FIXED, IN), out (modules, cells, tokens, RANK + FIXED)."""
    cell = tl.program_id(1)
    module = tl.program_id(2)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, PADDED)
    more = tl.arange(0, FIXED_PADDED)
    row = cell * tokens + token
    a += cell.to(tl.int64) * stride + module * RANK * IN
    fixed += (cell * tl.num_programs(2) + module) * FIXED * IN
    total = tl.zeros((ROWS, PADDED), dtype=tl.float32)
    beside = tl.zeros((ROWS, FIXED_PADDED), dtype=tl.float32)
    for first in range(0, IN, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        place = row[:, None] * IN + column[None, :]
        value = tl.load(x + place, mask=(token < tokens)[:, None] & (column < IN)[None, :], other=0.0)
        if FIXED:
            where = more[None, :] * IN + column[:, None]
            weight = tl.load(fixed + where, mask=(more < FIXED)[None, :] & (column < IN)[:, None], other=0.0)
            beside += tl.dot(value, weight)
        value = tl.where(_kept(random, number + module, place, threshold), value, 0.0)
        where = rank[None, :] * IN + column[:, None]
        weight = tl.load(a + where, mask=(rank < RANK)[None, :] & (column < IN)[:, None], other=0.0)
        total += tl.dot(value, weight)
    out += (module * tl.num_programs(1) * tokens + row[:, None]) * (RANK + FIXED)
    tl.store(out + rank[None, :], total * scale, mask=(token < tokens)[:, None] & (rank < RANK)[None, :])
    if FIXED:
        tl.store(out + RANK + more[None, :], beside, mask=(token < tokens)[:, None] & (more < FIXED)[None, :])


@triton.jit(do_not_specialize=["number", "threshold", "span"])
def gradient_a(
    through, x, out, random, number, threshold, scale, tokens, span, part_stride, stride, parts,
    IN: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, FIXED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """through' drop(x) in `parts` sums of `span` tokens each: through (modules, cells, tokens, RANK + FIXED), of which the
    last FIXED columns are passed over, out (parts, cells, modules * RANK, IN) with strides between parts and cells."""
    cell = tl.program_id(1)
    module = tl.program_id(2) // parts
    part = tl.program_id(2) % parts
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, PADDED)
    through += (module * tl.num_programs(1) + cell) * tokens * (RANK + FIXED)
    end = tl.minimum((part + 1) * span, tokens)
    total = tl.zeros((PADDED, COLUMNS), dtype=tl.float32)
    for first in range(part * span, end, ROWS):
        token = first + tl.arange(0, ROWS)
        place = (cell * tokens + token)[:, None] * IN + column[None, :]
        value = tl.load(x + place, mask=(token < end)[:, None] & (column < IN)[None, :], other=0.0)
        value = tl.where(_kept(random, number + module, place, threshold), value, 0.0)
        where = token[None, :] * (RANK + FIXED) + rank[:, None]
        outer = tl.load(through + where, mask=(token < end)[None, :] & (rank < RANK)[:, None], other=0.0)
        total += tl.dot(outer, value)
    out += part.to(tl.int64) * part_stride + cell.to(tl.int64) * stride + module * RANK * IN
    where = rank[:, None] * IN + column[None, :]
    tl.store(out + where, total * scale, mask=(rank < RANK)[:, None] & (column < IN)[None, :])


@triton.jit(do_not_specialize=["number", "threshold"])
def back(
    through, a, fixed, out, random, number, threshold, scale, tokens, stride,
    IN: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, FIXED: tl.constexpr, FIXED_PADDED: tl.constexpr,
    MODULES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = what through A, by the mask that dropped x, and through F add up to over the modules; shapes as for `inner`,
    `through` in place of its result."""
    cell = tl.program_id(2)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, PADDED)
    more = tl.arange(0, FIXED_PADDED)
    row = cell * tokens + token
    place = row[:, None] * IN + column[None, :]
    a += cell.to(tl.int64) * stride
    fixed += cell * MODULES * FIXED * IN
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for module in tl.static_range(MODULES):
        start = (module * tl.num_programs(2) * tokens + row[:, None]) * (RANK + FIXED)
        where = start + rank[None, :]
        outer = tl.load(through + where, mask=(token < tokens)[:, None] & (rank < RANK)[None, :], other=0.0)
        where = (module * RANK + rank)[:, None] * IN + column[None, :]
        weight = tl.load(a + where, mask=(rank < RANK)[:, None] & (column < IN)[None, :], other=0.0)
        total += tl.where(_kept(random, number + module, place, threshold), tl.dot(outer, weight) * scale, 0.0)
        if FIXED:
            where = start + RANK + more[None, :]
            outer = tl.load(through + where, mask=(token < tokens)[:, None] & (more < FIXED)[None, :], other=0.0)
            where = (module * FIXED + more)[:, None] * IN + column[None, :]
            weight = tl.load(fixed + where, mask=(more < FIXED)[:, None] & (column < IN)[None, :], other=0.0)
            total += tl.dot(outer, weight)
    tl.store(out + place, total, mask=(token < tokens)[:, None] & (column < IN)[None, :])


@triton.jit
def gate(gates, ups, out, count, BLOCK: tl.constexpr):
    """out = silu(gate) * up."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    g = tl.load(gates + place, mask=inside).to(tl.float32)
    u = tl.load(ups + place, mask=inside).to(tl.float32)
    tl.store(out + place, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def gate_backward(gates, ups, gradient, gates_out, ups_out, count, BLOCK: tl.constexpr):
    """Gradients of gate and up."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    g = tl.load(gates + place, mask=inside).to(tl.float32)
    u = tl.load(ups + place, mask=inside).to(tl.float32)
    d = tl.load(gradient + place, mask=inside).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(gates_out + place, d * u * s * (1 + g * (1 - s)), mask=inside)
    tl.store(ups_out + place, d * g * s, mask=inside)


@triton.jit
def rotate(x, out, cosines, sines, length, sign, HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr):
    """Rotary embedding of one token's heads: x and out (tokens, HEADS, 2 HALF), cosines and sines (length, 2 HALF)."""
    token = tl.program_id(0)
    heads = tl.arange(0, PADDED)[:, None]
    columns = tl.arange(0, HALF)[None, :]
    inside = heads < HEADS
    place = token.to(tl.int64) * HEADS * 2 * HALF + heads * 2 * HALF + columns
    angle = (token % length) * 2 * HALF + columns
    c = tl.load(cosines + angle).to(tl.float32)
    s = tl.load(sines + angle).to(tl.float32) * sign
    first = tl.load(x + place, mask=inside).to(tl.float32)
    second = tl.load(x + place + HALF, mask=inside).to(tl.float32)
    tl.store(out + place, first * c - second * s, mask=inside)
    tl.store(out + place + HALF, second * c + first * s, mask=inside)


@triton.jit
def cross_entropy(logits, targets, share, losses, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Per row: its loss, and in place of its logits the gradient of share * loss."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * WORDS
    largest = -float("inf")
    total = 0.0
    for first in range(0, WORDS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < WORDS, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(value))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(value - higher))
        largest = higher
    normaliser = largest + tl.log(total)
    target = tl.load(targets + row)
    weight = tl.load(share + row)
    tl.store(losses + row, normaliser - tl.load(logits + target).to(tl.float32))
    tl.debug_barrier()  # the target's logit is read before it is overwritten
    for first in range(0, WORDS, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < WORDS, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(value - normaliser) - tl.where(column == target, 1.0, 0.0)
        tl.store(logits + column, gradient * weight, mask=column < WORDS)
