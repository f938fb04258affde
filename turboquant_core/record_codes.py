"""The codes of keys or values in a record: `record.py` says where each bit lies. Knows no norms and means."""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from turboquant_core.config import BLOCK_SIZE
from turboquant_core.table import take_rows

KEYS, VALUES = 0, 1

HALF_SIZE = BLOCK_SIZE // 2
"""Tokens of half a record."""

TILE = 16
_NUM_LANES = 32

# Codes move in quads, the four of one tile, lane and r. Below 8 bits a quad is a halfword that has magnitude
# j at bit 4j and sign j here; at 4 bits these are the places from which one swap brings all signs to theirs.
_SIGN_BITS = {2: (1, 5, 9, 13), 3: (2, 6, 10, 14), 4: (7, 15, 3, 11)}

# The order of the axes of a block's quads (`tile_axes`) in a record: half, tile, lane, r.
RECORD_ORDER = {KEYS: (0, 1, 5, 2, 4, 6, 3), VALUES: (3, 0, 4, 2, 5, 1)}


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


def tile_axes(kind: int, num_tiles: int) -> tuple[int, ...]:
    """Return the axes of a block's quads, of a head dim of so many tiles.

    Keys: half, tile row, g // 2, r, g % 2, tile column, t.
    Values, transposed: tile row, r, g, half, tile column, t.
    """
    return (num_tiles, 2, 8, 2, 2, 4) if kind == VALUES else (2, 2, 4, 2, 2, num_tiles, 4)


class CodeLayout:
    """Say where the codes of keys, or of values, lie in the two halves of a record."""

    def __init__(self, dim: int, bits: int, kind: int) -> None:
        num_tile_cols = -(-dim // TILE)
        num_tiles = 2 * num_tile_cols
        self.dim = dim
        self.padded_dim = TILE * num_tile_cols
        self._bits = bits
        self._num_tiles = num_tiles
        self._is_transposed = kind == VALUES
        self._axes = tile_axes(kind, num_tile_cols)
        self._order = RECORD_ORDER[kind]
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
        quads = permute(quads.view(leading.numel(), *self._axes), self._order).flatten()
        shape = (*leading, 2, self._num_tiles, _NUM_LANES)
        if self._bits == 8:
            planes = [quads.view(*shape, 2).movedim(-1, -2).flatten(-3, -2)]
        else:
            planes = self._to_planes(quads.view(torch.int32).view(shape))
        return torch.cat([to_bytes(_group(plane)) for plane in planes], -1)

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


def permute(x: Tensor, order: tuple[int, ...] | list[int]) -> Tensor:
    """Permute all axes but the first."""
    return x.permute(0, *(axis + 1 for axis in order))


def to_bytes(x: Tensor) -> Tensor:
    # Flat first: the strides of an empty tensor may be any, even once it is contiguous.
    return x.flatten().view(torch.uint8).view(*x.shape[:-1], x.shape[-1] * x.itemsize)
