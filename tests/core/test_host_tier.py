"""Blocks stay on the host until their room is needed; the least recently used go first."""

from __future__ import annotations

import pytest

from turboquant_core.block_manager import BlockManager
from turboquant_core.host_tier import HostTier, Moves

A, B, C, D = (bytes([letter]) for letter in b"abcd")


def kept(tier: HostTier, *hashes: bytes) -> None:
    """Keep blocks, and make the copies."""
    for block_id, block_hash in enumerate(hashes):
        tier.keep(block_id, block_hash)
        tier.take_moves()
    tier.check_integrity()


def test_what_is_evicted_on_the_device_is_kept_on_the_host() -> None:
    tier = HostTier(2)
    blocks = BlockManager(2, tier.keep)
    for block_id, block_hash in zip(blocks.allocate(2), (A, B), strict=True):
        blocks.publish(block_id, block_hash)
    blocks.release([0, 1])
    assert tier.take_moves() == Moves([], []) and A not in tier
    assert blocks.allocate(1) == [1]
    assert B in tier and A not in tier
    assert tier.take_moves() == Moves([(1, 0)], [])
    assert tier.take_moves() == Moves([], [])


def test_a_block_stays_on_the_host_when_it_is_fetched_and_need_not_be_copied_again() -> None:
    tier = HostTier(2)
    kept(tier, A)
    tier.hold([A])
    tier.fetch([A], [7])
    tier.check_integrity()
    assert tier.take_moves() == Moves([], [(7, 0)])
    tier.keep(7, A)
    assert tier.take_moves() == Moves([], [])
    assert (tier.num_held, tier.num_to_host, tier.num_to_device) == (1, 1, 1)


def test_the_least_recently_used_goes_first() -> None:
    tier = HostTier(2)
    kept(tier, A, B, A, C)
    assert (A in tier, B in tier, C in tier) == (True, False, True)
    tier.hold([A])
    tier.fetch([A], [5])
    tier.take_moves()
    kept(tier, D)
    assert (A in tier, C in tier, D in tier) == (True, False, True)


def test_of_what_was_fetched_together_the_last_goes_first() -> None:
    tier = HostTier(3)
    kept(tier, A, B, C)
    tier.hold([A, B, C])
    tier.fetch([A, B, C], [5, 6, 7])
    tier.take_moves()
    kept(tier, D)
    assert (A in tier, B in tier, C in tier) == (True, True, False)


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_what_finds_no_room_is_lost(num_blocks: int) -> None:
    tier = HostTier(num_blocks)
    for block_id, block_hash in enumerate((A, B)):
        tier.keep(block_id, block_hash)
    tier.check_integrity()
    assert (A in tier, B in tier) == (num_blocks == 1, False)
    assert tier.take_moves() == Moves([(0, 0)][:num_blocks], [])


def test_what_is_held_is_not_given_up_for_what_is_evicted_to_make_room_for_it() -> None:
    tier = HostTier(1)
    kept(tier, A)
    tier.hold([A])
    tier.keep(3, B)
    tier.fetch([A], [3])
    assert tier.take_moves() == Moves([], [(3, 0)])
    tier.keep(3, B)
    assert B in tier and A not in tier


def test_a_block_that_found_another_owner_before_the_copy_gets_the_newer_one() -> None:
    tier = HostTier(2)
    kept(tier, A, B)
    for block_hash in (A, B):
        tier.hold([block_hash])
        tier.fetch([block_hash], [5])
    assert tier.take_moves() == Moves([], [(5, 1)])


def test_what_does_not_add_up_is_told() -> None:
    tier = HostTier(2)
    tier.keep(0, A)
    tier._free.append(0)
    with pytest.raises(AssertionError, match=r"blocks on the host are \[0, 0, 1\]"):
        tier.check_integrity()
    tier._free.remove(0)
    tier._moving.clear()
    with pytest.raises(AssertionError, match="are copied and may be given up"):
        tier.check_integrity()
