"""CacheUsage: what running requests hold of the cache at a moment, in bytes and against bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turboquant_core import BLOCK_SIZE, CacheManager
from turboquant_server.cache_size import BF16_BYTES, TIMELINE

if TYPE_CHECKING:
    from turboquant_server.cache_size import CacheSize
    from turboquant_server.engine.request import Request


@dataclass(frozen=True)
class CacheUsage:
    """Count what is held.

    Attributes:
        held_bytes: Of blocks, codes, norms, means and padding, and of slots, be they full or not; a block
            that several requests share counts once.
        bf16_bytes: What the keys and values in them would take in bfloat16.
        num_tokens: Of the layer group that holds most, those in slots included.
        num_exact_tokens: Tokens in slots, which are not compressed yet.
        share: Of the blocks of the layer group that has least left, 0 to 1.
    """

    held_bytes: int
    bf16_bytes: int
    num_tokens: int
    num_exact_tokens: int
    share: float

    @property
    def bits_per_value(self) -> float | None:
        """What a number of a key or value takes, all told; None while there is none."""
        return 8 * BF16_BYTES * self.held_bytes / self.bf16_bytes if self.bf16_bytes else None


def measure_usage(
    size: CacheSize, manager: CacheManager, running: Sequence[Request], num_ranks: int = 1
) -> CacheUsage:
    """Return what is held now, while the engine goes on; a step may be counted in part.

    Args:
        size: The cache.
        manager: Of its blocks.
        running: The requests that hold a cache.
        num_ranks: How many devices have such a cache, each for a part of the heads.
    """
    num_held = [total - free for total, free in zip(size.num_blocks, manager.num_free_blocks, strict=True)]
    num_made = list(num_held)
    num_exact = num_slots = 0
    for request in running:
        cache = request.cache
        if cache is None:  # given back meanwhile
            continue
        num_tokens = request.num_computed_tokens
        num_blocks = TIMELINE.num_blocks(num_tokens, request.num_prompt_tokens)
        for group, table in enumerate(cache.block_tables):
            num_made[group] -= max(0, len(table) - num_blocks)  # has no content yet
        num_slots += 1
        num_exact += min(num_tokens - BLOCK_SIZE * num_blocks, TIMELINE.num_exact)
    bf16_bytes = num_exact * sum(size.bf16_block_bytes) // BLOCK_SIZE
    shares = [held / total for held, total in zip(num_held, size.num_blocks, strict=True) if total]
    return CacheUsage(
        held_bytes=num_ranks * (_total(num_held, size.block_bytes) + num_slots * size.exact_bytes),
        bf16_bytes=num_ranks * (bf16_bytes + _total(num_made, size.bf16_block_bytes)),
        num_tokens=BLOCK_SIZE * max(num_made, default=0) + num_exact,
        num_exact_tokens=num_exact,
        share=max(shares, default=0.0),
    )


def _total(counts: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))
