"""Codes, norms and means to the bytes of a record, in Triton: `record.py` says where bits lie.

Takes keys with a row per token and a column per dimension, values with a row per dimension and a column per
token. Rows are in the order of tiles; the 16 columns of a tile are not: column 8e + 2t + b is the record's
4t + 2e + b, see `spread`. So the codes of a word belong to one lane of tensor cores. Knows no levels.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

import triton
from triton import language as tl

from turboquant_core.kernels.triton_levels import word_place


@triton.jit
def spread(place):
    """Return which of a tile's columns lies at a place: 4t + 2e + b at 8e + 2t + b."""
    return place // 16 * 16 + place // 2 % 4 * 4 + place // 8 % 2 * 2 + place % 2


@triton.jit
def code_bits(magnitudes, is_negative, BITS: tl.constexpr):
    """Return the bits of each code, where they lie in the word that it shares with others of its tile."""
    row = tl.arange(0, magnitudes.shape[0])[:, None]
    col = tl.arange(0, magnitudes.shape[1])[None, :]
    j = col // 8 % 2 * 2 + col % 2
    r = row // 8 % 2
    field = 16 * r + 4 * j
    sign_bit = 8 * j + 7 - 4 * r if BITS == 4 else field + (BITS - 1)
    return (magnitudes << field) | tl.where(is_negative, 1 << sign_bit, 0)


@triton.jit
def byte_bits(codes):
    """Return `code_bits` of 8 bits: of the low bytes of codes."""
    col = tl.arange(0, codes.shape[1])[None, :]
    return (codes & 255) << (8 * (col // 8 % 2 * 2 + col % 2))


@triton.jit
def _tile_words(bits, KIND: tl.constexpr, IS_BYTES: tl.constexpr):
    """Add up what shares a word, or for bytes one of a tile's two: ``[64, words of a lane]``.

    Rows are halves and lanes.
    """
    TILE_ROWS: tl.constexpr = bits.shape[0] // 16
    TILE_COLS: tl.constexpr = bits.shape[1] // 16
    WORDS: tl.constexpr = 2 if IS_BYTES else 1
    bits = tl.reshape(bits, [TILE_ROWS, 2, 8, TILE_COLS, 2, 4, 2])
    # First what one thread has.
    words = tl.sum(tl.sum(bits, 4), 5) if IS_BYTES else tl.sum(tl.sum(tl.sum(bits, 1), 3), 4)
    # Now tile row, r of bytes, g, tile column, t; a half has half the tile rows of keys, columns of values.
    if KIND == 0:
        words = tl.reshape(words, [2, TILE_ROWS // 2, WORDS, 8, TILE_COLS, 4])
        words = tl.permute(words, [0, 3, 5, 1, 4, 2])
    else:
        words = tl.reshape(words, [TILE_ROWS, WORDS, 8, 2, TILE_COLS // 2, 4])
        words = tl.permute(words, [3, 2, 5, 0, 4, 1])
    return tl.reshape(words, [64, TILE_ROWS * TILE_COLS // 2 * WORDS])


@triton.jit
def _store_plane(words, plane, HALF_WORDS: tl.constexpr, NUM_WORDS: tl.constexpr):
    row = tl.arange(0, 64)[:, None]
    col = tl.arange(0, words.shape[1])[None, :]
    places = row // 32 * HALF_WORDS + word_place(col, row % 32, NUM_WORDS)
    tl.store(plane + places, words, (col < NUM_WORDS) & (row >= 0))


@triton.jit
def store_codes(
    bits, plane, KIND: tl.constexpr, BITS: tl.constexpr, TILE_COLS: tl.constexpr, HALF_WORDS: tl.constexpr
):
    """Write codes.

    Args:
        bits: Of `code_bits` or `byte_bits`, of a power of 2 of dimensions.
        plane: Where in the record's words they begin.
        KIND: Of keys or values.
        BITS: Width of a code.
        TILE_COLS: Tiles that dimensions fill; codes beyond are not written.
        HALF_WORDS: Words from the first half of a record to the second.
    """
    IS_BYTES: tl.constexpr = BITS == 8
    words = _tile_words(bits, KIND, IS_BYTES)
    WIDTH: tl.constexpr = words.shape[1]
    NUM_WORDS: tl.constexpr = 4 * TILE_COLS if IS_BYTES else 2 * TILE_COLS
    col = tl.arange(0, WIDTH)[None, :]
    if KIND == 0 and NUM_WORDS < WIDTH:  # a tile row's tiles follow those of the row before
        places = tl.where(col < NUM_WORDS // 2, col, col - NUM_WORDS // 2 + WIDTH // 2)
        places = tl.where(col < NUM_WORDS, places, 0) + tl.zeros([64, 1], tl.int32)
        words = tl.gather(words, places, 1)
    if BITS >= 4:
        _store_plane(words, plane, HALF_WORDS, NUM_WORDS)
    else:
        words = tl.where(col < NUM_WORDS, words, 0)
        pairs = tl.reshape(words & 0x33333333, [64, WIDTH // 2, 2])
        pairs = tl.sum(pairs << (2 * tl.arange(0, 2))[None, None, :], 2)
        _store_plane(pairs, plane, HALF_WORDS, TILE_COLS)
        if BITS == 3:
            FOUR: tl.constexpr = min(4, WIDTH)
            fours = tl.reshape((words >> 2) & 0x11111111, [64, WIDTH // FOUR, FOUR])
            fours = tl.sum(fours << tl.arange(0, FOUR)[None, None, :], 2)
            _store_plane(fours, plane + 32 * TILE_COLS, HALF_WORDS, (TILE_COLS + 1) // 2)


@triton.jit
def store_norms(norms, places, KIND: tl.constexpr, HALF: tl.constexpr):
    """Write norms of the tokens of `spread`; places are the halfwords of the first half's norms."""
    row = tl.arange(0, 64)
    in_half = row % 8 * 8 + row // 16 % 2 * 4 + row // 8 % 2 + 2 * KIND
    tl.store(places + row // 32 * HALF + in_half, norms)


@triton.jit
def store_means(means, start, KIND: tl.constexpr, TILE_COLS: tl.constexpr):
    """Write int8 means ``[dimensions]``, of keys in the order of `spread`; start is a byte."""
    col = tl.arange(0, means.shape[0])
    if KIND == 0:
        places = col // 2 % 4 * (4 * TILE_COLS) + spread(col) // 16 * 4 + spread(col) % 4
    else:
        places = col % 8 * (2 * TILE_COLS) + col // 16 * 2 + col // 8 % 2
    tl.store(start + places, means, col < 16 * TILE_COLS)
