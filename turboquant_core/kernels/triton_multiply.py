"""Vectors of heads times the matrices of their kv heads, as exact as the result's type, in Triton."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl


def multiply(
    vectors: Tensor,
    matrices: Tensor,
    num_kv_heads: int,
    dtype: torch.dtype,
    added: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """Multiply vectors with the matrix of their kv head.

    Args:
        vectors: ``[num_tokens, num_heads, dim]``, the last dimension contiguous, any floating-point type.
        matrices: float32 ``[1 or num_kv_heads, dim, dim]``.
        num_kv_heads: Of which query heads share one.
        dtype: Of the result.
        added: float32, shaped as the result, contiguous: added to it.
        shares: float32 ``[2, num_tokens, num_heads]``, contiguous: what the products, and what is added, are
            multiplied by.

    Returns:
        ``[num_tokens, num_heads, dim]``.
    """
    num_tokens, num_heads, dim = vectors.shape
    products = torch.empty(vectors.shape, dtype=dtype, device=vectors.device)
    num_rows = num_tokens * (num_heads // num_kv_heads)
    rows, cols, precision = 16, 32, "ieee"
    if num_rows >= 512 and not triton.knobs.runtime.interpret:  # which knows no other precision
        # On tensor cores, in parts of 8 bits: two make more than what 16-bit numbers hold, three a float32.
        rows, cols, precision = 64, 128, "bf16x6" if dtype == torch.float32 else "bf16x3"
    with torch.cuda.device_of(vectors):
        _multiply[(triton.cdiv(num_rows, rows), num_kv_heads, triton.cdiv(dim, cols))](
            vectors,
            matrices,
            vectors if added is None else added,
            vectors if shares is None else shares,
            products,
            num_rows,
            num_kv_heads,
            *vectors.stride()[:2],
            0 if len(matrices) == 1 else dim * dim,
            HAS_ADDED=added is not None,
            HAS_SHARES=shares is not None,
            GROUP=num_heads // num_kv_heads,
            DIM=dim,
            ROWS=rows,
            COLS=cols,
            INNER=32,
            PRECISION=precision,
        )
    return products


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    vectors,
    matrices,
    added,
    shares,
    products,
    num_rows,
    num_kv_heads,
    token_stride,
    head_stride,
    matrix_stride,
    HAS_ADDED: tl.constexpr,
    HAS_SHARES: tl.constexpr,
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
    if HAS_SHARES:
        product *= tl.load(shares + vector, is_row, 0)[:, None]
    if HAS_ADDED:
        number = tl.load(added + place + col[None, :], is_product, 0)
        if HAS_SHARES:
            number *= tl.load(shares + (num_rows * num_kv_heads).to(tl.int64) + vector, is_row, 0)[:, None]
        product += number
    tl.store(products + place + col[None, :], product.to(products.dtype.element_ty), is_product)
