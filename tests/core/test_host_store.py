"""Blocks come back from the host with every byte of every layer, however many move at a time."""

from __future__ import annotations

import random

import pytest
import torch
from paged_requests import CPU, FULL, SMALL, Layer, Shape, make_codec

from turboquant_core import host_store
from turboquant_core.host_store import HostStore
from turboquant_core.host_tier import Moves
from turboquant_core.paged_store import PagedStore, StoreLayer
from turboquant_core.reference import AttentionOptions
from turboquant_core.request_cache import Visibility

SHAPE = Shape(2, 2, 32, 16)
WINDOW = Visibility(window=70)
LAYERS = [
    Layer(make_codec(bits, SHAPE), visibility, AttentionOptions(0.2))
    for bits, visibility in (((4, 4), FULL), ((8, 4), FULL), ((4, 4), FULL), (None, FULL), ((4, 4), WINDOW))
]
NUM_BLOCKS = (12, 9)
NUM_HOST_BLOCKS = 5


@pytest.fixture
def store() -> PagedStore:
    """Return a store of two groups whose bytes are all random."""
    layers = {
        index: StoreLayer(
            layer.codec, SHAPE.num_kv_heads, SHAPE.key_dim, SHAPE.value_dim, int(layer.visibility == WINDOW)
        )
        for index, layer in enumerate(LAYERS)
    }
    store = PagedStore(
        layers,
        [FULL, WINDOW],
        SMALL,
        num_blocks=NUM_BLOCKS,
        num_slots=1,
        dtype=torch.float32,
        device=CPU,
    )
    for index, records in store.records.items():
        records.random_(256, generator=torch.Generator().manual_seed(index))
    return store


def bytes_of(store: PagedStore, group: int, block_id: int) -> list[bytes]:
    """Return what a block is in each layer of its group."""
    return [
        records[block_id].numpy().tobytes()
        for index, records in store.records.items()
        if store.layers[index].group == group
    ]


# Room for many blocks, for a few, and for one.
@pytest.mark.parametrize("piece_bytes", [2**20, 60_000, 8])
def test_blocks_move_out_and_back_in_any_order(
    store: PagedStore, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(host_store, "PIECE_BYTES", piece_bytes)
    host = HostStore(store, NUM_HOST_BLOCKS)
    choose = random.Random(0)
    device = [[bytes_of(store, group, i) for i in range(NUM_BLOCKS[group])] for group in range(2)]
    memory: list[dict[int, list[bytes]]] = [{}, {}]
    for _ in range(40):
        moves = []
        for group in range(2):
            ids = range(NUM_BLOCKS[group])
            host_ids = choose.sample(range(NUM_HOST_BLOCKS), choose.randint(0, NUM_HOST_BLOCKS))
            to_host = list(zip(choose.sample(ids, len(host_ids)), host_ids, strict=True))
            memory[group] |= {host_id: device[group][block_id] for block_id, host_id in to_host}
            # One block on the host may go to several on the device.
            targets = choose.sample(ids, choose.randint(0, 7) if memory[group] else 0)
            to_device = [(block_id, choose.choice(sorted(memory[group]))) for block_id in targets]
            for block_id, host_id in to_device:
                device[group][block_id] = memory[group][host_id]
            moves.append(Moves(to_host, to_device))
        host.move(moves)
        for group in range(2):
            found = [bytes_of(store, group, block_id) for block_id in range(NUM_BLOCKS[group])]
            assert found == device[group]


def test_memory_is_taken_without_a_byte_that_no_block_needs(store: PagedStore) -> None:
    a_block = sum(layer.codec.record_bytes * SHAPE.num_kv_heads for layer in LAYERS)
    host = HostStore(store, NUM_HOST_BLOCKS)
    assert sum(stack.host.nbytes for stack in host._stacks) == NUM_HOST_BLOCKS * a_block
    assert host._piece.nbytes == HostStore.device_bytes(store.layers) == host_store.PIECE_BYTES
