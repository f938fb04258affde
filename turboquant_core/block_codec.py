"""BlockCodec: blocks of keys and values as records of bytes, and attention's two products with them.

The products are taken in the space in which keys and values are stored: queries are brought there, and sums
of values back. This is the reference of what kernels do; it knows records, not whose they are.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import functools

import torch
from torch import Tensor

from turboquant_core.block_quantizer import BlockQuantizer
from turboquant_core.codebook import Codebook, e4m3_codebook
from turboquant_core.record import KEYS, VALUES, BlockParts, RecordLayout, quad_table


class BlockCodec:
    """Keep blocks as their quantized keys and values, see `record.py`.

    Args:
        key_quantizer: Quantizes keys, and says how they are transformed.
        value_quantizer: The same of values.

    Attributes:
        key_quantizer: As given.
        value_quantizer: As given.
        record_bytes: Size of the record of one block and kv head.
    """

    def __init__(self, key_quantizer: BlockQuantizer, value_quantizer: BlockQuantizer) -> None:
        self.key_quantizer = key_quantizer
        self.value_quantizer = value_quantizer
        self._quantizers = (key_quantizer, value_quantizer)
        self._layout = RecordLayout(
            key_quantizer.dim, key_quantizer.bits, value_quantizer.dim, value_quantizer.bits
        )
        self.record_bytes = self._layout.record_bytes

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """Make records of blocks.

        Args:
            keys: ``[..., num_kv_heads, num_blocks, 64, key_dim]``, any floating-point type, any strides.
            values: ``[..., num_kv_heads, num_blocks, 64, value_dim]``.

        Returns:
            uint8 ``[..., num_kv_heads, num_blocks, record_bytes]``.

        Raises:
            TypeError: If keys or values are not floating-point.
            ValueError: If they have another shape.
        """
        key_quantizer, value_quantizer = self._quantizers
        return self._layout.write(key_quantizer.encode(keys), value_quantizer.encode(values))

    def decode(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of records, float32 and shaped as `encode` takes them.

        Raises:
            ValueError: If records are not of this size.
        """
        keys, values = (
            quantizer.transform.undo(stored.flatten(-3, -2)).view(stored.shape)
            for quantizer, stored in zip(self._quantizers, self.stored(records), strict=True)
        )
        return keys, values

    def stored(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of records, transformed as they are stored: float32 ``[..., 64, dim]``.

        Raises:
            ValueError: If records are not of this size.
        """
        return self._stored(records, KEYS), self._stored(records, VALUES)

    def transform_queries(self, queries: Tensor) -> Tensor:
        """Bring queries to where keys are stored, so that products with keys stay what they are.

        Args:
            queries: ``[..., num_kv_heads, num_queries, key_dim]``, any floating-point type.

        Returns:
            float32, of the same shape.
        """
        return self._quantizers[KEYS].transform.apply_to_queries(queries.float())

    def restore_values(self, sums: Tensor) -> Tensor:
        """Bring weighted sums of stored values back.

        Args:
            sums: ``[..., num_kv_heads, num_queries, value_dim]``, any floating-point type.

        Returns:
            float32, of the same shape.
        """
        return self._quantizers[VALUES].transform.undo(sums.float())

    def scores(self, queries: Tensor, records: Tensor) -> Tensor:
        """Multiply queries with the keys of blocks.

        Args:
            queries: Of `transform_queries`, ``[num_blocks, num_kv_heads, num_queries, key_dim]``.
            records: ``[num_blocks, num_kv_heads, record_bytes]``.

        Returns:
            float32 ``[num_blocks, num_kv_heads, num_queries, 64]``.
        """
        if queries.shape[-2] > queries.shape[-1]:  # It takes less to finish the keys than their products.
            return queries @ self._stored(records, KEYS).mT
        levels, norms, means, steps = self._read(records, KEYS)
        scores = (queries @ levels.mT).mul_(norms.unsqueeze(-2))
        scores += (queries @ means.unsqueeze(-1)) * steps[..., None, None]
        return scores

    def weighted_values(self, weights: Tensor, records: Tensor) -> Tensor:
        """Add up the values of each block, times weights, as they are stored: see `restore_values`.

        Args:
            weights: float32 ``[num_blocks, num_kv_heads, num_queries, 64]``.
            records: ``[num_blocks, num_kv_heads, record_bytes]``.

        Returns:
            float32 ``[num_blocks, num_kv_heads, num_queries, value_dim]``.
        """
        levels, norms, means, steps = self._read(records, VALUES)
        sums = (weights * norms.unsqueeze(-2)) @ levels
        sums += (weights.sum(-1, keepdim=True) * steps[..., None, None]) * means.unsqueeze(-2)
        return sums

    def _stored(self, records: Tensor, kind: int) -> Tensor:
        levels, norms, means, steps = self._read(records, kind)
        return levels.mul_(norms.unsqueeze(-1)).add_((means * steps.unsqueeze(-1)).unsqueeze(-2))

    def _read(self, records: Tensor, kind: int) -> BlockParts:
        dim, bits = self._quantizers[kind].dim, self._quantizers[kind].bits
        table = None if bits == 8 else _quad_table(e4m3_codebook(dim, bits), bits, records.device)
        return self._layout.read(records, kind, table)


@functools.lru_cache(maxsize=64)
def _quad_table(codebook: Codebook, bits: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return quad_table(torch.tensor(codebook.centroids, dtype=torch.float32, device=device), bits)
