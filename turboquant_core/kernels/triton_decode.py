"""Decode attention over exact tokens and blocks in Triton, for any GPU: see `reference.decode_attention`.

Four launches, none of which waits for the host: queries are transformed, splits of each request and kv head
attend, what they found is merged, and the sums of stored values are brought back. Splits are of exact tokens
or of blocks, and those of a request depend on nothing else. Knows requests by their rows in tables only.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from turboquant_core.block_codec import BlockCodec
from turboquant_core.kernels.triton_attend import MAX_SPLITS, MIN_SPLIT, attend, blocks_per_split
from turboquant_core.kernels.triton_exact import EXACT_SPLIT, LOG2_E, LOWEST
from turboquant_core.kernels.triton_launch import cdiv, next_power_of_2, quick_launch
from turboquant_core.kernels.triton_levels import level_curve
from turboquant_core.kernels.triton_multiply import multiply
from turboquant_core.kernels.triton_places import starts_of
from turboquant_core.reference import AttentionOptions
from turboquant_core.step_plan import DecodeTables
from turboquant_core.timeline import Timeline


def decode(
    queries: Tensor,
    exact: tuple[Tensor, Tensor],
    records: Tensor,
    tables: DecodeTables,
    timeline: Timeline,
    codec: BlockCodec,
    options: AttentionOptions,
) -> Tensor:
    """Attend for one new token of each of several requests.

    What a request gets does not depend on the others.

    Args:
        queries: ``[batch, num_heads, key_dim]``.
        exact: Keys ``[num_slots, num_kv_heads, num_sinks + ring_size, key_dim]`` and values, of all slots,
            the new tokens included.
        records: uint8 ``[num_blocks, num_kv_heads, record_bytes]``, of all requests.
        tables: What each request sees.
        timeline: Where tokens lie in a slot.
        codec: Of the records.
        options: How scores are made.

    Returns:
        ``[batch, num_heads, value_dim]`` in the dtype of the queries.
    """
    keys, values = exact
    batch, num_heads, key_dim = queries.shape
    num_kv_heads, value_dim = keys.shape[1], values.shape[3]
    group_size = num_heads // num_kv_heads
    queries = queries.contiguous()
    num_exact_splits = cdiv(timeline.num_exact, EXACT_SPLIT.value)
    num_splits = num_exact_splits + min(MAX_SPLITS.value, cdiv(tables.block_tables.shape[1], MIN_SPLIT.value))
    softcap = options.softcap
    scale = options.softmax_scale * LOG2_E.value if softcap is None else options.softmax_scale / softcap
    key_curve, key_unit = level_curve(codec.key_quantizer.dim, codec.key_quantizer.bits)
    value_curve, value_unit = level_curve(codec.value_quantizer.dim, codec.value_quantizer.bits)
    shape = {
        "VALUE_DIM": value_dim,
        "VALUE_COLS": next_power_of_2(value_dim),
        "NUM_EXACT_SPLITS": num_exact_splits,
    }
    partial_sums = torch.empty(batch, num_heads, num_splits, value_dim, device=queries.device)
    partial_stats = torch.empty(batch, num_heads, num_splits, 2, device=queries.device)
    exact_sums, stored_sums = torch.empty(2, batch, num_heads, value_dim, device=queries.device)
    _, _, key_matrices = codec.key_quantizer.transform.matrices(queries.device)
    stored_queries = multiply(queries, key_matrices, num_kv_heads, torch.float32)
    attend[(num_splits, num_kv_heads, batch)](
        queries,
        stored_queries,
        keys,
        values,
        records.view(torch.int32),
        records.view(torch.float16),
        records.view(torch.int8),
        tables.slots,
        tables.positions,
        tables.exact_starts,
        tables.first_visible,
        tables.block_tables,
        tables.block_starts,
        tables.num_blocks,
        partial_sums,
        partial_stats,
        tables.block_tables.stride(0),
        num_kv_heads,
        scale,
        0.0 if softcap is None else softcap * LOG2_E.value,
        key_unit,
        value_unit,
        HAS_SOFTCAP=softcap is not None,
        GROUP=group_size,
        ROWS=max(16, next_power_of_2(group_size)),
        KEY_DIM=key_dim,
        KEY_COLS=next_power_of_2(key_dim),
        KEY_BITS=codec.key_quantizer.bits,
        KEY_CURVE=key_curve,
        VALUE_BITS=codec.value_quantizer.bits,
        VALUE_CURVE=value_curve,
        STARTS=starts_of(key_dim, codec.key_quantizer.bits, value_dim, codec.value_quantizer.bits),
        NUM_SINKS=timeline.num_sinks,
        RING_SIZE=timeline.ring_size,
        num_warps=8 if max(key_dim, value_dim) > 128 else 4,
        num_stages=2,  # three would take more memory than a small GPU has
        IN_FLOAT32=torch.float32 in (queries.dtype, keys.dtype) or queries.dtype != keys.dtype,
        **shape,
    )
    sinks = options.sink_scores
    _merge[(num_heads, batch)](
        partial_sums,
        partial_stats,
        tables.num_blocks,
        sinks.float().contiguous() if sinks is not None else partial_stats,
        exact_sums,
        stored_sums,
        num_splits,
        HAS_SINKS=sinks is not None,
        TILE=16,
        **shape,
    )
    _, value_matrices, _ = codec.value_quantizer.transform.matrices(queries.device)
    return multiply(stored_sums, value_matrices, num_kv_heads, queries.dtype, exact_sums)


@quick_launch
@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["num_blocks"])
def _merge(
    partial_sums,
    partial_stats,
    num_blocks,
    sink_scores,
    exact,
    stored,
    num_splits,
    HAS_SINKS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLS: tl.constexpr,
    NUM_EXACT_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Join the splits of one request and query head: averages of exact and of stored values."""
    head = tl.program_id(0)
    request = tl.program_id(1)
    query_row = (request * tl.num_programs(0) + head).to(tl.int64)
    count = tl.load(num_blocks + request)
    num_used = NUM_EXACT_SPLITS + tl.cdiv(count, blocks_per_split(count))
    stats = partial_stats + 2 * query_row * num_splits
    all_splits = tl.arange(0, triton.next_power_of_2(NUM_EXACT_SPLITS + MAX_SPLITS))
    is_used = all_splits < num_used
    tops = tl.load(stats + 2 * all_splits, is_used, LOWEST)
    top = tl.max(tops, 0)
    if HAS_SINKS:
        sink = tl.load(sink_scores + head) * LOG2_E
        top = tl.maximum(top, sink)
    denominator = tl.sum(tl.exp2(tops - top) * tl.load(stats + 2 * all_splits + 1, is_used, 0), 0)
    if HAS_SINKS:
        denominator += tl.exp2(sink - top)
    col = tl.arange(0, VALUE_COLS)
    exact_sum = tl.zeros([VALUE_COLS], tl.float32)
    stored_sum = tl.zeros([VALUE_COLS], tl.float32)
    for start in tl.range(0, num_used, TILE):
        split = start + tl.arange(0, TILE)
        weight = tl.exp2(tl.load(stats + 2 * split, split < num_used, LOWEST) - top) / denominator
        sums = tl.load(
            partial_sums + (query_row * num_splits + split)[:, None] * VALUE_DIM + col[None, :],
            (split < num_used)[:, None] & (col < VALUE_DIM)[None, :],
            0,
        )
        weighted = weight[:, None] * sums
        is_exact = (split < NUM_EXACT_SPLITS)[:, None]
        exact_sum += tl.sum(tl.where(is_exact, weighted, 0), 0)
        stored_sum += tl.sum(tl.where(is_exact, 0, weighted), 0)
    tl.store(exact + query_row * VALUE_DIM + col, exact_sum, col < VALUE_DIM)
    tl.store(stored + query_row * VALUE_DIM + col, stored_sum, col < VALUE_DIM)
