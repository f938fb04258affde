"""BlockManager: who owns which block of one layer group, and which blocks can be found again by their hash.

A block is owned (by one request or more), cached (owned by none, but still known by its hash) or free. Knows
block ids only: neither what lies in a block nor which tokens it holds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class OutOfBlocksError(RuntimeError):
    """Fewer blocks can be allocated than were asked for."""


class BlockManager:
    """Count the owners of blocks, and keep what was published until its room is needed.

    Args:
        num_blocks: Number of blocks; their ids are ``0 .. num_blocks - 1``.
        on_evict: Called with a block and the hash by which it can be found no longer.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int, bytes], None] | None = None) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._num_owners = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._unowned: OrderedDict[int, None] = OrderedDict()  # with a hash, the first to be evicted first
        self._hashes: dict[int, bytes] = {}
        self._block_ids: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Number of blocks that can be allocated: the free ones and the cached ones that nobody owns."""
        return len(self._free) + len(self._unowned)

    @property
    def num_cached(self) -> int:
        """Number of blocks that `find` can find, owned or not."""
        return len(self._hashes)

    def is_owned(self, block_id: int) -> bool:
        """Return whether the block has an owner, so that it is not among the `num_free`."""
        return self._num_owners[block_id] > 0

    def allocate(self, count: int) -> list[int]:
        """Give blocks to a new owner: free ones, then the cached ones that were released longest ago.

        Raises:
            OutOfBlocksError: Fewer than `count` can be allocated; nothing has changed.
        """
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} blocks are needed, {self.num_free} are free")
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block_id in block_ids:
            self._num_owners[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add an owner to blocks that are owned or cached."""
        for block_id in block_ids:
            assert self.is_owned(block_id) or block_id in self._unowned, f"block {block_id} is free"
            self._unowned.pop(block_id, None)
            self._num_owners[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Take an owner off blocks, which are given in the order of their tokens.

        The last of them are evicted first: without what precedes it no block is of use.
        """
        for block_id in reversed(block_ids):
            assert self.is_owned(block_id), f"block {block_id} has no owner"
            self._num_owners[block_id] -= 1
            if self._num_owners[block_id]:
                continue
            if block_id in self._hashes:
                self._unowned[block_id] = None
            else:
                self._free.append(block_id)

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Let an owned block be found; if another block has this hash already, that one is kept."""
        assert self.is_owned(block_id), f"block {block_id} has no owner"
        if block_hash in self._block_ids:
            return
        assert block_id not in self._hashes, f"block {block_id} has a hash already"
        self._hashes[block_id] = block_hash
        self._block_ids[block_hash] = block_id

    def find(self, block_hash: bytes) -> int | None:
        """Return the block that was published with this hash, unless it has been evicted."""
        return self._block_ids.get(block_hash)

    def check_integrity(self, owners: Iterable[Iterable[int]]) -> None:
        """Raise an AssertionError that says what does not add up, given the blocks of every owner."""
        expected: Counter[int] = Counter()
        for owned in owners:
            counts = Counter(owned)
            twice = sorted(block_id for block_id, count in counts.items() if count > 1)
            assert not twice, f"an owner holds blocks {twice} more than once"
            expected += counts
        unknown = sorted(expected.keys() - set(range(self.num_blocks)))
        assert not unknown, f"blocks {unknown} are owned and do not exist"
        free = Counter(self._free)
        for block_id, num_owners in enumerate(self._num_owners):
            assert num_owners == expected[block_id], (
                f"block {block_id} counts {num_owners} owners and has {expected[block_id]}"
            )
            places = free[block_id] + (block_id in self._unowned) + (num_owners > 0)
            assert places == 1, f"block {block_id} is in {places} of the states owned, cached and free"
            assert (block_id in self._hashes) >= (block_id in self._unowned), (
                f"block {block_id} is cached and has no hash"
            )
            assert not (free[block_id] and block_id in self._hashes), (
                f"block {block_id} is free and has a hash"
            )
        assert len(self._free) + len(self._unowned) + len(+expected) == self.num_blocks, (
            "the blocks that are owned, cached and free are not as many as there are"
        )
        inverse = {block_hash: block_id for block_id, block_hash in self._hashes.items()}
        assert inverse == self._block_ids, "the hashes of blocks and the blocks of hashes differ"

    def _evict(self) -> int:
        block_id, _ = self._unowned.popitem(last=False)
        block_hash = self._hashes.pop(block_id)
        del self._block_ids[block_hash]
        if self._on_evict is not None:
            self._on_evict(block_id, block_hash)
        return block_id
