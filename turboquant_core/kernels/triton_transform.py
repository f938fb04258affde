"""Tokens times the transform of their head in Triton, as exact as in float32.

Numbers are multiplied in float16, in parts that together have the bits of a float32: the matrix is split in
two, and a token, which is scaled by a power of two, where 16 bits do not hold it. Rows, and columns of keys,
have the order of `triton_store.spread`.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# (kernels, which Triton types)

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
from triton import language as tl

from turboquant_core.kernels.triton_store import spread
from turboquant_core.record import KEYS
from turboquant_core.transform import Transform

# The largest numbers of a matrix and of a token have these exponents, so that small ones keep their bits.
_MATRIX_EXPONENT = 13
_TOKEN_EXPONENT = tl.constexpr(14)
# Larger tokens are made as long as this, which squares of numbers allow; norms and means end far below.
_MAX_EXPONENT = tl.constexpr(46)


def matrix_parts(transforms: tuple[Transform, ...], kind: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the parts of transforms' matrices as the kernel reads them, and their units.

    float16 ``[num_layers, 1 or num_heads, 2, rows, columns]``, with zeros beyond the dimension, and float32
    ``[num_layers, 1 or num_heads]``.
    """
    with torch.inference_mode(False):
        matrices = [transform.matrices(device)[0] for transform in transforms]
        num_heads = max(map(len, matrices))
        split = [_split_matrices(each, kind) for each in matrices]
        parts, units = zip(*split, strict=True)
        return (
            torch.stack([each.expand(num_heads, -1, -1, -1) for each in parts]),
            torch.stack([each.expand(num_heads) for each in units]),
        )


def _split_matrices(matrices: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    dim = matrices.shape[-1]
    _, cols, padded_dim, *_ = sizes(dim)
    matrices = pad(matrices, (0, cols - dim, 0, padded_dim - dim))
    if kind == KEYS:  # the order of `spread`
        matrices = matrices.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)
    _, exponents = matrices.abs().amax((-2, -1)).frexp()
    units = torch.ones_like(exponents, dtype=torch.float32).ldexp(exponents - 1 - _MATRIX_EXPONENT)
    scaled = matrices / units[:, None, None]
    first = scaled.half()
    return torch.stack([first, (scaled - first.float()).half()], 1), units


def sizes(dim: int) -> tuple[int, int, int, int]:
    """Return the numbers of a token, columns and rows of its matrix, and how many rows are read at a time."""
    inner = 64 if dim in (64, 128) else 32 if dim > 16 else 16
    return dim, triton.next_power_of_2(dim), triton.cdiv(dim, inner) * inner, inner


@triton.jit
def _power_of_2(exponent):
    """Return 2 ** exponent of integers from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def transformed(tokens, token_stride, dim_stride, parts, unit, SETTINGS: tl.constexpr):
    """Return tokens times a matrix, ``[64, columns]``, and which are finite; 0 where one is not."""
    DIM: tl.constexpr = SETTINGS[0]
    COLS: tl.constexpr = SETTINGS[1]
    PADDED_DIM: tl.constexpr = SETTINGS[2]
    INNER: tl.constexpr = SETTINGS[3]
    tokens += spread(tl.arange(0, 64))[:, None] * token_stride
    col = tl.arange(0, COLS)[None, :]
    whole = tl.load(tokens + col * dim_stride, col < DIM, 0).to(tl.float32)
    # As integers, of which those of inf and NaN are the largest.
    largest = tl.max(whole.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    exponent = (largest >> 23) - 127
    shift = tl.minimum(_TOKEN_EXPONENT - exponent, 126)
    back = _power_of_2(tl.minimum(-shift, _MAX_EXPONENT - _TOKEN_EXPONENT)) * unit
    scale = _power_of_2(shift)[:, None]
    # In pieces of columns: of a single one, or of several with more columns than rows, Triton gives the
    # columns of a tile to several warps on GPUs without wgmma, and what follows takes thousands of registers.
    NUM_PARTS: tl.constexpr = 3 if tokens.dtype.element_ty == tl.float32 else 2
    NUM_PIECES: tl.constexpr = 1 if COLS == 16 else 2 if COLS <= 128 else 4
    PIECE: tl.constexpr = COLS // NUM_PIECES
    piece_col = tl.arange(0, PIECE)[None, :]
    pieces = (tl.zeros([64, PIECE], tl.float32),) * NUM_PIECES
    for start in tl.range(0, NUM_PARTS * PADDED_DIM, INNER):
        k = start % PADDED_DIM + tl.arange(0, INNER)
        scaled = tl.load(tokens + k[None, :] * dim_stride, (k < DIM)[None, :], 0).to(tl.float32) * scale
        part = scaled.to(tl.float16)
        if NUM_PARTS == 3:
            part = tl.where(start < 2 * PADDED_DIM, part, (scaled - part.to(tl.float32)).to(tl.float16))
        row = start % (2 * PADDED_DIM) + tl.arange(0, INNER)
        places = parts + row[:, None] * COLS + piece_col
        added = ()
        for i in tl.static_range(NUM_PIECES):
            added += (tl.dot(part, tl.load(places + i * PIECE), pieces[i]),)
        pieces = added
    if NUM_PIECES == 1:
        product = pieces[0]
    elif NUM_PIECES == 2:
        product = tl.reshape(tl.permute(tl.join(pieces[0], pieces[1]), [0, 2, 1]), [64, COLS])
    else:
        product = tl.join(tl.join(pieces[0], pieces[2]), tl.join(pieces[1], pieces[3]))
        product = tl.reshape(tl.permute(product, [0, 2, 3, 1]), [64, COLS])
    is_finite = exponent < 128
    return tl.where(is_finite[:, None], product, 0) * back[:, None], is_finite
