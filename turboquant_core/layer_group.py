"""LayerGroup: the blocks of the layers whose queries see alike, on the device and on the host.

Knows block ids, hashes and what is seen from where; no request and no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turboquant_core.block_manager import BlockManager
from turboquant_core.config import BLOCK_SIZE
from turboquant_core.host_tier import HostTier
from turboquant_core.timeline import Timeline


@dataclass(frozen=True)
class Visibility:
    """Say what a group's queries see of the tokens before them: all, where both attributes are None.

    Attributes:
        window: A query at p sees the tokens after ``p - window``.
        chunk: A query at p sees the tokens from the last multiple of this on.
    """

    window: int | None = None
    chunk: int | None = None

    @property
    def reach(self) -> int | None:
        """Most tokens that a query sees, itself included; None if there is no bound."""
        return min((length for length in (self.window, self.chunk) if length is not None), default=None)

    def first_visible(self, position: int) -> int:
        """Return the first position that a query at `position` sees; a later query sees none before it."""
        first = 0
        if self.window is not None:
            first = max(first, position - self.window + 1)
        if self.chunk is not None:
            first = max(first, position // self.chunk * self.chunk)
        return first


@dataclass(frozen=True)
class LayerGroup:
    """Share blocks of one group among requests.

    Attributes:
        timeline: Which blocks are made of a request's tokens.
        visibility: What the layers' queries see.
        blocks: Those on the device.
        tier: Those on the host.
    """

    timeline: Timeline
    visibility: Visibility
    blocks: BlockManager
    tier: HostTier

    def has(self, block_hash: bytes) -> bool:
        """Return whether a block can be found, on the device or on the host."""
        return self.blocks.find(block_hash) is not None or block_hash in self.tier

    def share(self, block_hashes: Sequence[bytes]) -> list[int]:
        """Add an owner to blocks that can be found; those on the host get blocks on the device."""
        missing = [block_hash for block_hash in block_hashes if self.blocks.find(block_hash) is None]
        self.tier.hold(missing)
        self.blocks.share(self._found(block_hashes))
        new = self.blocks.allocate(len(missing))
        for block_id, block_hash in zip(new, missing, strict=True):
            self.blocks.publish(block_id, block_hash)
        self.tier.fetch(missing, new)
        return self._found(block_hashes)

    def count_owned(self, block_hashes: Sequence[bytes]) -> int:
        """Return how many of the blocks have an owner on the device."""
        return sum(map(self.blocks.is_owned, self._found(block_hashes)))

    def _found(self, block_hashes: Sequence[bytes]) -> list[int]:
        found = map(self.blocks.find, block_hashes)
        return [block_id for block_id in found if block_id is not None]

    def first_block(self, position: int) -> int:
        """Return the first block that queries at `position` or later see a token of."""
        first_visible = self.visibility.first_visible(position)
        return max(0, first_visible - self.timeline.num_sinks) // BLOCK_SIZE

    def most_held(self, num_blocks: int) -> int:
        """Return how many of so many successive blocks a request holds at a time, at most."""
        reach = self.visibility.reach
        if reach is None:
            return num_blocks
        # What the first query of a chunk sees, and what becomes of the chunk.
        return min(num_blocks, (reach - 1 + BLOCK_SIZE - 1 + self.timeline.segment_size) // BLOCK_SIZE)
