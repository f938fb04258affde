"""Attention over exact tokens in Triton: what a split of them adds up to. See `triton_decode.py`."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

import math

import triton
from triton import language as tl

EXACT_SPLIT = tl.constexpr(256)  # places of a split
_TILE = tl.constexpr(64)

LOWEST = tl.constexpr(-1e30)  # a maximum of no scores; scores that are hidden are less
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def capped(scores, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return scores, of which queries are scaled by 1 / softcap if there is one, times log2(e)."""
    if HAS_SOFTCAP:  # tanh(15) is 1 in float32, and beyond it the power would overflow
        tanh = 1 - 2 / (1 + tl.exp2(2 * LOG2_E * tl.minimum(scores, 15.0)))
        scores = softcap * tanh
    return scores


@triton.jit
def attend_exact(
    queries,
    keys,
    values,
    slots,
    positions,
    exact_starts,
    first_visible,
    split,
    head,
    request,
    num_kv_heads,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_COLS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLS: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    RING_SIZE: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Return maxima, denominators ``[rows]`` and sums ``[rows, value cols]`` over some places of a slot."""
    NUM_PLACES: tl.constexpr = NUM_SINKS + RING_SIZE
    row = tl.arange(0, ROWS)
    key_col = tl.arange(0, KEY_COLS)
    value_col = tl.arange(0, VALUE_COLS)
    query_row = (request * num_kv_heads + head) * GROUP + row
    query = tl.load(
        queries + query_row[:, None] * KEY_DIM + key_col[None, :],
        (row < GROUP)[:, None] & (key_col < KEY_DIM)[None, :],
        0,
    )
    if IN_FLOAT32:
        query = query.to(tl.float32)
    position = tl.load(positions + request)
    exact_start = tl.load(exact_starts + request)
    first = tl.load(first_visible + request)
    newest = tl.maximum(position - NUM_SINKS, 0)
    slot = (tl.load(slots + request).to(tl.int64) * num_kv_heads + head) * NUM_PLACES
    top = tl.full([ROWS], LOWEST, tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_COLS], tl.float32)
    end = tl.minimum((split + 1) * EXACT_SPLIT, NUM_PLACES)
    for start in tl.range(split * EXACT_SPLIT, end, _TILE):
        place = start + tl.arange(0, _TILE)
        age = (newest % RING_SIZE + RING_SIZE - (place - NUM_SINKS)) % RING_SIZE
        held = tl.where(place < NUM_SINKS, place, NUM_SINKS + newest - age)
        is_after_blocks = (held >= exact_start) & (position >= NUM_SINKS)
        is_seen = (place < NUM_PLACES) & (held <= position) & (held >= first)
        is_seen &= (place < NUM_SINKS) | is_after_blocks
        key = tl.load(
            keys + slot * KEY_DIM + place[None, :] * KEY_DIM + key_col[:, None],
            is_seen[None, :] & (key_col < KEY_DIM)[:, None],
            0,
        )
        value = tl.load(
            values + slot * VALUE_DIM + place[:, None] * VALUE_DIM + value_col[None, :],
            is_seen[:, None] & (value_col < VALUE_DIM)[None, :],
            0,
        )
        if IN_FLOAT32:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = capped(tl.dot(query, key, input_precision="ieee") * scale, softcap, HAS_SOFTCAP)
        scores = tl.where(is_seen[None, :], scores, -float("inf"))
        raised = tl.maximum(top, tl.max(scores, 1))
        decay = tl.exp2(top - raised)
        weights = tl.exp2(scores - raised[:, None])
        denominator = denominator * decay + tl.sum(weights, 1)
        sums *= decay[:, None]
        rounded = weights.to(value.dtype)
        sums = tl.dot(rounded, value, sums, input_precision="ieee")
        if not IN_FLOAT32:
            rest = (weights - rounded.to(tl.float32)).to(value.dtype)
            sums = tl.dot(rest, value, sums)
        top = raised
    return top, denominator, sums
