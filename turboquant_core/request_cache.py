"""CacheManager and RequestCache: the blocks and the slot of every running request.

Layers that see alike form a group with block ids of its own; a request has one block table per group. Knows
which blocks hold which tokens, and nothing of tensors: the device writes and reads what the tables say.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Sequence

from turboquant_core.block_hashes import chain_hashes
from turboquant_core.block_manager import BlockManager
from turboquant_core.config import BLOCK_SIZE
from turboquant_core.host_tier import HostTier, Moves
from turboquant_core.layer_group import LayerGroup, Visibility
from turboquant_core.timeline import Timeline

__all__ = ["CacheManager", "RequestCache", "Visibility"]


class CacheManager:
    """Open caches for requests, and say what fits.

    Args:
        timeline: Which blocks are made of a request's tokens.
        visibilities: What each layer group sees.
        num_blocks: Number of blocks of each layer group.
        num_slots: Number of caches that may be open at a time.
        caches_prefixes: Whether a prompt may find blocks of earlier prompts.
        num_host_blocks: Number of blocks of each layer group that host memory has room for.

    Attributes:
        tiers: What of each layer group lies there.
        num_host_hit_tokens: Tokens that caches were opened with and that had to be copied from there.
        max_tokens: Tokens up to which any request, whatever part of it is the prompt, fits while it runs
            alone.
    """

    def __init__(
        self,
        timeline: Timeline,
        visibilities: Sequence[Visibility],
        num_blocks: Sequence[int],
        num_slots: int,
        caches_prefixes: bool,
        num_host_blocks: int = 0,
    ) -> None:
        self.timeline = timeline
        self.caches_prefixes = caches_prefixes
        self.tiers = [HostTier(num_host_blocks) for _ in visibilities]
        self.num_host_hit_tokens = 0
        self._groups = [
            LayerGroup(timeline, visibility, BlockManager(count, tier.keep), tier)
            for visibility, count, tier in zip(visibilities, num_blocks, self.tiers, strict=True)
        ]
        self._sees_everything = all(visibility.reach is None for visibility in visibilities)
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._running: dict[int, RequestCache] = {}
        self._hashed: tuple[Sequence[int], bytes] = (), b""
        self._hashes: list[bytes] = []
        # Of tokens that are all a prompt, at least as many blocks are made as where some are generated.
        too_many = bisect.bisect(range(sys.maxsize), False, key=lambda n: not self.can_ever_hold(n, n))
        self.max_tokens = too_many - 1

    @property
    def num_running(self) -> int:
        """Number of open caches."""
        return len(self._running)

    @property
    def num_free_blocks(self) -> list[int]:
        """Number of blocks of each layer group that can be allocated."""
        return [group.blocks.num_free for group in self._groups]

    def can_ever_hold(self, num_tokens: int, num_prompt_tokens: int) -> bool:
        """Return whether a request of so many tokens can be opened and computed while it runs alone.

        It can in steps of one chunk each, see `Timeline.chunk_end`.
        """
        num_blocks = self.timeline.num_blocks(num_tokens, num_prompt_tokens)
        return all(group.most_held(num_blocks) <= group.blocks.num_blocks for group in self._groups)

    def open(
        self, token_ids: Sequence[int], num_prompt_tokens: int, salt: bytes = b""
    ) -> RequestCache | None:
        """Admit a request: a slot, the longest cached prefix, and the blocks that all its tokens need.

        Groups that do not see everything get theirs in `RequestCache.extend`; enough of them must be free.

        Args:
            token_ids: The prompt and, after a preemption, what was generated.
            num_prompt_tokens: How many of them are the prompt.
            salt: Prefixes are found among requests of the same salt.

        Returns:
            None if there is no slot or too few blocks; then nothing has changed.
        """
        assert 0 < num_prompt_tokens <= len(token_ids), "a request has a prompt"
        if not self._free_slots:
            return None
        timeline = self.timeline
        hashes = self._hash(token_ids[:num_prompt_tokens], salt) if self.caches_prefixes else []
        num_hit_blocks = self._num_hit_blocks(hashes[: timeline.num_reusable_blocks(num_prompt_tokens)])
        num_hit_tokens = timeline.num_sinks + BLOCK_SIZE * num_hit_blocks if num_hit_blocks else 0
        num_blocks = timeline.num_blocks(len(token_ids), num_prompt_tokens)
        firsts = [group.first_block(num_hit_tokens) for group in self._groups]
        for group, first in zip(self._groups, firsts, strict=True):
            num_owned = group.count_owned(hashes[first:num_hit_blocks])
            if group.most_held(num_blocks - first) - num_owned > group.blocks.num_free:
                return None
        self.num_host_hit_tokens += self._count_on_host(hashes[:num_hit_blocks], firsts)
        block_tables: list[list[int | None]] = []
        for group, first in zip(self._groups, firsts, strict=True):
            hit = group.share(hashes[first:num_hit_blocks])
            table: list[int | None] = [None] * (num_hit_blocks - len(hit))
            table += hit
            if group.visibility.reach is None:
                table += group.blocks.allocate(num_blocks - num_hit_blocks)
            block_tables.append(table)
        return RequestCache(self, block_tables, num_prompt_tokens, num_hit_tokens, hashes, num_hit_blocks)

    def take_moves(self) -> list[Moves]:
        """Return the copies, of each layer group, to make before the step that was made room for last."""
        return [tier.take_moves() for tier in self.tiers]

    def check_integrity(self) -> None:
        """Raise an AssertionError that says what does not add up in slots, owners and blocks."""
        slots = sorted([*self._free_slots, *self._running])
        assert slots == list(range(self._num_slots)), f"the free and the taken slots are {slots}"
        for i, group in enumerate(self._groups):
            group.tier.check_integrity()
            group.blocks.check_integrity(
                [block_id for block_id in cache.block_tables[i] if block_id is not None]
                for cache in self._running.values()
            )

    def _hash(self, prompt: Sequence[int], salt: bytes) -> list[bytes]:
        """Return a prompt's hashes: the newest ones if they are its own, as while it waits for room."""
        if self._hashed != (prompt, salt):
            self._hashed = prompt, salt
            self._hashes = chain_hashes(prompt, salt, self.timeline.num_sinks)
        return self._hashes

    def _num_hit_blocks(self, hashes: Sequence[bytes]) -> int:
        """Return the longest prefix, in blocks, of which every group has what later queries see of it."""
        step = self.timeline.segment_size // BLOCK_SIZE
        candidates = set(range(step, len(hashes) + 1, step))
        for group in self._groups:
            num_successive = 0
            for count, block_hash in enumerate(hashes, start=1):
                num_successive = num_successive + 1 if group.has(block_hash) else 0
                if count in candidates:
                    first = group.first_block(self.timeline.num_sinks + BLOCK_SIZE * count)
                    if num_successive < count - first:
                        candidates.remove(count)
        return max(candidates, default=0)

    def _count_on_host(self, hashes: Sequence[bytes], firsts: Sequence[int]) -> int:
        """Return the tokens of blocks that some group needs, from its first on, and has on the host only."""
        missing = {
            block_hash
            for group, first in zip(self._groups, firsts, strict=True)
            for block_hash in hashes[first:]
            if group.blocks.find(block_hash) is None
        }
        return BLOCK_SIZE * len(missing)


class RequestCache:
    """Hold the blocks and the slot of one running request; `CacheManager.open` makes it.

    Attributes:
        slot: Where its newest tokens lie.
        block_tables: Per layer group, the block id of each block; None where no later query sees it.
        num_hit_tokens: Tokens up to the end of the prefix that was found in the cache, or 0.
    """

    def __init__(
        self,
        manager: CacheManager,
        block_tables: list[list[int | None]],
        num_prompt_tokens: int,
        num_hit_tokens: int,
        hashes: Sequence[bytes],
        num_published: int,
    ) -> None:
        self.block_tables = block_tables
        self.num_hit_tokens = num_hit_tokens
        self._manager = manager
        self._num_prompt_tokens = num_prompt_tokens
        self._hashes = hashes
        self._num_published = num_published
        self._num_dropped = [0] * len(block_tables)
        self.slot = manager._free_slots.pop()
        manager._running[self.slot] = self

    def extend(self, start: int, num_tokens: int) -> bool:
        """Make room for a step that computes the tokens ``start .. num_tokens - 1``.

        Blocks that no query from `start` on sees are dropped first.

        Returns:
            False if a group has too few blocks left; then none is allocated.
        """
        manager = self._manager
        num_blocks = manager.timeline.num_blocks(num_tokens, self._num_prompt_tokens)
        if manager._sees_everything and all(num_blocks <= len(table) for table in self.block_tables):
            return True  # as in most steps
        for i, (group, table) in enumerate(zip(manager._groups, self.block_tables, strict=True)):
            kept = min(group.first_block(start), len(table))
            dropped = [block_id for block_id in table[self._num_dropped[i] : kept] if block_id is not None]
            group.blocks.release(dropped)
            for index in range(self._num_dropped[i], kept):
                table[index] = None
            self._num_dropped[i] = kept
        missing = [max(0, num_blocks - len(table)) for table in self.block_tables]
        if any(count > group.blocks.num_free for count, group in zip(missing, manager._groups, strict=True)):
            return False
        for count, group, table in zip(missing, manager._groups, self.block_tables, strict=True):
            table += group.blocks.allocate(count)
        return True

    def publish(self, num_tokens: int) -> None:
        """Let later prompts find this prompt's blocks, of which `num_tokens` tokens have been computed."""
        # What the prompt's next chunk reads, or its last one.
        position = min(num_tokens, self._num_prompt_tokens - 1)
        num_blocks = self._manager.timeline.num_visible_blocks(position, self._num_prompt_tokens)
        num_blocks = min(num_blocks, len(self._hashes))
        for group, table in zip(self._manager._groups, self.block_tables, strict=True):
            for i in range(self._num_published, num_blocks):
                block_id = table[i]
                if block_id is not None:
                    group.blocks.publish(block_id, self._hashes[i])
        self._num_published = max(self._num_published, num_blocks)

    def fork(self) -> RequestCache | None:
        """Return a cache that shares these blocks, all of which must have been written, in a slot of its own.

        Returns:
            None if there is no slot.
        """
        if not self._manager._free_slots:
            return None
        for group, table in zip(self._manager._groups, self.block_tables, strict=True):
            group.blocks.share(block_id for block_id in table if block_id is not None)
        fork = RequestCache(
            self._manager,
            [list(table) for table in self.block_tables],
            self._num_prompt_tokens,
            self.num_hit_tokens,
            self._hashes,
            self._num_published,
        )
        fork._num_dropped = list(self._num_dropped)
        return fork

    def release(self) -> None:
        """Give back the blocks and the slot."""
        manager = self._manager
        assert manager._running.get(self.slot) is self, "a cache is released once"
        for group, table in zip(manager._groups, self.block_tables, strict=True):
            group.blocks.release([block_id for block_id in table if block_id is not None])
        del manager._running[self.slot]
        manager._free_slots.append(self.slot)
        self.block_tables = []
