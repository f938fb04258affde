"""HostTier: which blocks of one layer group lie in host memory, by their hash, and what is to be copied next.

What is evicted on the device goes to the host, and stays there when it is copied back, until its room is
needed. Knows ids and hashes only: neither what lies in a block nor how it is copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Moves:
    """Copies of a layer group's blocks to make before a step: first all to the host, then all back.

    Attributes:
        to_host: Block ids on the device and those on the host.
        to_device: Likewise.
    """

    to_host: list[tuple[int, int]]
    to_device: list[tuple[int, int]]


class HostTier:
    """Remember blocks that lie on the host, and collect the copies that make it so.

    A block on the host that the next copies read or write stays there until these are taken.

    Args:
        num_blocks: Number of blocks on the host; their ids are ``0 .. num_blocks - 1``.

    Attributes:
        num_to_host: Number of copies to the host that were taken.
        num_to_device: Likewise.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_to_host = 0
        self.num_to_device = 0
        self._free = list(range(num_blocks - 1, -1, -1))
        self._host_ids: OrderedDict[bytes, int] = OrderedDict()  # the first to be given up first
        self._moving: set[int] = set()
        self._to_host: list[tuple[int, int]] = []
        self._to_device: dict[int, int] = {}

    @property
    def num_held(self) -> int:
        """Number of blocks that lie on the host."""
        return len(self._host_ids)

    def __contains__(self, block_hash: bytes) -> bool:
        """Return whether a block lies here, or will once the copies are made."""
        return block_hash in self._host_ids

    def keep(self, block_id: int, block_hash: bytes) -> None:
        """Take in what lies in a block on the device, which its next owner will overwrite.

        If there is no room but that of blocks which are being copied, it is lost.
        """
        if block_hash not in self._host_ids:
            host_id = self._make_room()
            if host_id is None:
                return
            self._host_ids[block_hash] = host_id
            self._moving.add(host_id)
            self._to_host.append((block_id, host_id))
        self._host_ids.move_to_end(block_hash)

    def hold(self, block_hashes: Sequence[bytes]) -> None:
        """Let blocks, in the order of their tokens, stay here until they have been fetched."""
        for block_hash in reversed(block_hashes):
            self._moving.add(self._host_ids[block_hash])
            self._host_ids.move_to_end(block_hash)

    def fetch(self, block_hashes: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """Have blocks that are held copied to such on the device."""
        for block_hash, block_id in zip(block_hashes, block_ids, strict=True):
            host_id = self._host_ids[block_hash]
            assert host_id in self._moving, f"block {host_id} on the host may be given up"
            # If the block had another owner since the copies were last taken, what was meant for that one
            # is of no use.
            self._to_device[block_id] = host_id

    def take_moves(self) -> Moves:
        """Return the copies to be made, in order; they count as made from now on."""
        to_device = [(block_id, host_id) for block_id, host_id in self._to_device.items()]
        moves = Moves(self._to_host, to_device)
        self.num_to_host += len(moves.to_host)
        self.num_to_device += len(moves.to_device)
        self._to_host, self._to_device, self._moving = [], {}, set()
        return moves

    def check_integrity(self) -> None:
        """Raise an AssertionError that says what does not add up."""
        ids = sorted([*self._free, *self._host_ids.values()])
        assert ids == list(range(self.num_blocks)), f"the free and the taken blocks on the host are {ids}"
        copied: Iterable[int] = [host_id for _, host_id in (*self._to_host, *self._to_device.items())]
        assert self._moving.issuperset(copied), "blocks on the host are copied and may be given up"
        lost = self._moving.difference(self._host_ids.values())
        assert not lost, f"blocks {sorted(lost)} on the host were given up while they are copied"

    def _make_room(self) -> int | None:
        if self._free:
            return self._free.pop()
        # What is being copied was moved to the end, so if the first is, so are all or were used since.
        block_hash = next(iter(self._host_ids), None)
        if block_hash is None or self._host_ids[block_hash] in self._moving:
            return None
        return self._host_ids.pop(block_hash)
