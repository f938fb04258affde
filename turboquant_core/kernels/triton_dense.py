"""Attention of a request's new tokens over keys and values that lie token by token, in Triton.

The tokens are those of a `PrefillPlan`. Each sees keys as they came from its exact start on, and those before
as blocks give them: a call is for one or the other, and for all runs. What calls find is joined by the
logarithms of its weights.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

import triton
from triton import language as tl

from turboquant_core.kernels.triton_exact import LOWEST, capped
from turboquant_core.kernels.triton_launch import quick_launch

# Kinds of keys: exact ones before the new tokens, those tokens themselves, and what blocks give.
_HELD = tl.constexpr(0)
_NEW = tl.constexpr(1)
_STORED = tl.constexpr(2)


@triton.jit
def _attend_keys(
    query,
    keys,
    values,
    key_stride,
    value_stride,
    places,
    begin,
    end,
    num_keys,
    first_position,
    num_sinks,
    query_position,
    exact_start,
    first_visible,
    scale,
    softcap,
    top,
    denominator,
    sums,
    KIND: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_COLS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Go on with keys from `begin` to `end`; those that are held lie at `places`, the sinks first."""
    key_dim = tl.arange(0, KEY_COLS)
    value_dim = tl.arange(0, VALUE_COLS)
    for start in tl.range(begin, end, COLS):
        index = start + tl.arange(0, COLS)
        place = index
        if KIND == _HELD:
            place = tl.load(places + index, index < num_keys, 0).to(tl.int32)
        key_places = keys + place[None, :] * key_stride + key_dim[:, None]
        value_places = values + place[:, None] * value_stride + value_dim[None, :]
        if IS_MASKED:
            is_key = index < num_keys
            key = tl.load(key_places, is_key[None, :] & (key_dim < KEY_DIM)[:, None], 0)
            value = tl.load(value_places, is_key[:, None] & (value_dim < VALUE_DIM)[None, :], 0)
        elif KEY_DIM < KEY_COLS or VALUE_DIM < VALUE_COLS:
            key = tl.load(key_places, (key_dim < KEY_DIM)[:, None], 0)
            value = tl.load(value_places, (value_dim < VALUE_DIM)[None, :], 0)
        else:
            key = tl.load(key_places)
            value = tl.load(value_places)
        scores = capped(tl.dot(query, key, input_precision="ieee") * scale, softcap, HAS_SOFTCAP)
        if IS_MASKED:
            position = first_position + index
            if KIND == _HELD:
                position = tl.where(index < num_sinks, index, position)
            is_after_blocks = position[None, :] >= exact_start[:, None]
            if KIND == _HELD:
                is_seen = is_after_blocks == (index >= num_sinks)[None, :]
            elif KIND == _NEW:
                is_seen = is_after_blocks & (position[None, :] <= query_position[:, None])
            else:
                is_seen = position[None, :] < exact_start[:, None]
            if HAS_WINDOW:
                is_seen &= position[None, :] >= first_visible[:, None]
            scores = tl.where(is_seen & is_key[None, :], scores, -float("inf"))
        raised = tl.maximum(top, tl.max(scores, 1))
        decay = tl.exp2(top - raised)
        weights = tl.exp2(scores - raised[:, None])
        denominator = denominator * decay + tl.sum(weights, 1)
        sums = tl.dot(weights.to(value.dtype), value, sums * decay[:, None], input_precision="ieee")
        top = raised
    return top, denominator, sums


@quick_launch
@triton.jit(
    do_not_specialize=["first_of_piece", "blocks_of_piece", "first_key", "group"],
    do_not_specialize_on_alignment=["table", "tiles", "exact_starts", "all_first_visible", "held_places"],
)
def attend_dense(
    queries,
    keys,
    values,
    slot_keys,
    slot_values,
    averages,
    all_weights,
    table,
    tiles,
    exact_starts,
    all_first_visible,
    held_places,
    first_of_piece,
    blocks_of_piece,
    first_key,
    group,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    slot_key_stride,
    slot_key_head_stride,
    place_key_stride,
    slot_value_stride,
    slot_value_head_stride,
    place_value_stride,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_EXACT: tl.constexpr,
    CONTINUES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_COLS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLS: tl.constexpr,
    TILE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    PARTS: tl.constexpr = TILE_SIZE // ROWS
    tile = tiles + tl.program_id(1) // PARTS * 2
    run = table + tl.load(tile) * 10
    first_row = tl.load(tile + 1).to(tl.int32) + tl.program_id(1) % PARTS * ROWS
    head = tl.program_id(0).to(tl.int64)
    kv_head = head // group
    first_token = tl.load(run)
    num_tokens = tl.load(run + 1).to(tl.int32)
    start = tl.load(run + 2).to(tl.int32)
    if first_row >= num_tokens:
        return
    if IS_EXACT:
        num_keys = num_tokens
        key_start = start
        keys += first_token * key_stride
        values += first_token * value_stride
    else:
        first_block = tl.load(run + 7).to(tl.int32)
        begin_block = tl.maximum(first_block, first_of_piece)
        end_block = tl.minimum(first_block + tl.load(run + 8).to(tl.int32), first_of_piece + blocks_of_piece)
        num_keys = tl.maximum(end_block - begin_block, 0) * 64
        key_start = tl.load(run + 9).to(tl.int32) + (begin_block - first_block) * 64
        keys += (begin_block - first_of_piece).to(tl.int64) * 64 * key_stride
        values += (begin_block - first_of_piece).to(tl.int64) * 64 * value_stride
    keys += kv_head * key_head_stride
    values += kv_head * value_head_stride
    row = first_row + tl.arange(0, ROWS)
    is_row = row < num_tokens
    token = first_token + row
    exact_starts += first_token
    all_first_visible += first_token
    key_dim = tl.arange(0, KEY_COLS)
    value_dim = tl.arange(0, VALUE_COLS)
    query = tl.load(
        queries + token[:, None] * query_stride + head * query_head_stride + key_dim[None, :],
        is_row[:, None] & (key_dim < KEY_DIM)[None, :],
        0,
    )
    position = start + row
    exact_start = tl.load(exact_starts + row, is_row, 0).to(tl.int32)
    first_visible = exact_start
    lowest = 0
    if HAS_WINDOW:
        first_visible = tl.load(all_first_visible + row, is_row, 0).to(tl.int32)
        lowest = tl.load(all_first_visible + first_row).to(tl.int32)
    lowest_exact = tl.load(exact_starts + first_row).to(tl.int32)
    if IS_EXACT:
        begin = tl.maximum(tl.maximum(lowest, lowest_exact) - key_start, 0) // COLS * COLS
        middle = begin
        end = tl.minimum(num_keys, first_row + ROWS)
    else:
        last_row = tl.minimum(first_row + ROWS, num_tokens) - 1
        begin = tl.maximum(lowest - key_start, first_key) // COLS * COLS
        # From here on not all of these queries see all keys.
        middle = tl.maximum(tl.minimum(num_keys, lowest_exact - key_start) // COLS * COLS, begin)
        end = tl.minimum(num_keys, tl.load(exact_starts + last_row).to(tl.int32) - key_start)
        if HAS_WINDOW:
            middle = begin
        if CONTINUES and end <= begin:
            return
    top = tl.full([ROWS], LOWEST, tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_COLS], tl.float32)
    if IS_EXACT:
        slot = tl.load(run + 3)
        num_held = tl.load(run + 5).to(tl.int32)
        num_sinks = tl.load(run + 6).to(tl.int32)
        slot_keys += slot * slot_key_stride + kv_head * slot_key_head_stride
        slot_values += slot * slot_value_stride + kv_head * slot_value_head_stride
        top, denominator, sums = _attend_keys(
            query, slot_keys, slot_values, place_key_stride, place_value_stride,
            held_places + tl.load(run + 4), 0, num_held, num_held,
            start - num_held, num_sinks, position, exact_start, first_visible, scale, softcap,
            top, denominator, sums, _HELD, True,
            HAS_SOFTCAP, HAS_WINDOW, KEY_DIM, KEY_COLS, VALUE_DIM, VALUE_COLS, COLS,
        )  # fmt: skip
    elif not HAS_WINDOW:
        top, denominator, sums = _attend_keys(
            query, keys, values, key_stride, value_stride, held_places, begin, middle, num_keys,
            key_start, 0, position, exact_start, first_visible, scale, softcap,
            top, denominator, sums, _STORED, False,
            HAS_SOFTCAP, HAS_WINDOW, KEY_DIM, KEY_COLS, VALUE_DIM, VALUE_COLS, COLS,
        )  # fmt: skip
    top, denominator, sums = _attend_keys(
        query, keys, values, key_stride, value_stride, held_places, middle, end, num_keys,
        key_start, 0, position, exact_start, first_visible, scale, softcap,
        top, denominator, sums, _NEW if IS_EXACT else _STORED, True,
        HAS_SOFTCAP, HAS_WINDOW, KEY_DIM, KEY_COLS, VALUE_DIM, VALUE_COLS, COLS,
    )  # fmt: skip
    rows = token * tl.num_programs(0) + head
    is_number = is_row[:, None] & (value_dim < VALUE_DIM)[None, :]
    average_places = averages + rows[:, None] * VALUE_DIM + value_dim[None, :]
    average = sums / tl.where(denominator > 0, denominator, 1)[:, None]
    weight = tl.where(denominator > 0, top + tl.log2(denominator), LOWEST)
    if CONTINUES:
        before = tl.load(all_weights + rows, is_row, LOWEST)
        highest = tl.maximum(weight, before)
        share, share_before = tl.exp2(weight - highest), tl.exp2(before - highest)
        total = share + share_before
        earlier = tl.load(average_places, is_number, 0)
        average = average * (share / total)[:, None] + earlier * (share_before / total)[:, None]
        weight = highest + tl.log2(total)
    tl.store(average_places, average, is_number)
    tl.store(all_weights + rows, weight, is_row)
