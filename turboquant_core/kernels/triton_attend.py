"""The splits of decode attention in Triton; of blocks here, of exact tokens in `triton_exact.py`."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

import triton
from triton import language as tl

from turboquant_core.kernels.triton_exact import LOWEST, attend_exact, capped
from turboquant_core.kernels.triton_launch import quick_launch
from turboquant_core.kernels.triton_levels import read_levels
from turboquant_core.kernels.triton_places import key_words, mean_places_of, norm_places_of, value_words

# A split of blocks has at least so many; a request has at most so many splits of them.
MIN_SPLIT = tl.constexpr(4)
MAX_SPLITS = tl.constexpr(64)

# Weights times norms are multiplied with levels in float16: at most this, so that small ones keep their bits.
_PEAK_WEIGHT = tl.constexpr(32768.0)


@triton.jit
def _attend_blocks(
    stored_queries,
    words,
    halves,
    integers,
    block_table,
    hidden_end,
    first,
    last,
    head,
    request,
    num_kv_heads,
    scale,
    softcap,
    key_unit,
    value_unit,
    HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_COLS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_CURVE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_CURVE: tl.constexpr,
    STARTS: tl.constexpr,
):
    """Return maxima, denominators and sums over some blocks: as `_attend_exact`, of stored values."""
    KEY_TILES: tl.constexpr = (KEY_DIM + 15) // 16  # beside each other
    VALUE_TILES: tl.constexpr = (VALUE_DIM + 15) // 16
    row = tl.arange(0, ROWS)
    key_col = tl.arange(0, KEY_COLS)
    value_col = tl.arange(0, VALUE_COLS)
    token = tl.arange(0, 64)

    key_tile, key_lane, key_offsets, is_key_tile = key_words(KEY_DIM, KEY_COLS, STARTS)
    value_tile, value_lane, value_offsets, is_value_tile = value_words(VALUE_DIM, VALUE_COLS, STARTS)
    norm_places = norm_places_of(token, STARTS)
    key_mean_places, value_mean_places = mean_places_of(key_col, value_col, KEY_DIM, VALUE_DIM, STARTS)
    is_key_col = key_col < KEY_DIM
    is_value_col = value_col < VALUE_DIM

    query_row = (request * num_kv_heads + head) * GROUP + row
    is_query = (row < GROUP)[:, None] & is_key_col[None, :]
    query = scale * tl.load(stored_queries + query_row[:, None] * KEY_DIM + key_col[None, :], is_query, 0)
    # Levels have units of their own, and queries are at most 1 in float16.
    peak = tl.max(tl.abs(query), 1)
    rounded_query = (query / tl.where(peak > 0, peak, 1)[:, None]).to(tl.float16)
    peak *= key_unit

    top = tl.full([ROWS], LOWEST, tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_COLS], tl.float32)
    for index in tl.range(first, last):
        record = (tl.load(block_table + index).to(tl.int64) * num_kv_heads + head) * STARTS[8]
        record_words = words + record // 4
        record_halves = halves + record // 2
        record_integers = integers + record
        levels = read_levels(
            record_words,
            key_offsets,
            key_tile,
            key_lane,
            is_key_tile,
            2 * KEY_TILES,
            KEY_BITS,
            KEY_CURVE,
            2,
        )
        scores = tl.dot(rounded_query, levels)
        key_norms = tl.load(record_halves + norm_places).to(tl.float32)
        steps = record_halves + STARTS[5] // 2
        scores *= peak[:, None] * key_norms[None, :]
        mean = tl.load(record_integers + key_mean_places, is_key_col, 0).to(tl.float32)
        scores += (tl.sum(query * mean[None, :], 1) * tl.load(steps).to(tl.float32))[:, None]
        is_seen = index * 64 + token >= hidden_end
        scores = tl.where(is_seen[None, :], capped(scores, softcap, HAS_SOFTCAP), -float("inf"))

        raised = tl.maximum(top, tl.max(scores, 1))
        decay = tl.exp2(top - raised)
        weights = tl.exp2(scores - raised[:, None])
        weight = tl.sum(weights, 1)
        denominator = denominator * decay + weight
        top = raised

        levels = read_levels(
            record_words,
            value_offsets,
            value_tile,
            value_lane,
            is_value_tile,
            2 * VALUE_TILES,
            VALUE_BITS,
            VALUE_CURVE,
            8,
        )
        norms = tl.load(record_halves + norm_places + 2).to(tl.float32)
        norms = tl.where(is_seen, norms, 0)
        longest = tl.max(norms, 0)
        factors = norms * (_PEAK_WEIGHT / tl.where(longest > 0, longest, 1))
        rounded = (weights * factors[None, :]).to(tl.float16)
        added = tl.dot(rounded, levels)
        sums = sums * decay[:, None] + added * (longest * (value_unit / _PEAK_WEIGHT))
        mean = tl.load(record_integers + value_mean_places, is_value_col, 0).to(tl.float32)
        sums += (weight * tl.load(steps + 1).to(tl.float32))[:, None] * mean[None, :]
    return top, denominator, sums


@triton.jit
def blocks_per_split(num_blocks):
    return tl.maximum(MIN_SPLIT, tl.cdiv(num_blocks, MAX_SPLITS))


_TABLES = [
    "slots",
    "positions",
    "exact_starts",
    "first_visible",
    "block_tables",
    "block_starts",
    "num_blocks",
]


@quick_launch
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=_TABLES)
def attend(
    queries,
    stored_queries,
    keys,
    values,
    words,
    halves,
    integers,
    slots,
    positions,
    exact_starts,
    first_visible,
    block_tables,
    block_starts,
    num_blocks,
    partial_sums,
    partial_stats,
    table_stride,
    num_kv_heads,
    scale,
    softcap,
    key_unit,
    value_unit,
    HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_COLS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_CURVE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_CURVE: tl.constexpr,
    STARTS: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    RING_SIZE: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    NUM_EXACT_SPLITS: tl.constexpr,
):
    """Write what one split of one request and kv head finds; splits without a block write nothing."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    count = tl.load(num_blocks + request)
    per_split = blocks_per_split(count)
    first = (split - NUM_EXACT_SPLITS) * per_split
    if first >= count:
        return
    if split < NUM_EXACT_SPLITS:
        top, denominator, sums = attend_exact(
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
            HAS_SOFTCAP,
            GROUP,
            ROWS,
            KEY_DIM,
            KEY_COLS,
            VALUE_DIM,
            VALUE_COLS,
            NUM_SINKS,
            RING_SIZE,
            IN_FLOAT32,
        )
    else:
        hidden_end = tl.load(first_visible + request) - tl.load(block_starts + request)
        top, denominator, sums = _attend_blocks(
            stored_queries,
            words,
            halves,
            integers,
            block_tables + request.to(tl.int64) * table_stride,
            hidden_end,
            first,
            tl.minimum(first + per_split, count),
            head,
            request,
            num_kv_heads,
            scale,
            softcap,
            key_unit,
            value_unit,
            HAS_SOFTCAP,
            GROUP,
            ROWS,
            KEY_DIM,
            KEY_COLS,
            KEY_BITS,
            KEY_CURVE,
            VALUE_DIM,
            VALUE_COLS,
            VALUE_BITS,
            VALUE_CURVE,
            STARTS,
        )
    row = tl.arange(0, ROWS)
    col = tl.arange(0, VALUE_COLS)
    query_row = ((request * num_kv_heads + head) * GROUP + row).to(tl.int64)
    partial = query_row * tl.num_programs(0) + split
    tl.store(
        partial_sums + partial[:, None] * VALUE_DIM + col[None, :],
        sums,
        (row < GROUP)[:, None] & (col < VALUE_DIM)[None, :],
    )
    tl.store(partial_stats + 2 * partial, top, row < GROUP)
    tl.store(partial_stats + 2 * partial + 1, denominator, row < GROUP)
