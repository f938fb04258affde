"""Tables that are kept from step to step are those of the newest step, whoever came, went or took a slot."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core.decode_buffers import DecodeBuffers
from turboquant_core.request_cache import CacheManager, RequestCache, Visibility
from turboquant_core.step_plan import Chunk, DecodePlan, visible_blocks
from turboquant_core.timeline import Timeline

CPU = torch.device("cpu")
VISIBILITIES = [Visibility(), Visibility(window=90), Visibility(chunk=192)]
NUM_SLOTS = 5


def check(plan: DecodePlan, chunks: list[Chunk], group: int, num_rows: int, timeline: Timeline) -> None:
    """Compare tables with what each request's own cache says, and free rows with nothing."""
    tables, visibility = plan.tables, VISIBILITIES[group]
    free = [0] * (num_rows - len(chunks))
    ranges = [visible_blocks(chunk, group, visibility, timeline) for chunk in chunks]
    counts = [len(blocks.ids) for blocks in ranges]
    visible = [timeline.num_visible_blocks(chunk.start, chunk.num_prompt_tokens) for chunk in chunks]
    before = [*range(len(chunks) + 1)], [0, *itertools.accumulate(counts)]
    assert tables.slots.tolist() == [chunk.cache.slot for chunk in chunks] + [-1] * len(free)
    assert tables.positions.tolist() == [chunk.start for chunk in chunks] + free
    assert tables.exact_starts.tolist() == [timeline.num_sinks + 64 * count for count in visible] + free
    assert tables.first_visible.tolist() == [visibility.first_visible(c.start) for c in chunks] + free
    assert tables.block_starts.tolist() == [blocks.start for blocks in ranges] + free
    assert tables.num_blocks.tolist() == counts + free
    assert tables.counts_before.tolist() == [numbers + numbers[-1:] * len(free) for numbers in before]
    for row, blocks in enumerate(ranges):
        assert tables.block_tables[row, : len(blocks.ids)].tolist() == blocks.ids


@given(seed=st.integers(0, 2**32), has_free_rows=st.booleans(), num_sinks=st.sampled_from([0, 4]))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_tables_are_those_of_the_newest_step(seed: int, has_free_rows: bool, num_sinks: int) -> None:
    draw = random.Random(seed)
    timeline = Timeline(num_sinks=num_sinks, residual_length=64, segment_size=64)
    manager = CacheManager(timeline, VISIBILITIES, [60] * 3, NUM_SLOTS, caches_prefixes=False)
    buffers = DecodeBuffers(VISIBILITIES, timeline, NUM_SLOTS, CPU, num_extra=2)
    if has_free_rows:
        buffers.reserve(8, 40)
        kept = {size: buffers.plans(size, has_free_rows=True) for size in range(1, 9)}
    lengths: dict[RequestCache, tuple[int, int]] = {}
    for _ in range(40):
        while len(lengths) < NUM_SLOTS and draw.random() < 0.5:
            prompt, end = sorted(draw.choices(range(1, 300), k=2))
            cache = manager.open([0] * end, prompt)
            assert cache is not None and cache.extend(0, end)
            lengths[cache] = prompt, end
        chunks = []
        for cache in draw.sample(list(lengths), draw.randint(0, len(lengths))):
            prompt, start = lengths[cache]
            assert cache.extend(start, start + 1)
            chunks.append(Chunk(cache, start, start + 1, prompt))
            lengths[cache] = prompt, start + draw.choice([0, 1, 1, 1])  # a step may be tried again
        if not chunks:
            continue
        num_rows = draw.randint(len(chunks), 8) if has_free_rows else len(chunks)
        numbers = [[draw.randrange(1000) for _ in chunks] for _ in range(2)]
        buffers.fill(chunks, num_rows, numbers)
        plans = kept[num_rows] if has_free_rows else buffers.plans(num_rows)
        for group, plan in enumerate(plans):
            check(plan, chunks, group, num_rows, timeline)
        free = [0] * (num_rows - len(chunks))
        assert buffers.extra(num_rows).tolist() == [row + free for row in numbers]
        for cache in [cache for cache in lengths if draw.random() < 0.1]:
            cache.release()
            del lengths[cache]


def test_tables_of_a_step_that_was_not_finished_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline(residual_length=64, segment_size=64)
    manager = CacheManager(timeline, VISIBILITIES, [60] * 3, NUM_SLOTS, caches_prefixes=False)
    buffers = DecodeBuffers(VISIBILITIES, timeline, NUM_SLOTS, CPU)
    for seed in range(
        2
    ):  # the second request takes the first one's slot, with other blocks at the same place
        cache = manager.open([0] * 400, 400)
        assert cache is not None and cache.extend(0, 400) and cache.extend(400, 401)
        chunk = Chunk(cache, 400, 401, 400)
        with monkeypatch.context() as patch:
            if seed:
                patch.setattr(np, "take", _raise)
                with pytest.raises(MemoryError):
                    buffers.fill([chunk])
        buffers.fill([chunk])
        for group, plan in enumerate(buffers.plans(1)):
            check(plan, [chunk], group, 1, timeline)
        taken = [manager._groups[group].blocks.allocate(1) for group in range(3)]
        assert all(taken)
        cache.release()


def _raise(*args: object, **options: object) -> None:
    raise MemoryError


def test_rows_without_a_request_have_no_work() -> None:
    timeline = Timeline()
    buffers = DecodeBuffers([Visibility()], timeline, 2, CPU)
    buffers.fill([], 2)
    [plan] = buffers.plans(2, has_free_rows=True)
    assert (plan.tables.slots.tolist(), plan.tables.counts_before.tolist()) == ([-1, -1], [[0] * 3] * 2)
