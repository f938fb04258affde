"""The bytes of a record: keys and values of one block and kv head, in the order that tensor cores read.

A record is two sub-blocks of 32 tokens. Each is, padded to a multiple of 16 bytes,

    key codes | value codes | norms, 128 | key mean, int8 | value mean, int8 | key step, value step, float16

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
from turboquant_core.config import BLOCK_SIZE, MEAN_SIZE
from turboquant_core.table import take_rows

KEYS, VALUES = 0, 1

_TILE = 16
_NUM_LANES = 32
_ALIGNMENT = 16
_NORM_BYTES = 2 * 2 * MEAN_SIZE
_STEP_BYTES = 2 * 2
_GROUPS = (BLOCK_SIZE // MEAN_SIZE, MEAN_SIZE)

# Codes move in quads, the four of one tile, lane and r. Below 8 bits a quad is a halfword that has magnitude
# j at bit 4j and sign j here; at 4 bits these are the places from which one swap brings all signs to theirs.
_SIGN_BITS = {2: (1, 5, 9, 13), 3: (2, 6, 10, 14), 4: (7, 15, 3, 11)}

# The axes of a block's quads, and their order in a record: sub-block, tile, lane, r.
#   keys    sub-block, tile row, g // 2, r, g % 2, tile column, t
#   values  tile row, r, g, sub-block, tile column, t
_RECORD_ORDER = {KEYS: (0, 1, 5, 2, 4, 6, 3), VALUES: (3, 0, 4, 2, 5, 1)}
# The same for norms: kind, sub-block, tile row, g // 2, r, g % 2.
_NORM_AXES = (2, 2, 2, 4, 2, 2)
_NORM_ORDER = (1, 3, 5, 2, 0, 4)


class BlockParts(NamedTuple):
    """Hold the keys or values of blocks with leading shape ``[...]``, all float32.

    Token i is ``levels[i] * norms[i] + means[i // 32] * steps[i // 32]``.

    Attributes:
        levels: ``[..., 64, dim]``, with neighbouring dimensions side by side for keys, tokens for values.
        norms: ``[..., 64]``.
        means: ``[..., 2, dim]``.
        steps: ``[..., 2]``.
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
    """

    def __init__(self, key_dim: int, key_bits: int, value_dim: int, value_bits: int) -> None:
        self._codes = (_CodeLayout(key_dim, key_bits, KEYS), _CodeLayout(value_dim, value_bits, VALUES))
        sizes = [codes.num_bytes for codes in self._codes]
        sizes += [_NORM_BYTES, *(codes.padded_dim for codes in self._codes), _STEP_BYTES]
        self._starts = [0, *itertools.accumulate(sizes)]
        self._padding = -self._starts[-1] % _ALIGNMENT
        self._sub_block_bytes = self._starts[-1] + self._padding
        self.record_bytes = _GROUPS[0] * self._sub_block_bytes

    def write(self, keys: EncodedBlocks, values: EncodedBlocks) -> Tensor:
        """Return the records of blocks with leading shape ``[...]``, uint8 ``[..., record_bytes]``."""
        leading = keys.norms.shape[:-1]
        pairs = list(zip(self._codes, (keys, values), strict=True))
        norms = torch.stack([keys.norms, values.norms], -2).view(leading.numel(), *_NORM_AXES)
        fields = [
            *(codes.write(blocks.codes) for codes, blocks in pairs),
            _to_bytes(_permute(norms, _NORM_ORDER)).view(*leading, _GROUPS[0], _NORM_BYTES),
            *(_to_bytes(pad(blocks.means, (0, codes.padded_dim - codes.dim))) for codes, blocks in pairs),
            _to_bytes(torch.stack([keys.mean_steps, values.mean_steps], -1)),
        ]
        return pad(torch.cat(fields, -1), (0, self._padding)).flatten(-2)

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
        leading = records.shape[:-1]
        sub_blocks = records.contiguous().view(*leading, _GROUPS[0], self._sub_block_bytes)
        codes = self._codes[kind]
        fields = [sub_blocks[..., start:end] for start, end in itertools.pairwise(self._starts)]
        # What is left of a record's order without the kind, which is chosen first.
        norms = fields[2].view(torch.float16).float().unflatten(-1, (4, 2, 2, 2, 2)).select(-2, kind)
        norms = norms.movedim((-2, -4, -1, -3), (-4, -3, -2, -1))
        return BlockParts(
            levels=codes.read(fields[kind], table),
            norms=norms.reshape(*leading, BLOCK_SIZE),
            means=fields[3 + kind][..., : codes.dim].view(torch.int8).float(),
            steps=fields[5].view(torch.float16)[..., kind].float(),
        )


def quad_table(levels: Tensor, bits: int) -> Tensor:
    """Return the levels of the four codes of every halfword, float32 ``[65536, 4]``.

    Args:
        levels: float32 ``[2 ** bits]``, what every code stands for.
        bits: Width of a code, 2, 3 or 4.
    """
    quads = torch.arange(1 << 16, device=levels.device).unsqueeze(-1)
    half = 1 << (bits - 1)
    magnitudes = (quads >> torch.arange(0, 16, 4, device=levels.device)) & (half - 1)
    is_negative = (quads >> torch.tensor(_SIGN_BITS[bits], device=levels.device)) & 1 == 1
    return levels[torch.where(is_negative, half - 1 - magnitudes, half + magnitudes)]


class _CodeLayout:
    """Say where the codes of keys, or of values, lie in the two halves of a record."""

    def __init__(self, dim: int, bits: int, kind: int) -> None:
        num_tile_cols = -(-dim // _TILE)
        num_tiles = 2 * num_tile_cols
        self.dim = dim
        self.padded_dim = _TILE * num_tile_cols
        self._bits = bits
        self._num_tiles = num_tiles
        self._is_transposed = kind == VALUES
        self._axes = (num_tile_cols, 2, 8, 2, 2, 4) if kind == VALUES else (2, 2, 4, 2, 2, num_tile_cols, 4)
        self._order = _RECORD_ORDER[kind]
        # Words of each plane, for each lane.
        self._num_words = {
            2: [num_tiles // 2],
            3: [num_tiles // 2, -(-num_tiles // 4)],
            4: [num_tiles],
            8: [2 * num_tiles],
        }[bits]
        self.num_bytes = 4 * _NUM_LANES * sum(self._num_words)
        self._places_on: dict[torch.device, Tensor] = {}

    def write(self, codes: Tensor) -> Tensor:
        """Return uint8 ``[..., 2, num_bytes]`` of codes, uint8 ``[..., 64, dim]``."""
        leading = codes.shape[:-2]
        codes = pad(codes, (0, self.padded_dim - self.dim))
        codes = (codes.mT if self._is_transposed else codes).flatten()
        quads = codes.view(torch.int32) if self._bits == 8 else _to_quads(codes, self._bits)
        quads = _permute(quads.view(leading.numel(), *self._axes), self._order).flatten()
        shape = (*leading, 2, self._num_tiles, _NUM_LANES)
        if self._bits == 8:
            planes = [quads.view(*shape, 2).movedim(-1, -2).flatten(-3, -2)]
        else:
            planes = self._to_planes(quads.view(torch.int32).view(shape))
        return torch.cat([_to_bytes(_group(plane)) for plane in planes], -1)

    def read(self, data: Tensor, table: Tensor | None) -> Tensor:
        """Return the levels, ``[..., 64, dim]``, of what `write` returned; see `RecordLayout.read`."""
        leading = data.shape[:-2]
        words = data.view(torch.int32)
        if self._bits == 4:
            words = _swap_signs(words)
        elif self._bits < 4:
            planes = words.split([_NUM_LANES * count for count in self._num_words], -1)
            words = self._to_tiles([_ungroup(plane) for plane in planes])
        places = self._places(data.device).expand(leading.numel(), -1)
        quads = words.flatten().view(torch.int32 if self._bits == 8 else torch.int16).view(places.shape)
        quads = quads.gather(1, places).flatten()
        if table is None:
            levels = quads.view(torch.int8).float()
        else:
            levels = take_rows(table, quads.view(torch.uint16).long())
        if self._is_transposed:
            return levels.view(*leading, self.padded_dim, BLOCK_SIZE)[..., : self.dim, :].mT
        return levels.view(*leading, BLOCK_SIZE, self.padded_dim)[..., : self.dim]

    def _places(self, device: torch.device) -> Tensor:
        if device not in self._places_on:
            with torch.inference_mode(False):
                self._places_on[device] = self._find_places().to(device)
        return self._places_on[device]

    def _find_places(self) -> Tensor:
        """Return where each quad of a block lies among those that `read` puts in the order of the axes."""
        words = torch.arange(2 * _NUM_LANES * self._num_words[0]).view(2, -1)
        if self._bits == 8:
            quads = _ungroup(words).unflatten(-2, (self._num_tiles, 2)).movedim(-2, -1)
        else:
            all_tiles = torch.arange(2 * _NUM_LANES * self._num_tiles)
            tiles = _ungroup(words) if self._bits == 4 else all_tiles
            quads = 2 * tiles.unsqueeze(-1) + torch.arange(2)
        shape = [self._axes[axis] for axis in self._order]
        back = [self._order.index(axis) for axis in range(len(shape))]
        places: Tensor = quads.reshape(shape).permute(back).flatten()
        return places

    def _to_planes(self, tiles: Tensor) -> list[Tensor]:
        """Return planes ``[..., num_words, 32]`` of pairs of quads, int32 ``[..., num_tiles, 32]``."""
        if self._bits == 4:
            return [_swap_signs(tiles)]
        planes = [_join(tiles & 0x33333333, 2, 2)]
        if self._bits == 3:
            planes.append(_join((tiles >> 2) & 0x11111111, 4, 1))
        return planes

    def _to_tiles(self, planes: list[Tensor]) -> Tensor:
        """Undo `_to_planes`."""
        if self._bits == 4:
            return _swap_signs(planes[0])
        tiles = _split(planes[0], 2, 2, 0x33333333)
        if self._bits == 3:
            tiles |= _split(planes[1], 4, 1, 0x11111111)[..., : self._num_tiles, :] << 2
        return tiles


def _to_quads(codes: Tensor, bits: int) -> Tensor:
    """Return int16 ``[num_codes / 4]``."""
    half = 1 << (bits - 1)
    is_positive = codes >> (bits - 1)
    magnitudes = (~codes ^ (is_positive * (half - 1))) & (half - 1)
    signs = _to_nibbles(is_positive ^ 1)
    if bits == 4:  # bits 0, 4, 8, 12 to 7, 15, 3, 11
        signs = (signs << 7) & 0x80 | (signs << 11) & 0x8000 | (signs >> 5) & 0x8 | (signs >> 1) & 0x800
    else:
        signs = signs << (bits - 1)
    return (_to_nibbles(magnitudes) | signs).to(torch.int16)


def _to_nibbles(codes: Tensor) -> Tensor:
    """Return every four of uint8 codes below 16 as the low half of an int32."""
    quads = codes.view(torch.int32)
    pairs = (quads | quads >> 4) & 0xFF00FF
    return (pairs | pairs >> 8) & 0xFFFF


def _swap_signs(words: Tensor) -> Tensor:
    """Exchange bits 3 and 11 of words with bits 23 and 31."""
    difference = (words >> 20).bitwise_xor_(words).bitwise_and_(0x0808)
    return (difference << 20).bitwise_or_(difference).bitwise_xor_(words)


def _join(fields: Tensor, count: int, width: int) -> Tensor:
    """Join fields, int32 ``[..., num_tiles, 32]``, of `count` tiles each to words, `width` bits apart."""
    fields = pad(fields, (0, 0, 0, -fields.shape[-2] % count))
    words = fields[..., ::count, :].clone()
    for i in range(1, count):
        words |= fields[..., i::count, :] << (width * i)
    return words


def _split(words: Tensor, count: int, width: int, mask: int) -> Tensor:
    """Undo `_join`, but for what it padded with."""
    return torch.stack([(words >> (width * i)) & mask for i in range(count)], -2).flatten(-3, -2)


def _group(words: Tensor) -> Tensor:
    """Put words ``[..., num_words, 32]`` into groups of four, lane by lane: ``[..., num_words * 32]``."""
    return torch.cat([group.mT.flatten(-2) for group in words.split(4, -2)], -1)


def _ungroup(plane: Tensor) -> Tensor:
    """Undo `_group`."""
    num_rest = plane.shape[-1] % (4 * _NUM_LANES)
    groups, rest = plane.tensor_split([plane.shape[-1] - num_rest], -1)
    words = groups.unflatten(-1, (groups.shape[-1] // (4 * _NUM_LANES), _NUM_LANES, 4)).mT.flatten(-3, -2)
    return torch.cat([words, rest.unflatten(-1, (_NUM_LANES, -1)).mT], -2) if num_rest else words


def _permute(x: Tensor, order: tuple[int, ...] | list[int]) -> Tensor:
    """Permute all axes but the first."""
    return x.permute(0, *(axis + 1 for axis in order))


def _to_bytes(x: Tensor) -> Tensor:
    # Flat first: the strides of an empty tensor may be any, even once it is contiguous.
    return x.flatten().view(torch.uint8).view(*x.shape[:-1], x.shape[-1] * x.itemsize)
