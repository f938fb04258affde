"""Codes of a record to levels, in Triton: `record.py` says where bits lie."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

import functools

import torch
import triton
from triton import language as tl

from turboquant_core.codebook import e4m3_magnitudes


@triton.jit
def word_place(index, lane, NUM_WORDS: tl.constexpr):
    """Return where in a plane of so many words per lane a lane has the word of an index."""
    NUM_REST: tl.constexpr = NUM_WORDS % 4
    place = index // 4 * 128 + lane * 4 + index % 4
    if NUM_REST:
        first_rest: tl.constexpr = NUM_WORDS - NUM_REST
        rest = first_rest * 32 + lane * NUM_REST + (index - first_rest)
        place = tl.where(index < first_rest, place, rest)
    return place


@triton.jit
def _level(words, signs, R: tl.constexpr, J: tl.constexpr, BITS: tl.constexpr, CURVE: tl.constexpr):
    """Return what code (r, j) of each word stands for, in units of the codebook, as float16."""
    if BITS == 8:
        level = ((words << (24 - 8 * J)) >> 24).to(tl.float16)
    else:
        FIELD: tl.constexpr = 16 * R + 4 * J
        SIGN: tl.constexpr = 8 * J + 7 - 4 * R if BITS == 4 else FIELD + (BITS == 2)
        # Four times the magnitude.
        place = (words << 2 if FIELD == 0 else words >> (FIELD - 2)) & (((1 << (BITS - 1)) - 1) << 2)
        # An e4m3 number's bits are those of a float16 that is 2^8 times smaller.
        bits = (CURVE[0] << 7) + place * (CURVE[1] << 5) + ((CURVE[2] >> place) & 15) * 128
        bits |= ((signs >> SIGN) & 1) << 15
        level = bits.to(tl.int16).to(tl.float16, bitcast=True)
    return level


@triton.jit
def _pair(first, second, signs, J: tl.constexpr, BITS: tl.constexpr, CURVE: tl.constexpr):
    """Return the levels of codes (0, j) and (1, j), ``[rows, cols, 2]``."""
    return tl.join(_level(first, signs, 0, J, BITS, CURVE), _level(second, signs, 1, J, BITS, CURVE))


@triton.jit
def read_levels(
    words,
    offsets,
    tile,
    lane,
    is_tile,
    NUM_TILES: tl.constexpr,
    BITS: tl.constexpr,
    CURVE: tl.constexpr,
    NUM_LOW: tl.constexpr,
):
    """Return levels ``[4 * cols, 2 * rows]`` of tiles and lanes ``[rows, cols]``.

    A column's four are those of j; r goes between a row's number by `NUM_LOW` and the rest of that division.
    """
    if BITS == 8:
        first = tl.load(words + offsets + word_place(2 * tile, lane, 2 * NUM_TILES), is_tile, 0)
        second = tl.load(words + offsets + word_place(2 * tile + 1, lane, 2 * NUM_TILES), is_tile, 0)
        signs = first
    elif BITS == 4:
        first = tl.load(words + offsets + word_place(tile, lane, NUM_TILES), is_tile, 0)
        second = first
        signs = first
    else:
        NUM_WORDS: tl.constexpr = NUM_TILES // 2
        places = offsets + word_place(tile // 2, lane, NUM_WORDS)
        first = tl.load(words + places, is_tile, 0) >> (2 * (tile % 2))
        second = first
        signs = first
        if BITS == 3:
            offsets += 32 * NUM_WORDS
            places = offsets + word_place(tile // 4, lane, (NUM_TILES + 3) // 4)
            signs = tl.load(words + places, is_tile, 0) >> (tile % 4)
    even = tl.join(_pair(first, second, signs, 0, BITS, CURVE), _pair(first, second, signs, 2, BITS, CURVE))
    odd = tl.join(_pair(first, second, signs, 1, BITS, CURVE), _pair(first, second, signs, 3, BITS, CURVE))
    rows: tl.constexpr = first.shape[0]
    cols: tl.constexpr = first.shape[1]
    levels = tl.reshape(tl.join(even, odd), [rows // NUM_LOW, NUM_LOW, cols, 2, 4])
    return tl.reshape(tl.permute(levels, [2, 4, 0, 3, 1]), [4 * cols, 2 * rows])


@functools.lru_cache(maxsize=64)
def level_curve(dim: int, bits: int) -> tuple[tuple[int, int, int], float]:
    """Return how a magnitude becomes the byte of an e4m3 number, and the unit of levels made of such bytes.

    Bytes are ``start + slope * magnitude``, plus 4 bits for each magnitude from a word.
    """
    if bits == 8:
        return (0, 0, 0), 1.0
    magnitudes, unit = e4m3_magnitudes(dim, bits)
    start, *rest = torch.tensor(magnitudes).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    slope = (rest[-1] - start) // len(rest)
    above = [byte - start - slope * magnitude for magnitude, byte in enumerate(rest, 1)]
    assert all(0 <= number < 16 for number in above)
    word = sum(number << (4 * magnitude) for magnitude, number in enumerate(above, 1))
    return (start, slope, word - (word >> 31 << 32)), unit * 2**8
