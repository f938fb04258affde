"""Lengths and levels of vectors in Triton, as `BlockQuantizer` chooses them. Knows no tokens and no bytes."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# (kernels, which Triton types)

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import triton
from triton import language as tl

from turboquant_core.codebook import e4m3_magnitudes

# Levels are multiples of an eighth, times the square of this: so a level, a step between levels divided by
# this and another one divided by the square are the digits of a single float32.
_DIGIT = tl.constexpr(2.0**8)
# Adding and subtracting one of these rounds to a digit.
_LEVEL_ROUNDER = tl.constexpr(1.5 * 2**36)
_STEP_ROUNDER = tl.constexpr(1.5 * 2**28)

_TINY = tl.constexpr(1e-12)
# A length is not better by rounding alone. Where all numbers of a vector are as large, all levels point as
# well, but norms of small levels may be larger than float16 has.
_BETTER = tl.constexpr(1 + 1e-6)


class Constants(NamedTuple):
    """What kernels know of a quantizer's levels.

    Attributes:
        length: What a vector's length is made before its levels are chosen.
        boundaries: Between the positive levels of such vectors, ascending.
        digits: Of the first level, and what each boundary adds: see `_levels_around`.
        zeros_energy: What the numbers add to products of levels with themselves that are zeros up to a power
            of two of them.
    """

    length: float
    boundaries: tuple[float, ...]
    digits: tuple[float, ...]
    zeros_energy: float


@functools.lru_cache(maxsize=64)
def constants(dim: int, bits: int) -> Constants:
    """Return what kernels know of the levels of a dimension and a width; nothing of 8 bits."""
    if bits == 8:
        return Constants(1.0, (), (), 0.0)
    magnitudes, unit = e4m3_magnitudes(dim, bits)
    levels = [magnitude * _DIGIT.value**2 for magnitude in magnitudes]
    steps = [0.0, *(high - low for low, high in itertools.pairwise(levels)), 0.0]
    totals = [
        level + above / _DIGIT.value + below / _DIGIT.value**2
        for level, (below, above) in zip(levels, itertools.pairwise(steps), strict=True)
    ]
    return Constants(
        length=_DIGIT.value**2 / unit,
        boundaries=tuple((low + high) / 2 for low, high in itertools.pairwise(levels)),
        digits=(totals[0], *(high - low for low, high in itertools.pairwise(totals))),
        zeros_energy=(triton.next_power_of_2(dim) - dim) * levels[0] ** 2,
    )


@triton.jit
def _levels_around(numbers, BOUNDARIES: tl.constexpr, DIGITS: tl.constexpr):
    """Return the nearest levels of positive numbers, and the steps to the next and to the one before."""
    digits = tl.full(numbers.shape, DIGITS[0], tl.float32)
    for k in tl.static_range(len(BOUNDARIES)):
        digits += DIGITS[k + 1] * (numbers > BOUNDARIES[k]).to(tl.float32)
    levels = digits + _LEVEL_ROUNDER
    levels -= _LEVEL_ROUNDER
    digits -= levels
    up = digits + _STEP_ROUNDER
    up -= _STEP_ROUNDER
    return levels, up * _DIGIT, (up - digits) * (_DIGIT * _DIGIT)


@triton.jit
def _trials(numbers, LENGTHS: tl.constexpr, BOUNDARIES: tl.constexpr, DIGITS: tl.constexpr):
    """Return sums over the second axis, for each length: levels times numbers, levels times themselves.

    Numbers may cross a boundary on the way from length 1, never two; boundaries are midway between levels.
    """
    levels, up, down = _levels_around(numbers, BOUNDARIES, DIGITS)
    sums = (tl.sum(numbers * levels, 1), tl.sum(levels * levels, 1))
    for i in tl.static_range(4):
        twice = numbers * (2 * LENGTHS[i]) - 2 * levels
        if LENGTHS[i] < 1:
            trial = levels + down * (twice <= down).to(tl.float32)
        else:
            trial = levels + up * (twice > up).to(tl.float32)
        sums += (tl.sum(numbers * trial, 1), tl.sum(trial * trial, 1))
    return sums


@triton.jit
def search(
    numbers, LENGTHS: tl.constexpr, BOUNDARIES: tl.constexpr, DIGITS: tl.constexpr, ZEROS_ENERGY: tl.constexpr
):
    """Return the lengths of rows whose nearest levels point best, and products of these levels.

    Args:
        numbers: Positive ``[64, columns]``; the last columns are zeros.
        LENGTHS: Lengths to try beside 1, in units of the rows'.
        BOUNDARIES: See `Constants`.
        DIGITS: See there.
        ZEROS_ENERGY: See there.

    Returns:
        Lengths, products with the rows, and products with themselves.
    """
    COLS: tl.constexpr = numbers.shape[1]
    # In quarters, for which a thread has registers. It has their numbers side by side, see `triton_store.py`.
    numbers = tl.permute(tl.reshape(numbers, [64, COLS // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    even, odd = tl.split(numbers)
    first, second = tl.split(even)
    third, fourth = tl.split(odd)
    a = _trials(first, LENGTHS, BOUNDARIES, DIGITS)
    b = _trials(second, LENGTHS, BOUNDARIES, DIGITS)
    c = _trials(third, LENGTHS, BOUNDARIES, DIGITS)
    d = _trials(fourth, LENGTHS, BOUNDARIES, DIGITS)
    chosen = tl.full([64], 1, tl.float32)
    for i in tl.static_range(5):
        new_projection = tl.sum(a[2 * i] + b[2 * i] + c[2 * i] + d[2 * i], 1)
        new_energy = tl.sum(a[2 * i + 1] + b[2 * i + 1] + c[2 * i + 1] + d[2 * i + 1], 1)
        new_energy -= ZEROS_ENERGY
        new_cosine = new_projection * tl.rsqrt(new_energy)
        if i == 0:
            projection, energy, cosine = new_projection, new_energy, new_cosine
        else:
            is_better = new_cosine > cosine * _BETTER
            chosen = tl.where(is_better, LENGTHS[i - 1], chosen)
            projection = tl.where(is_better, new_projection, projection)
            energy = tl.where(is_better, new_energy, energy)
            cosine = tl.where(is_better, new_cosine, cosine)
    return chosen, projection, energy


@triton.jit
def scale_factor(projection, energy, LENGTH: tl.constexpr, SCALE: tl.constexpr):
    """Return norms of unit vectors, of products with levels where rows have a length instead."""
    projection = tl.maximum(projection / (LENGTH * LENGTH), _TINY)
    energy = tl.maximum(energy / (LENGTH * LENGTH), _TINY)
    if SCALE == "least_squares":
        factor = projection / energy
    elif SCALE == "norm_corrected":
        factor = tl.rsqrt(energy)
    else:
        factor = 1 / projection
    return factor


@triton.jit
def magnitudes_of(numbers, BOUNDARIES: tl.constexpr):
    """Return how many boundaries lie below the magnitude of each number, int32."""
    magnitudes = tl.zeros(numbers.shape, tl.int32)
    for k in tl.static_range(len(BOUNDARIES)):
        magnitudes = tl.where(tl.abs(numbers) > BOUNDARIES[k], k + 1, magnitudes)
    return magnitudes
