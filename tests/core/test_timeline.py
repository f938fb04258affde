"""What a query sees compressed depends on positions alone, and everything else is still uncompressed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core.timeline import Timeline

timelines = st.builds(
    Timeline,
    num_sinks=st.integers(0, 70),
    residual_length=st.integers(0, 5).map(lambda n: 64 * n),
    segment_size=st.integers(1, 9).map(lambda n: 64 * n),
)
lengths = st.integers(1, 1500)
many = settings(deadline=None, max_examples=60, derandomize=True)


def block_end(timeline: Timeline, index: int) -> int:
    """Return the position after a block's last token."""
    return timeline.num_sinks + 64 * (index + 1)


def prompt_cuts(timeline: Timeline, num_tokens: int, num_prompt_tokens: int) -> list[int]:
    """Return the positions up to `num_tokens` at which a prompt is cut; the last chunk is no shorter than
    the residual.
    """
    first = timeline.num_sinks + timeline.segment_size
    last = num_prompt_tokens - max(1, timeline.residual_length)
    return list(range(first, min(num_tokens, last) + 1, timeline.segment_size))


def visible_blocks(timeline: Timeline, position: int, num_prompt_tokens: int) -> int:
    """Count blocks one by one: before the prompt's last cut, or with the residual after them."""
    if position < num_prompt_tokens:
        limit = max(prompt_cuts(timeline, position, num_prompt_tokens), default=0)
    else:
        limit = position - timeline.residual_length
    return sum(block_end(timeline, i) <= limit for i in range(100))


def chunks(timeline: Timeline, start: int, num_tokens: int, num_prompt_tokens: int) -> list[tuple[int, int]]:
    """Cut as late as possible."""
    result = []
    while start < num_tokens:
        end = min(timeline.chunk_end(start, num_prompt_tokens), num_tokens)
        result.append((start, end))
        start = end
    return result


def test_the_default_timeline_by_example() -> None:
    timeline = Timeline()
    assert chunks(timeline, 0, 1000, 900) == [(0, 516), (516, 900), (900, 964), (964, 1000)]
    assert [timeline.num_visible_blocks(p, 900) for p in (0, 515, 516, 899, 900, 963, 964)] == [
        *(0, 0, 8, 8),
        *(12, 12, 13),  # 900 - 4 - 128 = 12 * 64
    ]
    assert [timeline.num_blocks(n, 900) for n in (515, 516, 899, 900, 963, 964)] == [8 - 3, 8, 11, 12, 12, 13]
    assert [timeline.num_reusable_blocks(n) for n in (516, 643, 644, 1155, 1156)] == [0, 0, 8, 8, 16]
    assert timeline.ring_size == 192


@given(timeline=timelines, num_prompt_tokens=lengths, position=st.integers(0, 2000))
@many
def test_visible_blocks_are_those_before_the_last_cut_or_before_the_residual(
    timeline: Timeline, num_prompt_tokens: int, position: int
) -> None:
    expected = visible_blocks(timeline, position, num_prompt_tokens)
    assert timeline.num_visible_blocks(position, num_prompt_tokens) == expected


@given(timeline=timelines, num_prompt_tokens=lengths, position=st.integers(0, 2000))
@many
def test_a_chunk_ends_at_the_next_cut(timeline: Timeline, num_prompt_tokens: int, position: int) -> None:
    if position < num_prompt_tokens:
        is_cut = {
            num_prompt_tokens,
            *prompt_cuts(timeline, num_prompt_tokens, num_prompt_tokens),
        }.__contains__
    else:
        aligned = timeline.num_sinks % 64

        def is_cut(end: int) -> bool:
            return end % 64 == aligned

    expected = next(end for end in range(position + 1, position + 2000) if is_cut(end))
    assert timeline.chunk_end(position, num_prompt_tokens) == expected


@given(timeline=timelines, num_prompt_tokens=lengths, position=st.integers(0, 2000))
@many
def test_all_tokens_of_a_chunk_see_the_same_blocks(
    timeline: Timeline, num_prompt_tokens: int, position: int
) -> None:
    end = timeline.chunk_end(position, num_prompt_tokens)
    seen = {timeline.num_visible_blocks(p, num_prompt_tokens) for p in range(position, end)}
    assert len(seen) == 1


@given(timeline=timelines, num_prompt_tokens=lengths, longer=st.integers(1, 1500))
@many
def test_up_to_its_last_chunk_a_prompt_is_cut_as_a_longer_one_is(
    timeline: Timeline, num_prompt_tokens: int, longer: int
) -> None:
    total = num_prompt_tokens + longer
    last_cut = max(prompt_cuts(timeline, num_prompt_tokens, num_prompt_tokens), default=0)
    for position in range(0, last_cut, 13):
        assert timeline.num_visible_blocks(position, num_prompt_tokens) == timeline.num_visible_blocks(
            position, total
        )
        assert timeline.chunk_end(position, num_prompt_tokens) == timeline.chunk_end(position, total)


@given(timeline=timelines, num_prompt_tokens=lengths, num_generated=st.integers(0, 500))
@many
def test_a_generated_token_sees_the_residual_and_at_most_63_tokens_more(
    timeline: Timeline, num_prompt_tokens: int, num_generated: int
) -> None:
    position = num_prompt_tokens + num_generated
    num_after_sinks = max(0, position - timeline.num_sinks)
    num_exact = num_after_sinks - 64 * timeline.num_visible_blocks(position, num_prompt_tokens)
    at_least = min(timeline.residual_length, num_after_sinks)
    assert at_least <= num_exact <= timeline.residual_length + 63


@given(timeline=timelines, num_prompt_tokens=lengths, num_generated=st.integers(0, 400), data=st.data())
@many
def test_blocks_exist_when_they_are_read_and_all_other_tokens_when_they_are_needed(
    timeline: Timeline, num_prompt_tokens: int, num_generated: int, data: st.DataObject
) -> None:
    """Run a request with a slot that remembers positions, from any prefix that may have been cached."""
    total = num_prompt_tokens + num_generated
    step = timeline.segment_size // 64
    num_hit = step * data.draw(st.integers(0, timeline.num_reusable_blocks(num_prompt_tokens) // step))
    start = timeline.num_sinks + 64 * num_hit if num_hit else 0
    slot: dict[int, int] = {timeline.exact_index(p): p for p in range(min(start, timeline.num_sinks))}
    num_made = num_hit
    while start < total:
        end = min(timeline.chunk_end(start, num_prompt_tokens), total)
        if start >= num_prompt_tokens:
            end = data.draw(st.integers(start + 1, end))

        num_visible = timeline.num_visible_blocks(start, num_prompt_tokens)
        assert num_visible <= num_made
        exact = [*range(timeline.num_sinks), *range(timeline.num_sinks + 64 * num_visible, start)]
        assert all(slot[timeline.exact_index(p)] == p for p in exact if p < start)

        slot |= {timeline.exact_index(p): p for p in range(start, end)}
        assert all(0 <= index < timeline.num_exact for index in slot)
        due = timeline.num_blocks(end, num_prompt_tokens)
        for p in range(timeline.num_sinks + 64 * num_made, timeline.num_sinks + 64 * due):
            assert p < end
            assert p >= start or slot[timeline.exact_index(p)] == p
        assert due - num_made in ((0, 1) if start >= num_prompt_tokens else range(100))
        num_made = due
        start = end
    assert num_made == timeline.num_blocks(total, num_prompt_tokens)


@given(timeline=timelines, num_tokens=lengths, num_prompt_tokens=lengths)
@many
def test_blocks_are_made_at_the_prompt_cuts_and_behind_the_residual(
    timeline: Timeline, num_tokens: int, num_prompt_tokens: int
) -> None:
    cuts = prompt_cuts(timeline, num_tokens, num_prompt_tokens)
    limit = max(cuts[-1] if cuts else 0, num_tokens - timeline.residual_length)
    expected = sum(block_end(timeline, i) <= limit for i in range(100))
    assert timeline.num_blocks(num_tokens, num_prompt_tokens) == expected


@given(timeline=timelines, num_prompt_tokens=lengths)
@many
def test_reusable_blocks_end_at_the_last_cut_that_leaves_the_residual(
    timeline: Timeline, num_prompt_tokens: int
) -> None:
    num_left = max(1, timeline.residual_length)
    cuts = prompt_cuts(timeline, num_prompt_tokens, num_prompt_tokens)
    assert all(cut + num_left <= num_prompt_tokens for cut in cuts)
    end = timeline.num_sinks + 64 * timeline.num_reusable_blocks(num_prompt_tokens)
    assert end == (cuts[-1] if cuts else timeline.num_sinks)


@pytest.mark.parametrize(
    ("name", "length"),
    [("residual_length", 100), ("residual_length", -64), ("segment_size", 65), ("segment_size", -64)],
)
def test_lengths_are_multiples_of_the_block_size(name: str, length: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a multiple of 64, got {length}"):
        Timeline(**{name: length})


def test_a_prompt_is_cut_somewhere() -> None:
    with pytest.raises(ValueError, match="must be a multiple of 64"):
        Timeline(segment_size=0)
