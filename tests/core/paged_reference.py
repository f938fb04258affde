"""What attention on the store must return, computed in float64 from all tokens of a request at once.

Uses nothing of the store but its codecs.
"""

from __future__ import annotations

import torch
from paged_requests import Layer, Tokens
from torch import Tensor

from turboquant_core.reference import AttentionOptions, Codec
from turboquant_core.request_cache import Visibility
from turboquant_core.timeline import Timeline


def num_blocks_read(position: int, num_prompt_tokens: int, timeline: Timeline) -> int:
    """Return how many blocks the token at a position reads.

    Of a prompt, those before the segment that it lies in, if at least as many tokens are left there as later
    stay exact; then, all that leave so many tokens exact.
    """
    if position >= num_prompt_tokens:
        return max(0, position - timeline.num_sinks - timeline.residual_length) // 64
    last_cut = num_prompt_tokens - max(1, timeline.residual_length)
    cuts = range(timeline.num_sinks, min(position, last_cut) + 1, timeline.segment_size)
    return (cuts[-1] - timeline.num_sinks) // 64 if cuts else 0


def as_read(tokens: Tokens, codec: Codec, num_blocks: int, num_sinks: int) -> tuple[Tensor, Tensor]:
    """Return keys and values, ``[num_tokens, num_kv_heads, dim]``, the first blocks of them decoded."""
    keys, values = (states.float().clone() for states in (tokens.keys, tokens.values))
    for index in range(num_blocks):
        block = slice(num_sinks + 64 * index, num_sinks + 64 * index + 64)
        encoded = codec.encode(*(states[block].transpose(0, 1).unsqueeze(1) for states in tokens[1:]))
        for states, decoded in zip((keys, values), codec.decode(encoded), strict=True):
            states[block] = decoded[:, 0].transpose(0, 1)
    return keys, values


def visible_keys(positions: Tensor, num_keys: int, visibility: Visibility) -> Tensor:
    """Return bool ``[num_positions, num_keys]``."""
    queries, keys = positions[:, None], torch.arange(num_keys)
    visible = keys <= queries
    if visibility.window is not None:
        visible = visible & (keys > queries - visibility.window)
    if visibility.chunk is not None:
        visible = visible & (keys // visibility.chunk == queries // visibility.chunk)
    return visible


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, options: AttentionOptions
) -> Tensor:
    """Return ``[num_queries, num_heads, value_dim]``, computed in the dtype of the arguments."""
    group_size = queries.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(group_size, dim=1).transpose(0, 1) for states in (keys, values))
    scores = queries.transpose(0, 1) @ keys.mT * options.softmax_scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if options.sink_scores is not None:
        sinks = options.sink_scores.to(scores.dtype)[:, None, None].expand(*scores.shape[:2], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    return (weights @ values).transpose(0, 1)


def reference(
    layer: Layer,
    timeline: Timeline,
    tokens: Tokens,
    num_prompt_tokens: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the outputs of all tokens of a request, ``[num_tokens, num_heads, value_dim]``."""
    num_tokens = len(tokens.keys)
    num_blocks = torch.tensor([num_blocks_read(p, num_prompt_tokens, timeline) for p in range(num_tokens)])
    outputs = torch.empty(*tokens.queries.shape[:2], tokens.values.shape[2], dtype=dtype)
    for count in num_blocks.unique().tolist():
        [positions] = torch.nonzero(num_blocks == count, as_tuple=True)
        keys, values = as_read(tokens, layer.codec, count, timeline.num_sinks)
        visible = visible_keys(positions, num_tokens, layer.visibility)
        outputs[positions] = attend(
            *(states.to(dtype) for states in (tokens.queries[positions], keys, values)),
            visible,
            layer.options,
        )
    return outputs


def relative_errors(outputs: Tensor, expected: Tensor) -> Tensor:
    """Return the error of each token, of ``[..., num_heads, value_dim]``, as a share of its norm."""
    errors = (outputs.double() - expected.double()).flatten(-2).norm(dim=-1)
    return errors / expected.double().flatten(-2).norm(dim=-1)
