"""What attention has found so far for each token and head, and how more is added to it, in Triton."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from turboquant_core.kernels.triton_exact import LOG2_E
from turboquant_core.kernels.triton_launch import cdiv, next_power_of_2, quick_launch


class Found(NamedTuple):
    """What has been found for each token and head.

    Attributes:
        averages: Of values, float32 ``[num_tokens, num_heads, value_dim]``, contiguous.
        weights: Their weights' base-2 logarithms, float32 ``[num_tokens, num_heads]``; very low for none.
    """

    averages: Tensor
    weights: Tensor


def add_found(found: Found, averages: Tensor, weights: Tensor) -> None:
    """Add what has been found elsewhere.

    Args:
        found: What there is, which becomes the whole.
        averages: ``[num_heads, num_tokens, value_dim]``, any floating-point type, last dimension contiguous.
        weights: Natural logarithms, float32 ``[num_heads, num_tokens]``, last dimension contiguous.
    """
    num_tokens, num_heads, value_dim = found.averages.shape
    rows = 16
    _add[(cdiv(num_tokens, rows), num_heads)](
        found.averages,
        found.weights,
        averages,
        weights,
        num_tokens,
        *averages.stride()[:2],
        weights.stride(0),
        DIM=value_dim,
        COLS=next_power_of_2(value_dim),
        ROWS=rows,
    )


@quick_launch
@triton.jit(do_not_specialize=["num_tokens"])
def _add(
    averages,
    all_weights,
    others,
    other_weights,
    num_tokens,
    head_stride,
    token_stride,
    weight_stride,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    is_token = token < num_tokens
    dim = tl.arange(0, COLS)
    is_number = is_token[:, None] & (dim < DIM)[None, :]
    rows = token * tl.num_programs(1) + head
    weight = tl.load(all_weights + rows, is_token, 0)
    other_weight = tl.load(other_weights + head * weight_stride + token, is_token, 0) * LOG2_E
    highest = tl.maximum(weight, other_weight)
    share, other_share = tl.exp2(weight - highest), tl.exp2(other_weight - highest)
    total = share + other_share
    places = averages + rows[:, None] * DIM + dim[None, :]
    others += head * head_stride + token[:, None] * token_stride + dim[None, :]
    average = tl.load(places, is_number, 0) * (share / total)[:, None]
    average += tl.load(others, is_number, 0).to(tl.float32) * (other_share / total)[:, None]
    tl.store(places, average, is_number)
    tl.store(all_weights + rows, highest + tl.log2(total), is_token)
