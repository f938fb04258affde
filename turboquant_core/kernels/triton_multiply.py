"""Vectors of heads times the matrices of their kv heads, as exact as the result's type, in Triton."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from turboquant_core.kernels.triton_launch import cdiv, quick_launch


def multiply(
    vectors: Tensor,
    matrices: Tensor,
    num_kv_heads: int,
    dtype: torch.dtype,
    added: Tensor | None = None,
    weights: Sequence[Tensor] = (),
) -> Tensor:
    """Multiply vectors with the matrix of their kv head.

    Args:
        vectors: ``[num_tokens, num_heads, dim]``, the last dimension contiguous, any floating-point type.
        matrices: float32 ``[1 or num_kv_heads, dim, dim]``.
        num_kv_heads: Of which query heads share one.
        dtype: Of the result.
        added: float32, shaped as the result, contiguous: added to it.
        weights: Base-2 logarithms of how much the products, what is added and, if there are three, nothing
            weigh in an average of them, contiguous, float32: ``[num_tokens, num_heads]`` twice, then
            ``[num_heads]``. Without any, the result is the sum.

    Returns:
        ``[num_tokens, num_heads, dim]``.
    """
    num_tokens, num_heads, dim = vectors.shape
    products = torch.empty(vectors.shape, dtype=dtype, device=vectors.device)
    num_rows = num_tokens * (num_heads // num_kv_heads)
    # Few rows are for few programs otherwise. What a row becomes must not depend on how many there are.
    rows, cols = (64, 128) if num_rows >= 512 else (16, 32)
    # On tensor cores, in parts of 8 bits: two make more than what 16-bit numbers hold, three a float32.
    precision = "bf16x6" if dtype == torch.float32 else "bf16x3"
    if triton.knobs.runtime.interpret:  # which knows no other
        precision = "ieee"
    _multiply[(cdiv(num_rows, rows), num_kv_heads, cdiv(dim, cols))](
        vectors,
        matrices,
        vectors if added is None else added,
        *[*weights, vectors, vectors, vectors][:3],
        products,
        num_rows,
        num_kv_heads,
        *vectors.stride()[:2],
        0 if matrices.shape[0] == 1 else dim * dim,
        HAS_ADDED=added is not None,
        NUM_WEIGHTS=len(weights),
        GROUP=num_heads // num_kv_heads,
        DIM=dim,
        ROWS=rows,
        COLS=cols,
        INNER=32,
        PRECISION=precision,
    )
    return products


@quick_launch
@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    vectors,
    matrices,
    added,
    weights,
    added_weights,
    sink_weights,
    products,
    num_rows,
    num_kv_heads,
    token_stride,
    head_stride,
    matrix_stride,
    HAS_ADDED: tl.constexpr,
    NUM_WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    col = tl.program_id(2) * COLS + tl.arange(0, COLS)
    token = (row // GROUP).to(tl.int64)
    query_head = head * GROUP + row % GROUP
    source = (token * token_stride + query_head * head_stride)[:, None]
    vector = token * (num_kv_heads * GROUP) + query_head
    place = vector[:, None] * DIM
    is_row = row < num_rows
    product = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, DIM, INNER):
        inner = start + tl.arange(0, INNER)
        left = tl.load(vectors + source + inner[None, :], is_row[:, None] & (inner < DIM)[None, :], 0)
        right = tl.load(
            matrices + head * matrix_stride + inner[:, None] * DIM + col[None, :],
            (inner < DIM)[:, None] & (col < DIM)[None, :],
            0,
        )
        product = tl.dot(left.to(tl.float32), right, product, input_precision=PRECISION)
    is_product = is_row[:, None] & (col < DIM)[None, :]
    share, added_share = 1.0, 1.0
    if NUM_WEIGHTS > 0:
        weight, added_weight = (
            tl.load(weights + vector, is_row, 0),
            tl.load(added_weights + vector, is_row, 0),
        )
        top = tl.maximum(weight, added_weight)
        if NUM_WEIGHTS == 3:
            sink_weight = tl.load(sink_weights + query_head)
            top = tl.maximum(top, sink_weight)
        share, added_share = tl.exp2(weight - top), tl.exp2(added_weight - top)
        total = share + added_share
        if NUM_WEIGHTS == 3:
            total += tl.exp2(sink_weight - top)
        share, added_share = (share / total)[:, None], (added_share / total)[:, None]
    if HAS_ADDED:
        product = product * share + tl.load(added + place + col[None, :], is_product, 0) * added_share
    tl.store(products + place + col[None, :], product.to(products.dtype.element_ty), is_product)
