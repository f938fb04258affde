"""Attention over exact tokens and blocks, in plain PyTorch: what kernels have to compute.

Queries are multiplied with stored keys in the space in which these are stored, and sums of stored values are
brought back at the end. Everything is float32. Knows neither requests nor where tensors come from.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from turboquant_core.block_codec import BlockCodec
from turboquant_core.config import BLOCK_SIZE
from turboquant_core.exact_codec import ExactCodec
from turboquant_core.prefill_plan import PlannedChunk, PrefillRun
from turboquant_core.softmax import RunningSoftmax
from turboquant_core.step_plan import DecodePlan

Codec: TypeAlias = BlockCodec | ExactCodec

# Numbers of keys and values that are read from blocks at once, which bounds scratch memory whatever the
# context. Fewer and larger operations win on both, up to here (measured on a CPU: 2^20 takes a sixth longer).
_CPU_NUMBERS = 2**22
_GPU_NUMBERS = 2**25


@dataclass(frozen=True)
class AttentionOptions:
    """How a model weighs keys, besides what it sees.

    Attributes:
        softmax_scale: Factor of the scores.
        softcap: Scores s become softcap * tanh(s / softcap), if given.
        sink_scores: ``[num_heads]``, scores of a key without a value, if given.
    """

    softmax_scale: float
    softcap: float | None = None
    sink_scores: Tensor | None = None


def prefill_attention(
    queries: Tensor,
    held: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    records: Tensor,
    run: PrefillRun,
    codec: Codec,
    options: AttentionOptions,
) -> Tensor:
    """Attend for chunks of one request that follow each other.

    Args:
        queries: ``[num_tokens, num_heads, key_dim]``.
        held: Keys ``[num_kv_heads, num_held, key_dim]`` and values: the exact tokens before the chunks.
        new: Keys ``[num_kv_heads, num_tokens, key_dim]`` and values: the chunks' own.
        records: uint8 ``[num_blocks, num_kv_heads, record_bytes]``, of all requests; those of blocks that
            are made of one chunk and seen by another are there.
        run: Which of all these each query sees.
        codec: Of the records.
        options: How scores are made.

    Returns:
        ``[num_tokens, num_heads, value_dim]`` in the dtype of the queries.
    """
    outputs = []
    for chunk in run.chunks:
        # Tokens of an earlier chunk, if they are not in blocks yet.
        rows = slice(max(0, chunk.exact_start - run.start), chunk.rows.stop)
        exact_keys, exact_values = (
            torch.cat([old, states[:, rows]], dim=1).float() for old, states in zip(held, new, strict=True)
        )
        outputs.append(
            _chunk_attention(
                queries[chunk.rows], (exact_keys, exact_values), rows, records, run, chunk, codec, options
            )
        )
    return torch.cat(outputs)


def _chunk_attention(
    queries: Tensor,
    exact: tuple[Tensor, Tensor],
    exact_rows: slice,
    records: Tensor,
    run: PrefillRun,
    chunk: PlannedChunk,
    codec: Codec,
    options: AttentionOptions,
) -> Tensor:
    """Attend for one chunk to the tokens that are held, to some of the run's own, and to blocks."""
    exact_keys, exact_values = exact
    exact_mask, block_mask = _masks(run, chunk, exact_rows)
    num_kv_heads, _, value_dim = exact_values.shape
    num_tokens = len(queries)
    # [num_kv_heads, heads of a group * num_tokens, key_dim]
    grouped = _grouped(queries, num_kv_heads, options).permute(1, 2, 0, 3).flatten(1, 2)
    sinks = _grouped_sinks(options, num_kv_heads)
    if sinks is not None:
        sinks = sinks.repeat_interleave(num_tokens, dim=1)
    softmax = RunningSoftmax((num_kv_heads, grouped.shape[1]), value_dim, queries.device, sinks)

    def add(scores: Tensor, mask: Tensor | None, weigh: Callable[[Tensor], Tensor]) -> None:
        scores = _capped(scores, options)
        if mask is not None:
            by_head: Tensor = scores.unflatten(1, (-1, num_tokens))
            scores = by_head.masked_fill_(~mask, -torch.inf).flatten(1, 2)
        softmax.add(scores, weigh)

    add(grouped @ exact_keys.mT, exact_mask, lambda weights: weights @ exact_values)
    transformed = codec.transform_queries(grouped)
    block_ids = run.block_ids[chunk.blocks]
    for piece in _pieces(len(block_ids), num_kv_heads * (queries.shape[2] + value_dim), queries.device):
        blocks = records.index_select(0, block_ids[piece]).transpose(0, 1)
        keys, values = (states.flatten(1, 2) for states in codec.stored(blocks))
        seen = block_mask
        if block_mask is not None:
            seen = block_mask[:, piece.start * BLOCK_SIZE : piece.stop * BLOCK_SIZE]
        add(transformed @ keys.mT, seen, lambda weights, v=values: codec.restore_values(weights @ v))  # type: ignore[misc]
    outputs: Tensor = softmax.result().unflatten(1, (-1, num_tokens))
    return outputs.permute(2, 0, 1, 3).flatten(1, 2).to(queries.dtype)


def decode_attention(
    queries: Tensor,
    exact: tuple[Tensor, Tensor],
    records: Tensor,
    plan: DecodePlan,
    codec: Codec,
    options: AttentionOptions,
) -> Tensor:
    """Attend for one new token of each of several requests.

    Args:
        queries: ``[batch, num_heads, key_dim]``.
        exact: Keys ``[batch, num_kv_heads, num_exact, key_dim]`` and values of `value_dim`: the requests'
            slots, the new tokens included; what the plan does not show may be anything but NaN.
        records: uint8 ``[num_blocks, num_kv_heads, record_bytes]``, of all requests.
        plan: Which of both each request sees.
        codec: Of the records.
        options: How scores are made.

    Returns:
        ``[batch, num_heads, value_dim]`` in the dtype of the queries.
    """
    exact_keys, exact_values = (states.float() for states in exact)
    batch, num_kv_heads, _, value_dim = exact_values.shape
    grouped = _grouped(queries, num_kv_heads, options)
    rows = (batch, num_kv_heads, grouped.shape[2])
    softmax = RunningSoftmax(rows, value_dim, queries.device, _grouped_sinks(options, num_kv_heads))
    scores = _capped(grouped @ exact_keys.mT, options)
    scores = scores.masked_fill(~plan.exact_mask[:, None, None], -torch.inf)
    softmax.add(scores, lambda weights: weights @ exact_values)

    transformed = _by_head(codec.transform_queries, grouped)
    stored = torch.zeros_like(softmax.total)  # the weighted values of blocks, not yet brought back
    num_blocks = plan.block_ids.numel()
    for piece in _pieces(num_blocks, num_kv_heads * (queries.shape[2] + value_dim), queries.device):
        owners = plan.owners[piece]
        blocks = records.index_select(0, plan.block_ids[piece])  # copies whole records, unlike indexing
        scores = _capped(codec.scores(transformed[owners], blocks), options)
        if plan.block_mask is not None:
            scores = scores.masked_fill(~plan.block_mask[piece][:, None, None], -torch.inf)
        # Each request has its own number of blocks: what belongs to one is reduced by its row in the batch.
        index = owners[:, None, None].expand(scores.shape[:3])
        maximum = softmax.maximum.scatter_reduce(0, index, scores.amax(-1), "amax")
        weights = (scores - maximum[owners].unsqueeze(-1)).exp_()
        decay = (softmax.maximum - maximum).exp_()
        stored = (stored * decay.unsqueeze(-1)).index_add_(0, owners, codec.weighted_values(weights, blocks))
        softmax.total = softmax.total * decay.unsqueeze(-1)
        softmax.denominator = (softmax.denominator * decay).index_add_(0, owners, weights.sum(-1))
        softmax.maximum = maximum
    if num_blocks:
        softmax.total = softmax.total + _by_head(codec.restore_values, stored)
    return softmax.result().flatten(1, 2).to(queries.dtype)


def _masks(run: PrefillRun, chunk: PlannedChunk, exact_rows: slice) -> tuple[Tensor, Tensor | None]:
    """Return which exact tokens, and which of blocks, each query of a chunk sees; None stands for all."""
    device = run.block_ids.device
    num_ring = len(run.held_places) - run.num_sinks
    sinks = torch.arange(run.num_sinks, device=device)
    others = torch.arange(run.start - num_ring, run.start + exact_rows.stop, device=device)
    others = torch.cat([others[:num_ring], others[num_ring + exact_rows.start :]])
    positions = torch.cat([sinks, others])
    is_sink = torch.arange(len(positions), device=device) < run.num_sinks
    is_held = torch.where(is_sink, positions < chunk.exact_start, positions >= chunk.exact_start)
    queries = torch.arange(run.start, run.start + run.num_tokens, device=device)[chunk.rows, None]
    exact_mask = (positions <= queries) & is_held
    if run.first_visible is None:
        return exact_mask, None
    first_visible = run.first_visible[chunk.rows, None]
    blocks = torch.arange(chunk.blocks.start * BLOCK_SIZE, chunk.blocks.stop * BLOCK_SIZE, device=device)
    return exact_mask & (positions >= first_visible), run.blocks_start + blocks >= first_visible


def _grouped(queries: Tensor, num_kv_heads: int, options: AttentionOptions) -> Tensor:
    """Return scaled queries by kv head, float32 ``[num_tokens, num_kv_heads, heads of a group, key_dim]``."""
    scaled: Tensor = (queries.float() * options.softmax_scale).unflatten(1, (num_kv_heads, -1))
    return scaled


def _grouped_sinks(options: AttentionOptions, num_kv_heads: int) -> Tensor | None:
    """Return sink scores by kv head, float32 ``[num_kv_heads, heads of a group]``."""
    if options.sink_scores is None:
        return None
    by_kv_head: Tensor = options.sink_scores.float().unflatten(0, (num_kv_heads, -1))
    return by_kv_head


def _capped(scores: Tensor, options: AttentionOptions) -> Tensor:
    return scores if options.softcap is None else options.softcap * torch.tanh(scores / options.softcap)


def _by_head(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Apply a function of ``[num_kv_heads, num_rows, dim]`` to ``[batch, num_kv_heads, num_rows, dim]``."""
    applied: Tensor = function(rows.transpose(0, 1).flatten(1, 2)).unflatten(1, (len(rows), -1))
    return applied.transpose(0, 1)


def _pieces(num_blocks: int, numbers_per_token: int, device: torch.device) -> list[slice]:
    """Cut a range of blocks into pieces that bound the scratch memory."""
    numbers = _CPU_NUMBERS if device.type == "cpu" else _GPU_NUMBERS
    size = max(1, numbers // (BLOCK_SIZE * numbers_per_token))
    return [slice(start, min(start + size, num_blocks)) for start in range(0, num_blocks, size)]
