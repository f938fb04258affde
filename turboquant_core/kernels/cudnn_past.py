"""Attention to a long past by cuDNN, which is faster where all queries see all keys.

On an H200, 2,048 queries of 32 heads over 6,144 keys of 8 take it 306 us; Triton's kernel takes 460. It is
called by a name that torch does not document, so what it gives is checked once.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn.functional import pad

from turboquant_core.config import BLOCK_SIZE
from turboquant_core.kernels.triton_exact import LOG2_E
from turboquant_core.kernels.triton_found import Found, add_found
from turboquant_core.prefill_plan import PrefillPlan
from turboquant_core.reference import AttentionOptions

logger = logging.getLogger(__name__)

# cuDNN makes a plan, which takes 70 ms, for each pair of numbers of queries and of keys. So there are few of
# both: other numbers of queries become multiples of the larger one, if that is at most a quarter more.
_QUERIES, _FULL_QUERIES, _KEYS = 512, 2048, 2048
# What it is faster on, as far as that is known.
_CAPABILITIES = (9, 10)

_attend = torch.ops.aten._scaled_dot_product_cudnn_attention

# Whether it gives what it should; None before it has been tried.
_works: bool | None = None


def attend_past(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    piece: slice,
    found: Found,
    plan: PrefillPlan,
    options: AttentionOptions,
    *,
    continues: bool,
) -> int:
    """Attend to the first of the keys and values that were read from blocks; to none if it is not faster.

    Args:
        queries: ``[num_tokens, num_heads, key_dim]``, for keys as they are given here.
        keys: ``[num_kv_heads, num_keys, key_dim]``, contiguous.
        values: ``[num_kv_heads, num_keys, value_dim]``, contiguous.
        piece: Which of the plan's blocks they are of.
        found: What is found is added to it.
        plan: Which of them each query sees.
        options: How scores are made; sink scores are left out.
        continues: Something has been found before; otherwise `found` is overwritten.

    Returns:
        To how many of the keys.
    """
    if _works is False or not _is_taken(queries, values, plan, options):
        return 0
    seen_by_all = plan.num_seen_by_all - piece.start * BLOCK_SIZE
    num_keys: int = min(seen_by_all, keys.shape[1]) // _KEYS * _KEYS
    if num_keys <= 0:
        return 0
    keys, values = keys[:, :num_keys], values[:, :num_keys]
    result = _try(queries, keys, values, options.softmax_scale)
    if result is None:
        return 0
    averages, weights = result
    if continues:
        add_found(found, averages, weights)
    else:
        found.averages.copy_(averages.transpose(0, 1))
        torch.mul(weights.T, LOG2_E.value, out=found.weights)
    return num_keys


def _try(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Return averages ``[num_heads, num_tokens, value_dim]`` and their weights; None if it fails."""
    global _works
    try:
        if _works is None:
            _works, reason = _is_right(queries, keys, values, scale), "its results are wrong"
        if _works:
            return _call(queries, keys, values, scale)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _works, reason = False, str(error).partition("\n")[0]
    logger.warning("Triton attends to long pasts, not cuDNN, which is faster: %s", reason)
    return None


def _call(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    averages, weights, *_ = _attend(
        _padded(queries).transpose(0, 1)[None], keys[None], values[None], None, True, scale=scale
    )
    weights = weights.view(len(weights[0]), -1)
    return averages[0, :, : len(queries)], weights[:, : len(queries)]


def _padded(queries: Tensor) -> Tensor:
    """Return queries, and zeros where there should be more."""
    missing = _num_padded(len(queries)) - len(queries)
    return pad(queries, (0, 0, 0, 0, 0, missing)) if missing else queries


def _num_padded(num_tokens: int) -> int:
    missing = -num_tokens % _FULL_QUERIES
    return num_tokens + missing if num_tokens % _QUERIES and missing <= num_tokens // 4 else num_tokens


def _is_right(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> bool:
    """Tell whether a few queries get what they get in float32, for random numbers in place of these.

    These may be anything: while a server measures its memory, nobody has written the blocks.
    """
    generator = torch.Generator(queries.device).manual_seed(0)
    queries, keys, values = (
        torch.empty_like(numbers).normal_(generator=generator) for numbers in (queries, keys, values)
    )
    averages, weights = _call(queries, keys, values, scale)
    some = slice(None, None, -(-len(queries) // 8))
    grouped = queries[some].float().transpose(0, 1).unflatten(0, (len(keys), -1))
    scores = scale * (grouped @ keys.float()[:, None].mT)
    expected = (scores.softmax(-1) @ values.float()[:, None]).flatten(0, 1)
    error = (averages[:, some].float() - expected).norm() / expected.norm()
    error_of_weights = (weights[:, some] - scores.logsumexp(-1).flatten(0, 1)).abs().amax()
    return bool(torch.maximum(error, error_of_weights) < 0.02)


def _is_taken(queries: Tensor, values: Tensor, plan: PrefillPlan, options: AttentionOptions) -> bool:
    num_tokens, _, key_dim = queries.shape
    return (
        plan.num_seen_by_all >= _KEYS
        and _num_padded(num_tokens) % _QUERIES == 0
        and options.softcap is None
        and queries.dtype in (torch.bfloat16, torch.float16)
        and key_dim == values.shape[2] <= 128
        and key_dim % 8 == 0
        and queries.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(queries.device)[0] in _CAPABILITIES
    )
