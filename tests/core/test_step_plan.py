"""A step's plan shows each new token just the tokens that it sees, each once."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_requests import plan_of

from turboquant_core.prefill_plan import plan_prefill
from turboquant_core.request_cache import CacheManager, RequestCache, Visibility
from turboquant_core.step_plan import (
    Chunk,
    DecodePlan,
    due_blocks,
    new_blocks,
    visible_blocks,
)
from turboquant_core.timeline import Timeline

visibilities = st.one_of(
    st.just(Visibility()),
    st.integers(1, 400).map(lambda n: Visibility(window=n)),
    st.integers(1, 400).map(lambda n: Visibility(chunk=n)),
)
timelines = st.builds(
    Timeline,
    num_sinks=st.sampled_from([0, 1, 4, 6]),
    residual_length=st.sampled_from([0, 64, 128]),
    segment_size=st.sampled_from([64, 128, 512]),
)
# Tokens of the prompt, and generated ones before the new one.
requests = st.tuples(st.integers(1, 700), st.one_of(st.integers(0, 300), st.sampled_from([60, 63, 64, 127])))


def open_at(manager: CacheManager, start: int, end: int, num_prompt_tokens: int) -> Chunk:
    """Open a request that computes the tokens ``start .. end - 1`` next, and holds only what these need."""
    cache = manager.open([0] * max(start, num_prompt_tokens), num_prompt_tokens)
    assert cache is not None
    assert cache.extend(0, start)
    assert cache.extend(start, end)
    return Chunk(cache, start, end, num_prompt_tokens)


def make_manager(timeline: Timeline, visibility: Visibility) -> CacheManager:
    return CacheManager(timeline, [visibility], [200], 8, caches_prefixes=False)


def seen_by(position: int, visibility: Visibility) -> list[int]:
    """Return the positions that a query sees."""
    window, chunk = visibility.window, visibility.chunk
    return [
        key
        for key in range(position + 1)
        if (window is None or key > position - window)
        and (chunk is None or key // chunk == position // chunk)
    ]


def held_in_slot(position: int, timeline: Timeline) -> dict[int, int]:
    """Write tokens one after another, the one at `position` last; return the position in each place."""
    sinks = {p: p for p in range(min(position + 1, timeline.num_sinks))}
    ring_size = timeline.residual_length + 64
    ring = {
        timeline.num_sinks + (p - timeline.num_sinks) % ring_size: p
        for p in range(timeline.num_sinks, position + 1)
    }
    return sinks | ring


def block_tokens(cache: RequestCache, block_id: int, timeline: Timeline) -> range:
    start = timeline.num_sinks + 64 * cache.block_tables[0].index(block_id)
    return range(start, start + 64)


def in_blocks(plan: DecodePlan, row: int, cache: RequestCache, timeline: Timeline) -> list[list[int]]:
    """Return the positions that a row of the batch sees in each block that it reads."""
    blocks = []
    for index in torch.nonzero(plan.owners == row)[:, 0].tolist():
        tokens = block_tokens(cache, int(plan.block_ids[index]), timeline)
        mask = [True] * 64 if plan.block_mask is None else plan.block_mask[index].tolist()
        blocks.append([p for p, is_seen in zip(tokens, mask, strict=True) if is_seen])
    return blocks


@given(batch=st.lists(requests, min_size=1, max_size=4), visibility=visibilities, timeline=timelines)
@settings(deadline=None, max_examples=600, derandomize=True)
def test_a_new_token_sees_each_visible_token_once(
    batch: list[tuple[int, int]], visibility: Visibility, timeline: Timeline
) -> None:
    manager = make_manager(timeline, visibility)
    chunks = [open_at(manager, prompt + more, prompt + more + 1, prompt) for prompt, more in batch]
    plan = plan_of(chunks, visibility, timeline)
    assert plan.owners.tolist() == sorted(plan.owners.tolist())
    for row, chunk in enumerate(chunks):
        position, held = chunk.start, held_in_slot(chunk.start, timeline)
        assert held[int(plan.exact_indices[row])] == position
        exact = [held[place] for place in torch.nonzero(plan.exact_mask[row])[:, 0].tolist()]
        blocks = in_blocks(plan, row, chunk.cache, timeline)
        assert sorted([*exact, *(p for block in blocks for p in block)]) == seen_by(position, visibility)
        assert all(blocks), "a block is read of which nothing is seen"
        num_read = max(0, position - timeline.num_sinks - timeline.residual_length) // 64
        first_exact = timeline.num_sinks + 64 * num_read
        assert all(timeline.num_sinks <= p < first_exact for block in blocks for p in block)


@given(batch=st.lists(requests, min_size=1, max_size=4), visibility=visibilities, timeline=timelines)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_a_block_is_made_when_its_tokens_are_the_oldest_in_the_slot(
    batch: list[tuple[int, int]], visibility: Visibility, timeline: Timeline
) -> None:
    manager = make_manager(timeline, visibility)
    chunks = []
    for row, (prompt, more) in enumerate(batch):
        to_block_end = -(prompt + more + 1 - timeline.num_sinks) % 64
        position = prompt + more + (to_block_end if row % 2 == 0 else 0)
        chunks.append(open_at(manager, position, position + 1, prompt))
    due = due_blocks(chunks, 0, timeline)
    rows = {chunk.cache.slot: row for row, chunk in enumerate(chunks)}
    made = {rows[slot]: (block_id, start) for slot, block_id, start in due}
    assert len(made) == len(due)
    for row, chunk in enumerate(chunks):
        past_sinks = chunk.end - timeline.num_sinks - timeline.residual_length
        in_prompt = timeline.num_blocks(chunk.num_prompt_tokens, chunk.num_prompt_tokens)
        is_due = past_sinks % 64 == 0 and past_sinks // 64 > in_prompt
        assert (row in made) == is_due
        if is_due:
            (block_id, start), held = made[row], held_in_slot(chunk.start, timeline)
            tokens = block_tokens(chunk.cache, block_id, timeline)
            assert [held[place] for place in range(start, start + 64)] == list(tokens)
            assert tokens.start == timeline.num_sinks + past_sinks - 64


@given(
    num_prompt_tokens=st.integers(1, 2000),
    where=st.floats(0, 1),
    visibility=visibilities,
    timeline=timelines,
)
@settings(deadline=None, max_examples=600, derandomize=True)
def test_a_chunk_reads_the_blocks_of_which_a_query_sees_a_token(
    num_prompt_tokens: int, where: float, visibility: Visibility, timeline: Timeline
) -> None:
    cuts = [0]
    while cuts[-1] < num_prompt_tokens + 200:
        cuts.append(timeline.chunk_end(cuts[-1], num_prompt_tokens))
    index = round(where * (len(cuts) - 2))
    start, end = cuts[index : index + 2]
    chunk = open_at(make_manager(timeline, visibility), start, end, num_prompt_tokens)
    seen = {key for p in (start, end - 1) for key in seen_by(p, visibility)}
    read = visible_blocks(chunk, 0, visibility, timeline)
    num_blocks = timeline.num_visible_blocks(start, num_prompt_tokens)
    first_seen = [
        p
        for p in range(timeline.num_sinks, timeline.num_sinks + 64 * num_blocks, 64)
        if seen & {*range(p, p + 64)}
    ]
    assert [block_tokens(chunk.cache, block_id, timeline).start for block_id in read.ids] == first_seen
    assert not read.ids or read.start == first_seen[0]

    first, made = new_blocks(chunk, 0, timeline)
    assert first == timeline.num_blocks(start, num_prompt_tokens)
    made_starts = [block_tokens(chunk.cache, block_id, timeline).start for block_id in made]
    last = timeline.num_blocks(end, num_prompt_tokens)
    assert made_starts == [timeline.num_sinks + 64 * i for i in range(first, last)]


@given(order=st.permutations(range(6)), count=st.integers(1, 6))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_rows_have_the_slots_of_their_requests(order: list[int], count: int) -> None:
    timeline = Timeline()
    manager = make_manager(timeline, Visibility())
    opened = [open_at(manager, 5, 6, 5) for _ in range(6)]
    chunks = [opened[index] for index in order[:count]]
    plan = plan_of(chunks, Visibility(), timeline)
    slots = [chunk.cache.slot for chunk in chunks]
    assert plan.slots.tolist() == slots
    assert torch.arange(8)[plan.slot_rows].tolist() == slots
    assert plan.block_mask is None
    assert plan.block_ids.numel() == 0


@given(timeline=timelines, num_more=st.integers(1, 700))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_a_slot_keeps_each_of_its_places_once_after_a_hit(timeline: Timeline, num_more: int) -> None:
    """The sinks are computed again then, in the same step as what comes after the hit."""
    start = timeline.num_sinks + timeline.segment_size
    num_tokens = start + max(timeline.residual_length, 1) + num_more
    chunks = [open_at(make_manager(timeline, Visibility()), start, num_tokens, num_tokens)]
    if timeline.num_sinks:
        chunks.insert(0, Chunk(chunks[0].cache, 0, timeline.num_sinks, num_tokens))
    plan = plan_prefill(chunks, 0, Visibility(), timeline, torch.device("cpu"))
    places = plan.kept_places.tolist()
    assert len(places) == len(set(places))
    rows = dict(zip(places, plan.kept_rows.tolist(), strict=True))
    first = max(start, num_tokens - timeline.ring_size)
    positions = [*range(timeline.num_sinks), *range(first, num_tokens)]
    offset = start - timeline.num_sinks
    for position in positions:
        row = position if position < timeline.num_sinks else position - offset
        assert rows[timeline.exact_index(position)] == row
