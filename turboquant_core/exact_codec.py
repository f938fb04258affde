"""ExactCodec: BlockCodec's methods for blocks that are kept in the model's own type.

A record is two halves of 32 tokens, each of them keys and then values, in the tiles and lanes of `record.py`
with a number in place of a code: a lane has its 8 numbers (r, j) of a tile side by side. So kernels that read
those records read these. It tells what compression costs from what everything around it does.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from turboquant_core.config import BLOCK_SIZE
from turboquant_core.record_codes import (
    HALF_SIZE,
    KEYS,
    RECORD_ORDER,
    TILE,
    VALUES,
    permute,
    tile_axes,
    to_bytes,
)


class ExactCodec:
    """Keep blocks uncompressed; arguments and results are those of :class:`BlockCodec`.

    Args:
        key_dim: Head dimension of keys.
        value_dim: Head dimension of values.
        dtype: Floating-point type in which they are kept.

    Attributes:
        dtype: As given.
        record_bytes: Size of the record of one block and kv head.
    """

    def __init__(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._dims = (key_dim, value_dim)
        self._num_tiles = [-(-dim // TILE) for dim in self._dims]
        # Of half a record.
        self._sizes = [HALF_SIZE * TILE * count * dtype.itemsize for count in self._num_tiles]
        self.record_bytes = 2 * sum(self._sizes)

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """Make records of blocks."""
        return torch.cat([self._to_tiles(keys, KEYS), self._to_tiles(values, VALUES)], -1).flatten(-2)

    def decode(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of records, in float32."""
        keys, values = self.read(records)
        return keys.float(), values.float()

    def read(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of records in the type that they are kept in."""
        keys, values = records.contiguous().unflatten(-1, (2, -1)).split(self._sizes, -1)
        return self._from_tiles(keys, KEYS), self._from_tiles(values, VALUES)

    def _to_tiles(self, states: Tensor, kind: int) -> Tensor:
        """Return the bytes of keys or values, ``[..., 2, num_bytes]``."""
        num_tiles = self._num_tiles[kind]
        states = pad(states.to(self.dtype), (0, TILE * num_tiles - states.shape[-1]))
        leading = states.shape[:-2]
        tiles = (states.mT if kind == VALUES else states).flatten()
        tiles = tiles.view(leading.numel(), *tile_axes(kind, num_tiles), 4)
        order = (*RECORD_ORDER[kind], len(RECORD_ORDER[kind]))
        return to_bytes(permute(tiles, order).flatten(2)).view(*leading, 2, self._sizes[kind])

    def _from_tiles(self, data: Tensor, kind: int) -> Tensor:
        """Undo `_to_tiles`."""
        axes, order = tile_axes(kind, self._num_tiles[kind]), RECORD_ORDER[kind]
        leading = data.shape[:-2]
        tiles = data.flatten().view(self.dtype).view(leading.numel(), *(axes[axis] for axis in order), 4)
        back = [*(order.index(axis) for axis in range(len(order))), len(order)]
        shape = (BLOCK_SIZE, TILE * self._num_tiles[kind])
        states = permute(tiles, back).reshape(*leading, *(shape[::-1] if kind == VALUES else shape))
        return (states.mT if kind == VALUES else states)[..., : self._dims[kind]]

    def stored(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of records as they are stored: they are not transformed."""
        return self.decode(records)

    def transform_queries(self, queries: Tensor) -> Tensor:
        """Return queries in float32."""
        return queries.float()

    def restore_values(self, sums: Tensor) -> Tensor:
        """Return sums in float32."""
        return sums.float()

    def scores(self, queries: Tensor, records: Tensor) -> Tensor:
        """Multiply queries with the keys of blocks."""
        return queries @ self.decode(records)[0].mT

    def weighted_values(self, weights: Tensor, records: Tensor) -> Tensor:
        """Add up the values of each block, times weights."""
        return weights @ self.decode(records)[1]
