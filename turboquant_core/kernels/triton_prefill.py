"""Attention of a request's new tokens over its past and themselves, on a GPU: `reference.prefill_attention`.

Exact tokens are attended to where they lie. Of blocks, so many as scratch memory is kept for are read at a
time and attended to in the space that they are stored in; queries are brought there, and averages back.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from turboquant_core.block_codec import BlockCodec
from turboquant_core.config import BLOCK_SIZE
from turboquant_core.exact_codec import ExactCodec
from turboquant_core.kernels.triton_dense import attend_dense
from turboquant_core.kernels.triton_exact import LOG2_E
from turboquant_core.kernels.triton_multiply import multiply
from turboquant_core.kernels.triton_read import read_blocks
from turboquant_core.prefill_plan import PrefillPlan
from turboquant_core.reference import AttentionOptions, Codec

# Numbers of keys and values that are read at once; in 16 bits they stay in the L2 cache until they are used.
_SCRATCH_NUMBERS = 2**24


class Found(NamedTuple):
    """What has been found for each token and head.

    Attributes:
        averages: Of values, float32 ``[num_tokens, num_heads, value_dim]``, contiguous.
        weights: Their weights' base-2 logarithms, float32 ``[num_tokens, num_heads]``; very low for none.
    """

    averages: Tensor
    weights: Tensor


def nothing_found(num_tokens: int, num_heads: int, value_dim: int, device: torch.device) -> Found:
    """Return what the first call writes to; nothing in it is read."""
    averages = torch.empty(num_tokens, num_heads, value_dim, device=device)
    return Found(averages, torch.empty(num_tokens, num_heads, device=device))


def attend_exact(
    queries: Tensor,
    held: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    found: Found,
    plan: PrefillPlan,
    options: AttentionOptions,
) -> None:
    """Attend to the exact tokens before the chunks of a plan and to the chunks themselves.

    Args:
        queries: ``[num_tokens, num_heads, key_dim]``, the last dimension contiguous, as of all tensors here.
        held: Keys ``[num_kv_heads, num_held, key_dim]`` and values: those before the chunks.
        new: Keys ``[num_kv_heads, num_tokens, key_dim]`` and values: the chunks' own.
        found: Is overwritten.
        plan: Which of both each query sees.
        options: How scores are made; sink scores are left out.
    """
    _launch(queries, *new, *held, found, plan, options, plan.start, is_exact=True, continues=False)


def attend_stored(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    found: Found,
    plan: PrefillPlan,
    options: AttentionOptions,
    *,
    continues: bool,
) -> None:
    """Attend to keys and values that were read from blocks.

    Args:
        queries: ``[num_tokens, num_heads, key_dim]``, for keys as they are given here.
        keys: ``[num_kv_heads, num_keys, key_dim]``.
        values: ``[num_kv_heads, num_keys, value_dim]``.
        start: Position of the first key.
        found: What is found is added to it.
        plan: Which of them each query sees.
        options: How scores are made; sink scores are left out.
        continues: Something has been found before; otherwise `found` is overwritten.
    """
    _launch(
        queries, keys, values, keys, values, found, plan, options, start, is_exact=False, continues=continues
    )


def _launch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    held_keys: Tensor,
    held_values: Tensor,
    found: Found,
    plan: PrefillPlan,
    options: AttentionOptions,
    key_start: int,
    *,
    is_exact: bool,
    continues: bool,
) -> None:
    num_tokens, num_heads, key_dim = queries.shape
    num_kv_heads, num_keys, value_dim = values.shape
    num_held = held_keys.shape[1] if is_exact else 0
    is_wide = max(key_dim, value_dim) > 128
    in_float32 = queries.dtype == torch.float32
    tile = 32 if in_float32 else 64
    softcap, scale = options.softcap, options.softmax_scale
    has_window = plan.first_visible is not None
    with torch.cuda.device_of(queries):
        attend_dense[(triton.cdiv(num_tokens, tile), num_heads)](
            queries,
            keys,
            values,
            held_keys,
            held_values,
            found.averages,
            found.weights,
            plan.exact_starts,
            plan.first_visible if has_window else plan.exact_starts,
            num_tokens,
            num_keys,
            num_held,
            plan.num_sinks,
            plan.start,
            key_start,
            num_heads // num_kv_heads,
            *queries.stride()[:2],
            *keys.stride()[:2],
            *values.stride()[:2],
            *held_keys.stride()[:2],
            *held_values.stride()[:2],
            scale * LOG2_E.value if softcap is None else scale / softcap,
            0.0 if softcap is None else softcap * LOG2_E.value,
            HAS_SOFTCAP=softcap is not None,
            HAS_WINDOW=has_window,
            IS_EXACT=is_exact,
            CONTINUES=continues,
            KEY_DIM=key_dim,
            KEY_COLS=triton.next_power_of_2(key_dim),
            VALUE_DIM=value_dim,
            VALUE_COLS=triton.next_power_of_2(value_dim),
            ROWS=tile,
            COLS=32 if is_wide else tile,
            num_warps=8 if is_wide else 4,
            num_stages=1 if in_float32 else 2 if is_wide or torch.version.hip else 3,
        )


def prefill_attention(
    queries: Tensor,
    held: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    records: Tensor,
    plan: PrefillPlan,
    codec: Codec,
    options: AttentionOptions,
) -> Tensor:
    """Attend for chunks of one request; arguments and result are those of the reference."""
    num_tokens, num_heads, _ = queries.shape
    num_kv_heads, _, value_dim = new[1].shape
    exact = nothing_found(num_tokens, num_heads, value_dim, queries.device)
    attend_exact(queries, held, new, exact, plan, options)
    if isinstance(codec, ExactCodec):
        _attend_blocks(queries, records, exact, plan, codec, options, value_dim, continues=True)
    logarithms = [exact.weights]
    if options.sink_scores is not None:
        logarithms.append((options.sink_scores.float() * LOG2_E.value).expand_as(exact.weights))
    if isinstance(codec, BlockCodec) and plan.block_ids.numel():
        _, _, key_matrices = codec.key_quantizer.transform.matrices(queries.device)
        _, value_matrices, _ = codec.value_quantizer.transform.matrices(queries.device)
        stored = nothing_found(num_tokens, num_heads, value_dim, queries.device)
        stored_queries = multiply(queries, key_matrices, num_kv_heads, queries.dtype)
        _attend_blocks(stored_queries, records, stored, plan, codec, options, value_dim, continues=False)
        shares = _shares([stored.weights, *logarithms])
        return multiply(stored.averages, value_matrices, num_kv_heads, queries.dtype, exact.averages, shares)
    averages = exact.averages
    if options.sink_scores is not None:
        averages = averages * _shares(logarithms)[0].unsqueeze(-1)
    return averages.to(queries.dtype)


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
    numbers_per_token = records.shape[1] * (queries.shape[-1] + value_dim)
    most_blocks = max(1, _SCRATCH_NUMBERS // (BLOCK_SIZE * numbers_per_token))
    for first in range(0, len(plan.block_ids), most_blocks):
        block_ids = plan.block_ids[first : first + most_blocks]
        sizes = (records.shape[1], BLOCK_SIZE * len(block_ids))
        keys, values = queries.new_empty(*sizes, queries.shape[-1]), queries.new_empty(*sizes, value_dim)
        read_blocks(records, block_ids, codec, keys, values)
        start = plan.blocks_start + BLOCK_SIZE * first
        attend_stored(queries, keys, values, start, found, plan, options, continues=continues or first > 0)


def _shares(logarithms: list[Tensor]) -> Tensor:
    """Return the shares of weights, whose base-2 logarithms are given, in their sum."""
    shares: Tensor = (torch.stack(logarithms) / LOG2_E.value).softmax(0)
    return shares
