"""The swap space on a GPU: memory is pinned and freed, every byte comes back, and answers stay the same."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from turboquant_core import BlockCodec, BlockQuantizer, HostStore, Moves, PagedStore, StoreLayer, Timeline
from turboquant_core.request_cache import Visibility
from turboquant_server.config import ServerConfig
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_manager import ModelManager
from turboquant_server.swap_space import measure_swap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

DEMO = Path(__file__).resolve().parents[2] / "turboquant_server" / "demo"
NUM_BLOCKS = 300


@pytest.fixture
def store() -> PagedStore:
    """Return a store of two stacks of layers whose bytes are all random."""
    layers = {}
    for index, bits in enumerate((4, 4, 3, 4)):
        codec = BlockCodec(*(BlockQuantizer(128, bits, scale="norm_corrected") for _ in range(2)))
        layers[index] = StoreLayer(codec, 8, 128, 128, group=0)
    store = PagedStore(
        layers,
        [Visibility()],
        Timeline(),
        num_blocks=[NUM_BLOCKS],
        num_slots=1,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    for records in store.records.values():
        records.random_(256)
    return store


def pinned_stacks(host: HostStore) -> list[torch.Tensor]:
    return [stack.host for stack in host._stacks]


def test_the_memory_is_pinned_while_the_store_lives_and_no_longer(store: PagedStore) -> None:
    host = HostStore(store, 100)
    tensors = pinned_stacks(host)
    assert len(tensors) == 2 and all(tensor.is_pinned() for tensor in tensors)
    del host
    gc.collect()
    assert not any(tensor.is_pinned() for tensor in tensors)


def test_blocks_come_back_in_stream_order_whatever_overwrites_them(store: PagedStore) -> None:
    before = {index: records.clone() for index, records in store.records.items()}
    host = HostStore(store, NUM_BLOCKS)
    shuffled = torch.randperm(NUM_BLOCKS).tolist()
    out = list(enumerate(shuffled))
    host.move([Moves(out, [])])
    for records in store.records.values():
        records.zero_()
    # Another order on the way back; nobody has waited for anything.
    back = torch.randperm(NUM_BLOCKS).tolist()
    host.move([Moves([], [(block_id, shuffled[block_id]) for block_id in back])])
    for index, records in store.records.items():
        assert torch.equal(records, before[index])


@pytest.fixture
def manager() -> Iterator[ModelManager]:
    """Serve the demo model with a cache for a few thousand tokens."""
    config = ServerConfig(
        dtype="bfloat16", kv_cache_memory="24MiB", swap_space="256MiB", max_num_seqs=2, max_model_len=4500
    )
    manager = ModelManager(config)
    manager.load()
    try:
        yield manager
    finally:
        manager.unload()


def answer(manager: ModelManager, prompt: list[int]) -> tuple[list[int], int]:
    """Return the tokens of an answer, and how many of the prompt were found."""

    async def collect() -> tuple[list[int], int]:
        tokens, found = [], 0
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        async for output in manager.engine.generate(prompt, params, f"{id(object())} {len(prompt)}"):
            tokens += output.token_ids
            found = output.num_cached_tokens
        return tokens, found

    return asyncio.run(collect())


def test_a_prompt_from_the_host_gets_the_tokens_of_one_that_never_left(manager: ModelManager) -> None:
    """What was computed in other steps has sums in another order, and may differ by a near tie."""
    print(manager.startup_report())
    text = manager.tokenizer.backend_tokenizer.encode((DEMO / "held_out.txt").read_text("utf-8")).ids
    prompts = [text[4000 * index : 4000 * index + 3000 + 300 * index] for index in range(5)]
    never_left = []
    for prompt in prompts:
        assert answer(manager, prompt)[1] == 0
        never_left.append(answer(manager, prompt))
    assert measure_swap(manager._cache_manager).num_hit_tokens == 0
    for prompt, expected in zip(prompts, never_left, strict=True):
        num_hits = measure_swap(manager._cache_manager).num_hit_tokens
        again = answer(manager, prompt)
        assert measure_swap(manager._cache_manager).num_hit_tokens > num_hits
        assert again == expected and again[1] > 2500
    manager.check_integrity()
