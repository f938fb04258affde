"""ExactCodec: BlockCodec's methods for blocks that are kept as they come.

A record is a block's keys, ``[64, key_dim]``, and then its values, in the model's own type. It tells what
compression costs from what everything around it does.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_core.config import BLOCK_SIZE


class ExactCodec:
    """Keep blocks uncompressed; arguments and results are those of :class:`BlockCodec`.

    Args:
        key_dim: Head dimension of keys.
        value_dim: Head dimension of values.
        dtype: Floating-point type in which they are kept.

    Attributes:
        record_bytes: Size of the record of one block and kv head.
    """

    def __init__(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
        self._dims = (key_dim, value_dim)
        self._dtype = dtype
        self._sizes = [BLOCK_SIZE * dim * dtype.itemsize for dim in self._dims]
        self.record_bytes = sum(self._sizes)

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """Make records of blocks."""
        parts = [x.to(self._dtype).flatten(-2) for x in (keys, values)]
        return torch.cat(parts, -1).view(torch.uint8)

    def decode(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of records, in float32."""
        parts = zip(records.contiguous().split(self._sizes, -1), self._dims, strict=True)
        keys, values = (x.view(self._dtype).unflatten(-1, (BLOCK_SIZE, dim)).float() for x, dim in parts)
        return keys, values

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
