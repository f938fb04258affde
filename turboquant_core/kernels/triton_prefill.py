"""Attention of a step's new tokens over their past and themselves, on a GPU: `reference.prefill_attention`.

It takes as many launches for many requests as for one. Exact tokens are attended to where they lie. Of
blocks, so many as scratch memory is kept for are read at a time and attended to in the space that they are
stored in; queries are brought there, and averages back.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from turboquant_core.config import BLOCK_SIZE
from turboquant_core.exact_codec import ExactCodec
from turboquant_core.kernels.cudnn_past import attend_past
from turboquant_core.kernels.triton_dense import attend_dense
from turboquant_core.kernels.triton_exact import LOG2_E
from turboquant_core.kernels.triton_found import Found
from turboquant_core.kernels.triton_launch import next_power_of_2
from turboquant_core.kernels.triton_multiply import multiply
from turboquant_core.kernels.triton_read import read_blocks
from turboquant_core.prefill_plan import TILE_SIZE, PrefillPlan
from turboquant_core.reference import AttentionOptions, Codec

T = TypeVar("T")

# Numbers of keys and values that are read at once; in 16 bits they stay in the L2 cache until they are used.
_SCRATCH_NUMBERS = 2**24


def attend_exact(
    queries: Tensor,
    new: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    found: Found,
    plan: PrefillPlan,
    options: AttentionOptions,
) -> None:
    """Attend to the exact tokens before each run and to the runs themselves.

    Args:
        queries: ``[num_tokens, num_heads, key_dim]``, the last dimension contiguous, as of all tensors here.
        new: Keys ``[num_tokens, num_kv_heads, key_dim]`` and values: the step's own.
        exact: Keys ``[num_slots, num_kv_heads, num_places, key_dim]`` and values: what slots keep.
        found: Is overwritten.
        plan: Which of both each query sees.
        options: How scores are made; sink scores are left out.
    """
    _launch(queries, *new, exact, found, plan, options, is_exact=True, continues=False)


def attend_stored(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    piece: slice,
    found: Found,
    plan: PrefillPlan,
    options: AttentionOptions,
    first_key: int = 0,
    *,
    continues: bool,
) -> None:
    """Attend to keys and values that were read from blocks.

    Args:
        queries: ``[num_tokens, num_heads, key_dim]``, for keys as they are given here.
        keys: ``[num_keys, num_kv_heads, key_dim]``.
        values: ``[num_keys, num_kv_heads, value_dim]``.
        piece: Which of the plan's blocks they are of.
        found: What is found is added to it.
        plan: Which of them each query sees.
        options: How scores are made; sink scores are left out.
        first_key: What is before this key has been attended to.
        continues: Something has been found before; otherwise `found` is overwritten.
    """
    _launch(
        queries,
        keys,
        values,
        None,
        found,
        plan,
        options,
        piece,
        first_key,
        is_exact=False,
        continues=continues,
    )


def _launch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    exact: tuple[Tensor, Tensor] | None,
    found: Found,
    plan: PrefillPlan,
    options: AttentionOptions,
    piece: slice = slice(0, 0),
    first_key: int = 0,
    *,
    is_exact: bool,
    continues: bool,
) -> None:
    num_heads, key_dim = queries.shape[1:]
    num_kv_heads, value_dim = values.shape[1:]
    slot_keys, slot_values = exact or (keys[None], values[None])
    is_wide = max(key_dim, value_dim) > 128
    in_float32 = queries.dtype == torch.float32
    rows = 32 if in_float32 else TILE_SIZE
    softcap, scale = options.softcap, options.softmax_scale
    has_window = plan.first_visible is not None
    # Heads first: what thread blocks write at a time lies together then.
    attend_dense[(num_heads, plan.tiles.shape[0] * (TILE_SIZE // rows))](
        queries,
        keys,
        values,
        slot_keys,
        slot_values,
        found.averages,
        found.weights,
        plan.table,
        plan.tiles,
        plan.exact_starts,
        plan.first_visible if has_window else plan.exact_starts,
        plan.held_places,
        piece.start,
        piece.stop - piece.start,
        first_key,
        num_heads // num_kv_heads,
        *queries.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        *slot_keys.stride()[:3],
        *slot_values.stride()[:3],
        scale * LOG2_E.value if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * LOG2_E.value,
        HAS_SOFTCAP=softcap is not None,
        HAS_WINDOW=has_window,
        IS_EXACT=is_exact,
        CONTINUES=continues,
        KEY_DIM=key_dim,
        KEY_COLS=next_power_of_2(key_dim),
        VALUE_DIM=value_dim,
        VALUE_COLS=next_power_of_2(value_dim),
        TILE_SIZE=TILE_SIZE,
        ROWS=rows,
        COLS=32 if is_wide else rows,
        num_warps=8 if is_wide else 4,
        num_stages=1 if in_float32 else 2 if is_wide or torch.version.hip else 3,
    )


def prefill(
    queries: Tensor,
    new: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    records: Tensor,
    plan: PrefillPlan,
    codec: Codec,
    options: AttentionOptions,
) -> Tensor:
    """Attend for a step's new tokens, once slots and blocks have what they keep of these.

    Args:
        queries: ``[num_tokens, num_heads, key_dim]``.
        new: Keys ``[num_tokens, num_kv_heads, key_dim]`` and values.
        exact: Keys ``[num_slots, num_kv_heads, num_places, key_dim]`` and values: what slots keep.
        records: uint8 ``[num_blocks, num_kv_heads, record_bytes]``.
        plan: Which of all these each query sees.
        codec: Of the records.
        options: How scores are made.

    Returns:
        ``[num_tokens, num_heads, value_dim]`` in the dtype of the queries.
    """
    num_tokens, num_heads, _ = queries.shape
    _, num_kv_heads, value_dim = new[1].shape
    sizes, device = (num_tokens, num_heads, value_dim), queries.device
    weights, stored_weights = _once(plan, _weights, num_heads)
    found = Found(torch.empty(sizes, device=device), weights)
    attend_exact(queries, new, exact, found, plan, options)
    if isinstance(codec, ExactCodec):
        _attend_blocks(queries, records, found, plan, codec, options, value_dim, continues=True)
    elif plan.block_ids.numel():
        _, _, key_matrices = codec.key_quantizer.transform.matrices(device)
        _, value_matrices, _ = codec.value_quantizer.transform.matrices(device)
        stored = Found(torch.empty(sizes, device=device), stored_weights)
        stored_queries = multiply(queries, key_matrices, num_kv_heads, queries.dtype)
        _attend_blocks(stored_queries, records, stored, plan, codec, options, value_dim, continues=False)
        all_weights = [stored.weights, found.weights]
        if options.sink_scores is not None:
            all_weights.append(options.sink_scores.float() * LOG2_E.value)
        return multiply(
            stored.averages, value_matrices, num_kv_heads, queries.dtype, found.averages, all_weights
        )
    averages = found.averages
    if options.sink_scores is not None:
        total = torch.logaddexp2(found.weights, options.sink_scores.float() * LOG2_E.value)
        averages = averages * (found.weights - total).exp2().unsqueeze(-1)
    return averages.to(queries.dtype)


def _once(plan: PrefillPlan, make: Callable[..., T], *arguments: Hashable) -> T:
    """Return what a function makes of a plan, made for the first layer that asks; layers use it in turn."""
    made = plan.shared.get((make, arguments))
    if made is None:
        made = plan.shared[make, arguments] = make(plan, *arguments)
    return cast("T", made)


def _attend_blocks(
    queries: Tensor,
    records: Tensor,
    found: Found,
    plan: PrefillPlan,
    codec: Codec,
    options: AttentionOptions,
    value_dim: int,
    *,
    continues: bool,
) -> None:
    """Attend to blocks as they are stored, with queries for that; see `attend_stored`."""
    sizes = records.shape[1], queries.shape[-1], value_dim
    for blocks, block_ids, keys, values, by_token in _once(plan, _pieces, *sizes, queries.dtype):
        read_blocks(records, block_ids, codec, keys, values)
        continues = continues or blocks.start > 0
        num_attended = attend_past(queries, keys, values, blocks, found, plan, options, continues=continues)
        if num_attended == keys.shape[1]:
            continue
        continues = continues or num_attended > 0
        attend_stored(queries, *by_token, blocks, found, plan, options, num_attended, continues=continues)


class _Piece(NamedTuple):
    """Blocks that are read at a time.

    Attributes:
        blocks: Which of the plan's.
        block_ids: Theirs.
        keys: Where their keys are read to: ``[num_kv_heads, num_keys, key_dim]``, a head's lie together.
        values: Likewise.
        by_token: Both as ``[num_keys, num_kv_heads, dim]``.
    """

    blocks: slice
    block_ids: Tensor
    keys: Tensor
    values: Tensor
    by_token: tuple[Tensor, Tensor]


def _pieces(
    plan: PrefillPlan, num_kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> list[_Piece]:
    """Return a plan's blocks in pieces, all of which are read to the same memory."""
    num_blocks, device = plan.block_ids.shape[0], plan.block_ids.device
    most_blocks = max(1, _SCRATCH_NUMBERS // (BLOCK_SIZE * num_kv_heads * (key_dim + value_dim)))
    num_keys = BLOCK_SIZE * min(num_blocks, most_blocks)
    all_keys, all_values = (
        torch.empty(num_kv_heads, num_keys, dim, dtype=dtype, device=device) for dim in (key_dim, value_dim)
    )
    pieces = []
    for first in range(0, num_blocks, most_blocks):
        blocks = slice(first, min(num_blocks, first + most_blocks))
        num_keys = BLOCK_SIZE * (blocks.stop - first)
        keys, values = all_keys[:, :num_keys], all_values[:, :num_keys]
        by_token = keys.transpose(0, 1), values.transpose(0, 1)
        pieces.append(_Piece(blocks, plan.block_ids[blocks], keys, values, by_token))
    return pieces


def _weights(plan: PrefillPlan, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return weights of `Found` for exact tokens and for blocks; nothing in them is read."""
    weights = torch.empty(2, plan.exact_starts.shape[0], num_heads, device=plan.exact_starts.device)
    return weights[0], weights[1]
