"""Every block is owned, cached or free, and cached blocks go in the order in which they are least missed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from turboquant_core.block_manager import BlockManager, OutOfBlocksError


def publish_all(manager: BlockManager, block_ids: list[int], name: bytes = b"") -> None:
    for i, block_id in enumerate(block_ids):
        manager.publish(block_id, name + bytes([i]))


def test_an_empty_manager_hands_out_all_its_blocks_once() -> None:
    manager = BlockManager(5)
    assert sorted(manager.allocate(2) + manager.allocate(3)) == [0, 1, 2, 3, 4]
    assert manager.num_free == 0
    assert manager.allocate(0) == []


def test_asking_for_too_many_changes_nothing() -> None:
    manager = BlockManager(3)
    owned = manager.allocate(1)
    with pytest.raises(OutOfBlocksError, match="3 blocks are needed, 2 are free"):
        manager.allocate(3)
    manager.check_integrity([owned])
    assert manager.num_free == 2


def test_a_block_without_a_hash_is_free_again_when_released() -> None:
    manager = BlockManager(2)
    [block_id] = manager.allocate(1)
    manager.release([block_id])
    assert (manager.num_free, manager.num_cached) == (2, 0)
    manager.check_integrity([])


def test_a_published_block_is_found_until_its_room_is_needed() -> None:
    manager = BlockManager(2)
    [block_id] = manager.allocate(1)
    manager.publish(block_id, b"a")
    manager.release([block_id])
    assert (manager.find(b"a"), manager.find(b"b")) == (block_id, None)
    assert (manager.num_free, manager.num_cached) == (2, 1)
    assert manager.allocate(1) != [block_id]  # the free one goes first
    assert manager.find(b"a") == block_id
    assert manager.allocate(1) == [block_id]
    assert (manager.find(b"a"), manager.num_cached) == (None, 0)


def test_the_last_blocks_of_a_chain_are_evicted_first() -> None:
    manager = BlockManager(4)
    chain = manager.allocate(4)
    publish_all(manager, chain)
    manager.release(chain)
    assert manager.allocate(4) == chain[::-1]


def test_the_chain_that_was_released_longest_ago_is_evicted_first() -> None:
    manager = BlockManager(6)
    chains = [manager.allocate(3) for _ in range(2)]
    for name, chain in zip((b"a", b"b"), chains, strict=True):
        publish_all(manager, chain, name)
    manager.release(chains[1])
    manager.release(chains[0])
    assert manager.allocate(6) == chains[1][::-1] + chains[0][::-1]


def test_a_shared_prefix_outlives_both_of_its_continuations() -> None:
    manager = BlockManager(6)
    prefix, left, right = (manager.allocate(2) for _ in range(3))
    publish_all(manager, prefix + left, b"left")
    publish_all(manager, right, b"right")
    manager.share(prefix)
    manager.release(prefix + left)
    assert manager.num_free == 2
    manager.release(prefix + right)
    assert manager.allocate(6) == left[::-1] + right[::-1] + prefix[::-1]


def test_sharing_takes_a_cached_block_out_of_what_can_be_evicted() -> None:
    manager = BlockManager(2)
    chain = manager.allocate(2)
    publish_all(manager, chain)
    manager.release(chain)
    manager.share(chain[:1])
    assert manager.is_owned(chain[0]) and not manager.is_owned(chain[1])
    assert manager.num_free == 1
    assert manager.allocate(1) == chain[1:]
    manager.release(chain[:1])
    assert manager.find(b"\0") == chain[0]


def test_a_block_stays_until_its_last_owner_releases_it() -> None:
    manager = BlockManager(1)
    owned = manager.allocate(1)
    manager.share(owned)
    manager.release(owned)
    manager.check_integrity([owned])
    assert manager.num_free == 0
    manager.release(owned)
    assert manager.num_free == 1


def test_of_two_blocks_with_the_same_hash_the_older_is_kept() -> None:
    manager = BlockManager(2)
    older, newer = manager.allocate(2)
    for block_id in (older, older, newer):
        manager.publish(block_id, b"a")
    assert manager.find(b"a") == older
    manager.release([newer])
    assert (manager.num_free, manager.num_cached) == (1, 1)
    assert manager.allocate(1) == [newer]
    manager.check_integrity([[older], [newer]])


def test_what_nobody_owns_can_neither_be_released_nor_shared_nor_published() -> None:
    manager = BlockManager(1)
    with pytest.raises(AssertionError, match="block 0 has no owner"):
        manager.release([0])
    with pytest.raises(AssertionError, match="block 0 is free"):
        manager.share([0])
    with pytest.raises(AssertionError, match="block 0 has no owner"):
        manager.publish(0, b"a")
    owned = manager.allocate(1)
    manager.publish(0, b"a")
    with pytest.raises(AssertionError, match="block 0 has a hash already"):
        manager.publish(0, b"b")
    manager.release(owned)
    with pytest.raises(AssertionError, match="block 0 has no owner"):
        manager.release(owned)
    manager.check_integrity([])


def one_owned_and_one_cached() -> BlockManager:
    """Return a manager of 4 blocks: 0 is owned, 1 cached, 2 and 3 are free."""
    manager = BlockManager(4)
    chain = manager.allocate(2)
    publish_all(manager, chain)
    manager.release(chain[1:])
    return manager


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda manager: manager._num_owners.__setitem__(0, 2), "block 0 counts 2 owners and has 1"),
        (lambda manager: manager._free.pop(), "block 2 is in 0 of the states"),
        (lambda manager: manager._free.append(3), "block 3 is in 2 of the states"),
        (lambda manager: manager._free.append(0), "block 0 is in 2 of the states"),
        (lambda manager: manager._free.append(7), "blocks that are owned, cached and free are not as many"),
        (lambda manager: manager._unowned.update({0: None}), "block 0 is in 2 of the states"),
        (
            lambda manager: manager._free.append(manager._unowned.popitem()[0]),
            "block 1 is free and has a hash",
        ),
        (lambda manager: manager._hashes.pop(1), "block 1 is cached and has no hash"),
        (lambda manager: manager._block_ids.clear(), "the hashes of blocks and the blocks of hashes differ"),
    ],
)
def test_the_check_says_what_is_wrong(damage: Callable[[BlockManager], object], sentence: str) -> None:
    manager = one_owned_and_one_cached()
    damage(manager)
    with pytest.raises(AssertionError, match=sentence):
        manager.check_integrity([[0]])


@pytest.mark.parametrize(
    ("owners", "sentence"),
    [
        ([], "block 0 counts 1 owners and has 0"),
        ([[0], [0]], "block 0 counts 1 owners and has 2"),
        ([[0, 0]], r"an owner holds blocks \[0\] more than once"),
        ([[0], [9]], r"blocks \[9\] are owned and do not exist"),
    ],
)
def test_the_check_compares_with_the_owners(owners: list[list[int]], sentence: str) -> None:
    manager = one_owned_and_one_cached()
    manager.check_integrity([[0]])
    with pytest.raises(AssertionError, match=sentence):
        manager.check_integrity(owners)


class BlockManagerMachine(RuleBasedStateMachine):
    """Compare with lists that are searched from end to end."""

    NUM_BLOCKS = 7

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(self.NUM_BLOCKS)
        self.chains: list[list[int]] = []  # one per owner
        self.released: list[int] = []  # cached and owned by none, longest ago first
        self.hashes: dict[int, bytes] = {}

    def owned(self) -> set[int]:
        return {block_id for chain in self.chains for block_id in chain}

    @rule(count=st.integers(0, NUM_BLOCKS))
    def allocate(self, count: int) -> None:
        plain = set(range(self.NUM_BLOCKS)) - self.owned() - set(self.released)
        if count > len(plain) + len(self.released):
            with pytest.raises(OutOfBlocksError):
                self.manager.allocate(count)
            return
        block_ids = self.manager.allocate(count)
        num_evicted = max(0, count - len(plain))
        assert block_ids[count - num_evicted :] == self.released[:num_evicted]
        assert set(block_ids[: count - num_evicted]) <= plain
        del self.released[:num_evicted]
        for block_id in block_ids:
            self.hashes.pop(block_id, None)
        self.chains.append(block_ids)

    @precondition(lambda self: self.hashes)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block_ids = data.draw(st.lists(st.sampled_from(sorted(self.hashes)), unique=True))
        self.manager.share(block_ids)
        self.released = [block_id for block_id in self.released if block_id not in block_ids]
        self.chains.append(block_ids)

    @precondition(lambda self: self.chains)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chain = self.chains.pop(data.draw(st.integers(0, len(self.chains) - 1)))
        self.manager.release(chain)
        self.released += [b for b in chain[::-1] if b in self.hashes and b not in self.owned()]

    @precondition(lambda self: self.owned() - self.hashes.keys())
    @rule(data=st.data(), name=st.integers(0, 9))
    def publish(self, data: st.DataObject, name: int) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.owned() - self.hashes.keys())))
        self.manager.publish(block_id, bytes([name]))
        if bytes([name]) not in self.hashes.values():
            self.hashes[block_id] = bytes([name])

    @invariant()
    def agree(self) -> None:
        self.manager.check_integrity(self.chains)
        assert self.manager.num_free == self.NUM_BLOCKS - len(self.owned())
        assert self.manager.num_cached == len(self.hashes)
        found = {bytes([name]): self.manager.find(bytes([name])) for name in range(10)}
        assert {b: name for name, b in found.items() if b is not None} == self.hashes


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=60, stateful_step_count=50, deadline=None, derandomize=True)
