"""Memory becomes slots and blocks that add up and use it, and no request is promised what is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import CacheManager, LayerShape, StoreLayer, Visibility
from turboquant_server.attention_check import ModelAttention
from turboquant_server.cache_plan import CachePlan
from turboquant_server.cache_size import TIMELINE, CacheSize, divide_memory, format_bytes
from turboquant_server.config import ServerConfig
from turboquant_server.load_error import ModelLoadError

pytestmark = pytest.mark.usefixtures("no_variables")

MIB = 2**20
FULL = Visibility()
RECORD_BYTES = 4000
MODELS: dict[str, list[Visibility]] = {
    "full": [FULL] * 4,
    "window": [Visibility(window=1000)] * 4,
    "mixed": [Visibility(window=1000), FULL] * 2,
    "three kinds": [Visibility(window=64), Visibility(chunk=2048), FULL, FULL],
    "none": [],
}
NUM_KV_HEADS = 2
KEY_DIM, VALUE_DIM = 64, 32
EXACT_BYTES_PER_LAYER = (4 + 192) * NUM_KV_HEADS * (KEY_DIM + VALUE_DIM) * 2  # in 16 bits


def layers_of(kinds: list[Visibility], state_bytes: int = 0) -> tuple[ModelAttention, dict[int, StoreLayer]]:
    shape = LayerShape(NUM_KV_HEADS, KEY_DIM, VALUE_DIM)
    attention = ModelAttention(
        True, False, dict.fromkeys(range(len(kinds)), shape), dict(enumerate(kinds)), state_bytes
    )
    codec: Any = SimpleNamespace(record_bytes=RECORD_BYTES)
    layers = {
        index: StoreLayer(codec, NUM_KV_HEADS, KEY_DIM, VALUE_DIM, attention.group_of(index))
        for index in attention.shapes
    }
    return attention, layers


def divide(
    kinds: list[Visibility], num_bytes: int, max_model_len: int = 8192, state_bytes: int = 0, **options: int
) -> CacheSize:
    attention, layers = layers_of(kinds, state_bytes)
    config = ServerConfig(**options)
    return divide_memory(num_bytes, attention, layers, torch.float16, max_model_len, config)


def bytes_of(size: CacheSize, kinds: list[Visibility], state_bytes: int = 0) -> int:
    """Add up a cache layer by layer."""
    exact = size.num_slots * len(kinds) * EXACT_BYTES_PER_LAYER
    states = (size.num_slots + 1) * state_bytes  # one more for rows without a request
    blocks = [size.num_blocks[size.groups.index(kind)] for kind in kinds]
    return exact + states + sum(count * NUM_KV_HEADS * RECORD_BYTES for count in blocks)


def longest_request(size: CacheSize) -> int:
    return CacheManager(TIMELINE, size.groups, size.num_blocks, size.num_slots, False).max_tokens


def is_all_of_use(size: CacheSize, max_model_len: int, max_num_batched_tokens: int = 2048) -> bool:
    """Tell whether every slot has blocks for its longest request, one of them for the largest steps."""
    longest = TIMELINE.num_blocks(max_model_len, max_model_len)
    return all(
        count >= size.num_slots * min(longest, ((kind.reach or 10**9) + 512) // 64)
        and count >= min(longest, ((kind.reach or 10**9) + max_num_batched_tokens) // 64)
        for kind, count in zip(size.groups, size.num_blocks, strict=True)
    )


@pytest.mark.parametrize("kinds", MODELS.values(), ids=MODELS)
def test_the_memory_is_used_and_not_exceeded(kinds: list[Visibility]) -> None:
    @settings(deadline=None, max_examples=150)
    @given(
        st.integers(3 * MIB, 500 * MIB),
        st.sampled_from([300, 2048, 8192, 131_072]),
        st.none() | st.integers(1, 8),
        st.sampled_from([0, 10_000]),
    )
    def check(num_bytes: int, max_model_len: int, max_num_seqs: int | None, state_bytes: int) -> None:
        slots = {} if max_num_seqs is None else {"max_num_seqs": max_num_seqs}
        size = divide(kinds, num_bytes, max_model_len, state_bytes, **slots)
        assert size.num_bytes == bytes_of(size, kinds, state_bytes) <= num_bytes
        assert size.num_bytes > 0.95 * num_bytes or is_all_of_use(size, max_model_len)
        if max_num_seqs is not None:
            assert size.num_slots == max_num_seqs
        else:
            assert 1 <= size.num_slots <= 256
            assert size.num_slots == 1 or size.num_slots * (size.exact_bytes + state_bytes) <= num_bytes / 4

    check()


@pytest.mark.parametrize("kinds", MODELS.values(), ids=MODELS)
def test_the_requests_that_are_counted_run_at_once(kinds: list[Visibility]) -> None:
    @settings(deadline=None, max_examples=40)
    @given(st.integers(2, 40), st.integers(1, 6), st.integers(1, 5000))
    def check(num_mib: int, max_num_seqs: int, num_tokens: int) -> None:
        size = divide(kinds, num_mib * MIB, max_num_seqs=max_num_seqs)
        manager = CacheManager(TIMELINE, size.groups, size.num_blocks, size.num_slots, False)
        count = size.count_requests(num_tokens)
        caches = [manager.open([index] * num_tokens, num_tokens) for index in range(count)]
        start = 0
        while start < num_tokens:  # beside each other, chunk by chunk
            end = min(TIMELINE.chunk_end(start, num_tokens), num_tokens)
            assert all(cache is not None and cache.extend(start, end) for cache in caches)
            start = end
        if all(kind.reach is None for kind in kinds):
            assert manager.open([99] * num_tokens, num_tokens) is None

    check()


@pytest.mark.parametrize("name", ["mixed", "three kinds"])
def test_a_long_request_gets_the_blocks_that_windows_cannot_use(name: str) -> None:
    # 64 slots could use as many blocks of the windows as there is memory for.
    size = divide(MODELS[name], 64 * MIB, 131_072, max_num_seqs=64)
    kinds = MODELS[name]
    in_windows = sum((kind.reach + 62 + 2048) // 64 for kind in kinds if kind.reach is not None)
    left = 64 * MIB - 64 * len(kinds) * EXACT_BYTES_PER_LAYER
    of_full = (left - in_windows * NUM_KV_HEADS * RECORD_BYTES) // (2 * NUM_KV_HEADS * RECORD_BYTES)
    assert longest_request(size) >= min(131_072, 64 * of_full)


@pytest.mark.parametrize("step", [1024, 2048, 8192])
def test_a_window_has_room_for_a_step_of_one_request(step: int) -> None:
    size = divide([Visibility(window=8)], 64 * MIB, 131_072, max_num_seqs=1, max_num_batched_tokens=step)
    manager = CacheManager(TIMELINE, size.groups, size.num_blocks, 1, False)
    cache = manager.open([0] * 50_000, 50_000)
    for start in range(0, 50_000, step):
        assert cache is not None and cache.extend(start, min(start + step, 50_000))


def test_memory_for_less_than_the_slots_is_told() -> None:
    slot = 4 * EXACT_BYTES_PER_LAYER / 2**10
    with pytest.raises(ModelLoadError) as caught:
        divide(MODELS["full"], 1000)
    assert str(caught.value) == (
        "0.98 KiB are too few for a cache of even one request, whose first and newest tokens alone take "
        f"{slot:.2f} KiB; give more memory"
    )
    with pytest.raises(ModelLoadError) as caught:
        divide(MODELS["full"], MIB, max_num_seqs=1000)
    assert str(caught.value) == (
        "1.00 MiB are too few for a cache of 1,000 requests at a time, whose first and newest tokens alone "
        f"take {1000 * slot / 2**10:.2f} MiB; give more memory or a smaller --max-num-seqs"
    )


def test_bits_and_bfloat16_are_counted_by_the_numbers_that_are_stored() -> None:
    size = divide(MODELS["full"], 30 * MIB, 131_072, max_num_seqs=3)
    numbers_per_token = 4 * NUM_KV_HEADS * (KEY_DIM + VALUE_DIM)
    assert size.bits_per_value == 4 * NUM_KV_HEADS * RECORD_BYTES * 8 / (64 * numbers_per_token)
    assert size.num_tokens == 64 * size.num_blocks[0] + 3 * 196
    assert size.num_bf16_tokens == size.num_bytes // (2 * numbers_per_token)


@pytest.mark.parametrize(
    ("dims", "bits"),
    [((64, 32), 16.0), ((128, 128), 16.0), ((24, 16), 16 * (32 + 16) / (24 + 16)), ((8, 8), 32.0)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_without_codes_take_16_bits_and_heads_are_padded_to_16_numbers(
    dims: tuple[int, int], bits: float, dtype: torch.dtype
) -> None:
    attention = ModelAttention(True, False, {0: LayerShape(NUM_KV_HEADS, *dims)}, {0: FULL})
    layers = CachePlan(16, 16, exact_dtype=dtype).store_layers(attention)
    size = divide_memory(10 * MIB, attention, layers, dtype, 2048, ServerConfig(max_num_seqs=1))
    assert size.bits_per_value == bits
    assert size.block_bytes == (64 * NUM_KV_HEADS * sum(dims) * bits / 8,)
    # What no block holds is not padded.
    assert size.exact_bytes == 196 * NUM_KV_HEADS * sum(dims) * 2


def test_states_take_the_same_beside_bfloat16() -> None:
    size = divide(MODELS["full"], 30 * MIB, 131_072, state_bytes=MIB, max_num_seqs=3)
    of_slots_and_blocks = 2 * 4 * NUM_KV_HEADS * (KEY_DIM + VALUE_DIM) * size.num_tokens
    assert size.num_bf16_tokens == size.num_tokens * size.num_bytes // (of_slots_and_blocks + 4 * MIB)


def test_a_model_without_keys_has_slots_only() -> None:
    size = divide([], 10 * MIB, state_bytes=MIB // 2)
    assert (size.num_slots, size.num_blocks, size.num_bytes) == (5, (), 6 * MIB // 2)
    assert size.count_requests(10**9) == 5


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0.00 KiB"),
        (1536, "1.50 KiB"),
        (MIB, "1.00 MiB"),
        (1000 * MIB, "1000.00 MiB"),
        (2**40, "1024.00 GiB"),
    ],
)
def test_a_size_is_told_in_the_largest_unit(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
