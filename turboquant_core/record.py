"""The bytes of a record: keys and values of one block and kv head, in the order that tensor cores read.

A record is two halves of 32 tokens, and between them the means of all 64, padded to a multiple of 16 bytes:

    key codes | value codes | norms, 128 bytes                             tokens 0 .. 31
    key mean, int8 | value mean, int8 | key step, value step, float16
    key codes | value codes | norms, 128 bytes                             tokens 32 .. 63

So each half and the means are one piece of memory, of the same size and at a multiple of 16 bytes.

Head dims are rounded up to a multiple of 16; codes and means beyond them are written as 0 and may be anything
when they are read. Codes lie in tiles of 16 x 16, one row of tiles after another: keys with a row per token
and a column per dimension, values with a row per dimension and a column per token. A tile is shared by 32
lanes 4g + t, each of which has its 8 codes (r, j), with r = 0, 1 and j = 0 .. 3, in

    column 4t + j,    row 4 (g // 2) + 2r + g % 2 of keys,    row 8r + g of values

A plane has the same number of words, of 32 bits and little-endian, for each lane. They lie in groups of four,
lane by lane 16 bytes each, and a last group of what is left.

    bits  planes
    4     A word per tile. Magnitudes, 3 bits: of (r, j) at bit 16r + 4j.
          Signs: of (0, j) at bit 8j + 7, of (1, j) at 8j + 3.
    3     A word per 2 tiles with magnitudes, 2 bits: of (r, j) of tile i at bit 16r + 4j + 2 (i % 2).
          Then a word per 4 tiles with signs: of (r, j) of tile i at bit 16r + 4j + i % 4.
    2     The first plane of 3 bits, with a sign above a magnitude of 1 bit.
    8     Two words per tile, one for each r; (r, j) is byte j.

A code c of b bits has magnitude c - 2^(b-1) and sign 0, or magnitude 2^(b-1) - 1 - c and sign 1.

Norms are float16: that of the key in row (r, g) of tile row R at halfword 4 (2g + R) + r, that of the same
token's value two further on.

Means have the order in which a lane needs them: dimension 16Q + 4t + j of keys at (t, Q, j), dimension
16R + 8r + g of values at (g, R, r).

Kernels read the same bytes. This file knows nothing of what codes stand for.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from turboquant_core.block_quantizer import EncodedBlocks
from turboquant_core.config import BLOCK_SIZE
from turboquant_core.record_codes import HALF_SIZE, KEYS, VALUES, CodeLayout, permute, quad_table, to_bytes

__all__ = ["KEYS", "VALUES", "BlockParts", "RecordLayout", "quad_table"]

_ALIGNMENT = 16
_NORM_BYTES = 2 * 2 * HALF_SIZE
_STEP_BYTES = 2 * 2

# The axes of a block's norms, and their order in a record: kind, half, tile row, g // 2, r, g % 2.
_NORM_AXES = (2, 2, 2, 4, 2, 2)
_NORM_ORDER = (1, 3, 5, 2, 0, 4)


class BlockParts(NamedTuple):
    """Hold the keys or values of blocks with leading shape ``[...]``, all float32.

    Token i is ``levels[i] * norms[i] + means * steps``.

    Attributes:
        levels: ``[..., 64, dim]``, with neighbouring dimensions side by side for keys, tokens for values.
        norms: ``[..., 64]``.
        means: ``[..., dim]``.
        steps: ``[...]``.
    """

    levels: Tensor
    norms: Tensor
    means: Tensor
    steps: Tensor


class RecordLayout:
    """Write and read records.

    Args:
        key_dim: Head dimension of keys.
        key_bits: Bits of a key's code: 2, 3, 4 or 8.
        value_dim: Head dimension of values.
        value_bits: Bits of a value's code.

    Attributes:
        record_bytes: Size of a record.
        starts: In bytes and in their order, where the fields of the first half start and those of the means,
            where these end, and where the second half starts, which is the size of a half with the means.
    """

    def __init__(self, key_dim: int, key_bits: int, value_dim: int, value_bits: int) -> None:
        self._codes = (CodeLayout(key_dim, key_bits, KEYS), CodeLayout(value_dim, value_bits, VALUES))
        sizes = [codes.num_bytes for codes in self._codes]
        sizes += [_NORM_BYTES, *(codes.padded_dim for codes in self._codes), _STEP_BYTES]
        ends = list(itertools.accumulate(sizes))
        self._half_bytes = ends[2]
        self._padding = -ends[-1] % _ALIGNMENT
        self.starts = (0, *ends, ends[-1] + self._padding)
        self.record_bytes = self.starts[-1] + self._half_bytes

    def write(self, keys: EncodedBlocks, values: EncodedBlocks) -> Tensor:
        """Return the records of blocks with leading shape ``[...]``, uint8 ``[..., record_bytes]``."""
        leading = keys.norms.shape[:-1]
        pairs = list(zip(self._codes, (keys, values), strict=True))
        norms = torch.stack([keys.norms, values.norms], -2).view(leading.numel(), *_NORM_AXES)
        halves = [
            *(codes.write(blocks.codes) for codes, blocks in pairs),
            to_bytes(permute(norms, _NORM_ORDER)).view(*leading, 2, _NORM_BYTES),
        ]
        first, second = torch.cat(halves, -1).unbind(-2)
        means = [
            *(
                _ordered_means(blocks.means, codes.padded_dim, kind)
                for kind, (codes, blocks) in enumerate(pairs)
            ),
            to_bytes(torch.stack([keys.mean_steps, values.mean_steps], -1)),
        ]
        return torch.cat([first, pad(torch.cat(means, -1), (0, self._padding)), second], -1)

    def read(self, records: Tensor, kind: int, table: Tensor | None) -> BlockParts:
        """Read keys or values.

        Args:
            records: uint8 ``[..., record_bytes]``.
            kind: `KEYS` or `VALUES`.
            table: `quad_table` of the levels that codes stand for; None for 8 bits, whose codes are int8.

        Raises:
            ValueError: If records are not of this size.
        """
        if records.shape[-1] != self.record_bytes:
            raise ValueError(f"records must have {self.record_bytes} bytes, got {records.shape[-1]}")
        records = records.contiguous()
        halves = records.unfold(-1, self._half_bytes, self.starts[-1])
        codes = self._codes[kind]

        def field(part: Tensor, index: int) -> Tensor:
            return part[..., self.starts[index] : self.starts[index + 1]]

        # What is left of a record's order without the kind, which is chosen first.
        norms = field(halves, 2).view(torch.float16).float().unflatten(-1, (4, 2, 2, 2, 2)).select(-2, kind)
        norms = norms.movedim((-2, -4, -1, -3), (-4, -3, -2, -1))
        means = _means_in_order(field(records, 3 + kind).view(torch.int8), kind)
        return BlockParts(
            levels=codes.read(field(halves, kind), table),
            norms=norms.reshape(*records.shape[:-1], BLOCK_SIZE),
            means=means[..., : codes.dim].float(),
            steps=field(records, 5).view(torch.float16)[..., kind].float(),
        )


def _ordered_means(means: Tensor, padded_dim: int, kind: int) -> Tensor:
    """Return uint8 ``[..., padded_dim]``: means, int8 ``[..., dim]``, in the order of a record."""
    means = pad(means, (0, padded_dim - means.shape[-1]))
    if kind == KEYS:
        return to_bytes(means.unflatten(-1, (-1, 4, 4)).transpose(-3, -2).flatten(-3))
    return to_bytes(means.unflatten(-1, (-1, 8)).mT.flatten(-2))


def _means_in_order(means: Tensor, kind: int) -> Tensor:
    """Undo `_ordered_means`, but for its padding."""
    shape, order = ((4, -1, 4), (-2, -3, -1)) if kind == KEYS else ((8, -1), (-1, -2))
    lanes: Tensor = means.unflatten(-1, shape)
    return lanes.movedim(order, tuple(range(-len(order), 0))).flatten(-len(order))
