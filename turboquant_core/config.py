"""KVCacheConfig: the few choices that define a compressed KV cache, and what they cost in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from turboquant_core.packing import packed_size

BLOCK_SIZE = 64
"""Tokens that leave the residual together and share one mean per kv head."""

SUPPORTED_BITS = (2, 3, 4, 8)

_NORM_BYTES = 2
_MEAN_STEP_BYTES = 2


@dataclass(frozen=True)
class KVCacheConfig:
    """Choose the precision of a compressed KV cache.

    Attributes:
        key_bits: Bits per code of a key: 2, 3, 4 or 8.
        value_bits: Bits per code of a value: 2, 3, 4 or 8.
        residual_length: Number of newest tokens that always stay in full precision.
        num_sinks: Number of first tokens that stay in full precision; sliding windows, which lose sight
            of them, have none.
        seed: Seed of the rotations.

    Raises:
        ValueError: If a field is out of range.
    """

    key_bits: int = 4
    value_bits: int = 4
    residual_length: int = 128
    num_sinks: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            if bits not in SUPPORTED_BITS:
                raise ValueError(f"{name} must be 2, 3, 4 or 8, got {bits!r}")
        for name in ("residual_length", "num_sinks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def bytes_per_token(self, key_head_dim: int, value_head_dim: int) -> float:
        """Return the bytes of one compressed token in one kv head: codes, norms and means."""
        return vector_bytes(key_head_dim, self.key_bits) + vector_bytes(value_head_dim, self.value_bits)

    def bits_per_value(self, key_head_dim: int, value_head_dim: int) -> float:
        """Return the average bits that one number of a key or value takes, all overheads included."""
        return 8 * self.bytes_per_token(key_head_dim, value_head_dim) / (key_head_dim + value_head_dim)


def vector_bytes(head_dim: int, bits: int) -> float:
    """Return the bytes of one compressed key or value in one kv head: codes, norm and its share of a mean."""
    return packed_size(head_dim, bits) + _NORM_BYTES + (head_dim + _MEAN_STEP_BYTES) / BLOCK_SIZE
