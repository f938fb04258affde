"""MemoryFootprint: the bytes that a cache holds, and bits per number that follow from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryFootprint:
    """What a cache holds, in bytes of tensors; nothing is allocated ahead.

    Attributes:
        compressed_bytes: Codes, norms and means.
        exact_bytes: The first and the newest tokens, in the model's dtype.
        other_bytes: Recurrent and convolution states, and layers that stay transformers' own.
        num_compressed_values: Numbers in the keys and values that are compressed.
        num_values: Numbers in the keys and values that an uncompressed cache would hold for the same tokens.
    """

    compressed_bytes: int
    exact_bytes: int
    other_bytes: int
    num_compressed_values: int
    num_values: int

    @property
    def total_bytes(self) -> int:
        """All bytes held."""
        return self.compressed_bytes + self.exact_bytes + self.other_bytes

    @property
    def bf16_bytes(self) -> int:
        """Bytes of transformers' DynamicCache with keys and values in bfloat16, for the same tokens."""
        return 2 * self.num_values + self.other_bytes

    @property
    def bits_per_value(self) -> float:
        """Bits that a number of a key or value takes on average, everything counted; 0 if there are none."""
        return 8 * (self.compressed_bytes + self.exact_bytes) / max(1, self.num_values)

    @property
    def bits_per_compressed_value(self) -> float:
        """The same for the numbers that are compressed: codes, norms and means."""
        return 8 * self.compressed_bytes / max(1, self.num_compressed_values)
