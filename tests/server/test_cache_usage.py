"""What requests hold is counted block by block, whatever is shared, dropped or not written yet."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import CacheManager, Visibility
from turboquant_server.cache_size import TIMELINE, CacheSize
from turboquant_server.cache_usage import measure_usage
from turboquant_server.engine.request import Request
from turboquant_server.engine.sampling_params import SamplingParams

GROUPS = (Visibility(), Visibility(window=200), Visibility(chunk=256))
NUM_BLOCKS = (40, 24, 17)
SIZE = CacheSize(
    groups=GROUPS,
    num_slots=4,
    num_blocks=NUM_BLOCKS,
    exact_bytes=TIMELINE.num_exact * 48,
    state_bytes=1000,
    block_bytes=(640, 700, 90),
    bf16_block_bytes=(64 * 32, 64 * 16, 64 * 6),
)
# What a token takes in bfloat16 in each group of layers.
TOKEN_BYTES = (32, 16, 6)


def open_request(manager: CacheManager, prompt: list[int]) -> Request | None:
    request = Request("r", prompt, SamplingParams(max_tokens=1), cast(Any, None))
    request.cache = manager.open(prompt, len(prompt))
    if request.cache is None:
        return None
    request.num_computed_tokens = request.cache.num_hit_tokens
    return request


def compute(request: Request) -> bool:
    """Compute a chunk of the prompt or one token more; False if there are no blocks for it."""
    assert request.cache is not None
    start, num_prompt = request.num_computed_tokens, request.num_prompt_tokens
    end = TIMELINE.chunk_end(start, num_prompt) if start < num_prompt else start + 1
    if not request.cache.extend(start, end):
        return False
    request.num_computed_tokens = end
    request.cache.publish(end)
    return True


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_the_count_is_that_of_all_block_tables(data: st.DataObject) -> None:
    manager = CacheManager(TIMELINE, GROUPS, NUM_BLOCKS, num_slots=4, caches_prefixes=True)
    running: list[Request] = []
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["open", "compute", "compute", "compute", "fork", "release"]))
        if action == "open" and len(running) < 4:
            request = open_request(manager, [1] * data.draw(st.integers(1, 900)))
            running += [request] if request is not None else []
        elif running:
            request = data.draw(st.sampled_from(running))
            assert request.cache is not None
            if action == "compute":
                compute(request)
            elif action == "release":
                request.cache.release()
                running.remove(request)
            elif action == "fork" and request.num_computed_tokens >= request.num_prompt_tokens:
                fork = Request("f", request.token_ids, SamplingParams(max_tokens=1), cast(Any, None))
                fork.cache = request.cache.fork()
                fork.num_computed_tokens = request.num_computed_tokens
                running += [fork] if fork.cache is not None else []

    held_bytes = bf16_bytes = num_exact = 0
    shares, num_written = [], []
    for group, token_bytes in enumerate(TOKEN_BYTES):
        held: set[int] = set()
        written: set[int] = set()
        for request in running:
            assert request.cache is not None
            num_tokens = request.num_computed_tokens
            for index, block_id in enumerate(request.cache.block_tables[group]):
                if block_id is not None:
                    held.add(block_id)
                    if index < TIMELINE.num_blocks(num_tokens, request.num_prompt_tokens):
                        written.add(block_id)
        held_bytes += len(held) * SIZE.block_bytes[group]
        bf16_bytes += len(written) * 64 * token_bytes
        shares.append(len(held) / NUM_BLOCKS[group])
        num_written.append(len(written))
    for request in running:
        num_tokens = request.num_computed_tokens
        exact = num_tokens - 64 * TIMELINE.num_blocks(num_tokens, request.num_prompt_tokens)
        num_exact += exact
        bf16_bytes += exact * sum(TOKEN_BYTES)
    usage = measure_usage(SIZE, manager, running)
    assert usage.held_bytes == held_bytes + len(running) * SIZE.exact_bytes
    assert (usage.bf16_bytes, usage.num_exact_tokens) == (bf16_bytes, num_exact)
    assert usage.num_tokens == 64 * max(num_written) + num_exact
    assert usage.share == pytest.approx(max(shares))
    assert usage.bits_per_value == (16 * usage.held_bytes / bf16_bytes if bf16_bytes else None)


def test_a_cache_without_layers_holds_nothing() -> None:
    size = CacheSize((), 4, (), 0, 1000, (), ())
    manager = CacheManager(TIMELINE, (), (), num_slots=4, caches_prefixes=False)
    request = open_request(manager, [1] * 5)
    assert request is not None
    usage = measure_usage(size, manager, [request])
    assert (usage.held_bytes, usage.bf16_bytes, usage.share, usage.bits_per_value) == (0, 0, 0, None)
