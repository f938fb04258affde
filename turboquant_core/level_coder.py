"""LevelCoder: numbers to codes of a codebook's levels and back. Knows nothing of vectors or rotations."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from turboquant_core.codebook import Codebook
from turboquant_core.packing import lookup, lookup_table
from turboquant_core.table import take


class LevelCoder:
    """Find the nearest level of every number, and read packed levels back.

    Args:
        codebook: Levels and boundaries.
        bits: Width of a code; the codebook has ``2 ** bits`` levels.
        device: Where the numbers lie.
    """

    def __init__(self, codebook: Codebook, bits: int, device: torch.device) -> None:
        self.bits = bits
        self._levels = torch.tensor(codebook.centroids, dtype=torch.float32, device=device)
        self._boundaries = torch.tensor([*codebook.boundaries, math.inf], dtype=torch.float32, device=device)
        halves = torch.arange(1 << 16, device=device).to(torch.int16).view(torch.float16).float()
        # Of every float16, in the order of its bits: the lowest code of the numbers that round to it, and the
        # level nearest to it.
        self._first_codes = torch.bucketize(halves, self._boundaries[:-1].to(torch.float16).float())
        self._near_levels = self._levels[torch.bucketize(halves, self._boundaries[:-1])]
        self._lookup_table = lookup_table(self._levels, bits)

    def nearest(self, x: Tensor) -> Tensor:
        """Return codes, uint8 and shaped like `x` (float32): the number of boundaries below each number.

        Rounding to float16 keeps order, so the float16 of a number tells its code up to one comparison
        with the first boundary whose float16 is not smaller. Ten times faster on a CPU than a binary
        search.
        """
        codes = take(self._first_codes, _half_bits(x))
        return codes.to(torch.uint8) + (x > take(self._boundaries, codes))

    def near_levels(self, x: Tensor) -> Tensor:
        """Return the levels nearest to the float16 of each number, float32.

        In a third of the time of `nearest`, and as good: where they differ, two levels are equally near but
        for rounding.
        """
        return take(self._near_levels, _half_bits(x))

    def levels(self, codes: Tensor) -> Tensor:
        """Return the level of every code, float32."""
        return take(self._levels, codes.long())

    def unpack(self, packed: Tensor, dim: int) -> Tensor:
        """Return levels, float32 ``[..., dim]``, of codes in bytes ``[..., packed_size(dim, bits)]``."""
        return lookup(packed, self._lookup_table, dim, self.bits)


def _half_bits(x: Tensor) -> Tensor:
    return x.to(torch.float16).view(torch.uint16).long()


@functools.lru_cache(maxsize=64)
def level_coder(codebook: Codebook, bits: int, device: torch.device) -> LevelCoder:
    """Return the coder that all quantizers of a codebook share."""
    with torch.inference_mode(False):
        return LevelCoder(codebook, bits, device)
