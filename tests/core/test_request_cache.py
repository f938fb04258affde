"""Requests get the blocks that their tokens need, find those of earlier prompts, and give all back.

More than 300 lines: a request has a whole life, in groups of three kinds.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import request_cache
from turboquant_core.block_hashes import chain_hashes
from turboquant_core.request_cache import CacheManager, RequestCache, Visibility
from turboquant_core.timeline import Timeline

FULL = Visibility()
TIMELINE = Timeline(num_sinks=4, residual_length=64, segment_size=128)
PROMPT = list(range(4 + 7 * 64))  # cuts after 2, 4 and 6 blocks; the last one leaves 64 tokens

visibilities = st.one_of(
    st.just(FULL),
    st.integers(1, 400).map(lambda n: Visibility(window=n)),
    st.integers(1, 400).map(lambda n: Visibility(chunk=n)),
    st.builds(Visibility, window=st.integers(1, 400), chunk=st.integers(1, 400)),
)
timelines = st.builds(
    Timeline,
    num_sinks=st.integers(0, 6),
    residual_length=st.sampled_from([0, 64, 128, 256]),
    segment_size=st.sampled_from([64, 128, 512]),
)


def make_manager(
    *groups: tuple[Visibility, int],
    num_slots: int = 4,
    caches_prefixes: bool = True,
    timeline: Timeline = TIMELINE,
) -> CacheManager:
    return CacheManager(
        timeline, [group[0] for group in groups], [group[1] for group in groups], num_slots, caches_prefixes
    )


def opened(
    manager: CacheManager, token_ids: list[int], num_prompt_tokens: int | None = None, salt: bytes = b""
) -> RequestCache:
    cache = manager.open(token_ids, len(token_ids) if num_prompt_tokens is None else num_prompt_tokens, salt)
    assert cache is not None
    return cache


def compute(manager: CacheManager, cache: RequestCache, num_prompt_tokens: int, num_tokens: int) -> bool:
    """Run the steps of a request, one chunk each, and publish its prompt; False when blocks run out."""
    start = cache.num_hit_tokens
    while start < num_tokens:
        end = min(manager.timeline.chunk_end(start, num_prompt_tokens), num_tokens)
        if not cache.extend(start, end):
            return False
        cache.publish(end)
        start = end
    manager.check_integrity()
    return True


def served(manager: CacheManager, token_ids: list[int]) -> list[list[int | None]]:
    """Compute a prompt, release it, and return the blocks that it had at the end."""
    cache = opened(manager, token_ids)
    assert compute(manager, cache, len(token_ids), len(token_ids))
    tables = [list(table) for table in cache.block_tables]
    cache.release()
    return tables


@given(visibility=visibilities, position=st.integers(0, 1500))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_the_first_visible_position_is_the_first_of_those_that_a_query_sees(
    visibility: Visibility, position: int
) -> None:
    def sees(key: int) -> bool:
        in_window = visibility.window is None or key > position - visibility.window
        return in_window and (
            visibility.chunk is None or key // visibility.chunk == position // visibility.chunk
        )

    visible = [key for key in range(position + 1) if sees(key)]
    assert visible == list(range(visibility.first_visible(position), position + 1))
    assert visibility.reach is None or len(visible) <= visibility.reach


def test_a_request_gets_the_blocks_of_its_tokens_at_once_and_later_ones_step_by_step() -> None:
    manager = make_manager((FULL, 9))
    cache = opened(manager, PROMPT)
    assert cache.block_tables == [[0, 1, 2, 3, 4, 5]]
    assert compute(manager, cache, len(PROMPT), len(PROMPT))
    assert manager.num_free_blocks == [3]
    assert cache.extend(len(PROMPT) + 63, len(PROMPT) + 64)
    assert cache.block_tables == [[0, 1, 2, 3, 4, 5, 6]]


def test_nothing_opens_without_a_slot_or_without_blocks() -> None:
    manager = make_manager((FULL, 13), num_slots=2)
    caches = [opened(manager, PROMPT) for _ in range(2)]
    assert {cache.slot for cache in caches} == {0, 1}
    assert manager.open([1], 1) is None
    caches[0].release()
    assert manager.num_running == 1
    assert manager.open(list(range(4 + 9 * 64)), 4 + 9 * 64) is None
    assert opened(manager, PROMPT).slot == caches[0].slot
    assert manager.num_free_blocks == [1]


def test_a_prompt_finds_what_an_earlier_one_left() -> None:
    manager = make_manager((FULL, 20))
    [table] = served(manager, PROMPT)
    cache = opened(manager, PROMPT)
    assert cache.num_hit_tokens == 4 + 6 * 64
    assert cache.block_tables == [table]
    assert manager.num_free_blocks == [14]


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_shared", "num_hit_blocks"),
    [
        (4 + 7 * 64, 4 + 6 * 64 - 1, 4),  # one token of the last segment differs
        (4 + 7 * 64, 4 + 2 * 64 - 1, 0),
        (4 + 7 * 64, 3, 0),
        (4 + 7 * 64 - 1, 1000, 4),  # 63 tokens would be left, and generated tokens see 64 uncompressed
        (4 + 3 * 64, 1000, 2),
        (4 + 3 * 64 - 1, 1000, 0),
    ],
)
def test_hits_end_at_a_cut_that_leaves_the_residual(
    num_prompt_tokens: int, num_shared: int, num_hit_blocks: int
) -> None:
    manager = make_manager((FULL, 20))
    served(manager, PROMPT)
    prompt = PROMPT[: min(num_shared, num_prompt_tokens)]
    cache = opened(manager, prompt + [-1] * (num_prompt_tokens - len(prompt)))
    assert cache.num_hit_tokens == (4 + 64 * num_hit_blocks if num_hit_blocks else 0)


def test_prompts_of_another_salt_or_without_caching_find_nothing() -> None:
    manager = make_manager((FULL, 20))
    served(manager, PROMPT)
    assert opened(manager, PROMPT, salt=b"a").num_hit_tokens == 0
    manager = make_manager((FULL, 20), caches_prefixes=False)
    served(manager, PROMPT)
    assert opened(manager, PROMPT).num_hit_tokens == 0


def test_a_block_is_found_only_after_its_step() -> None:
    manager = make_manager((FULL, 40))
    first = opened(manager, PROMPT)
    assert first.extend(0, 132)
    assert opened(manager, PROMPT).num_hit_tokens == 0
    first.publish(132)
    assert opened(manager, PROMPT).num_hit_tokens == 132


def test_generated_tokens_are_not_published() -> None:
    """Token 4 + 3 * 64 and later ones were computed with another view than in a prompt that has them."""
    manager = make_manager((FULL, 20))
    cache = opened(manager, PROMPT[:197])
    assert compute(manager, cache, 197, len(PROMPT))
    cache.release()
    assert opened(manager, PROMPT).num_hit_tokens == 132


def test_a_preempted_request_finds_its_own_prompt_and_publishes_it_again() -> None:
    manager = make_manager((FULL, 12))
    cache = opened(manager, PROMPT)
    assert compute(manager, cache, len(PROMPT), len(PROMPT) + 100)
    cache.release()
    token_ids = PROMPT + [-1] * 100
    again = opened(manager, token_ids, len(PROMPT))
    assert again.num_hit_tokens == 4 + 6 * 64
    assert len(again.block_tables[0]) == 4 + 3
    assert compute(manager, again, len(PROMPT), len(token_ids))


def test_hit_blocks_do_not_count_as_free() -> None:
    manager = make_manager((FULL, 9))
    served(manager, PROMPT)
    assert manager.num_free_blocks == [9]
    longer = PROMPT + list(range(4 * 64))
    assert manager.open(longer, len(longer)) is None  # 10 blocks
    manager.check_integrity()
    cache = opened(manager, longer[: 4 + 9 * 64])
    assert (cache.num_hit_tokens, manager.num_free_blocks) == (4 + 6 * 64, [1])


def test_a_prompt_that_waits_for_room_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[list[int], bytes]] = []

    def hash_prompt(token_ids: list[int], salt: bytes, num_sinks: int) -> list[bytes]:
        hashed.append((token_ids, salt))
        return chain_hashes(token_ids, salt, num_sinks)

    monkeypatch.setattr(request_cache, "chain_hashes", hash_prompt)
    manager = make_manager((FULL, 9))
    token_ids = PROMPT * 2
    for salt in (b"", b"", b"salt", b"salt"):
        assert manager.open(token_ids, len(token_ids), salt) is None
    token_ids[0] = -1
    assert manager.open(token_ids, len(token_ids), b"salt") is None
    assert hashed == [(PROMPT * 2, b""), (PROMPT * 2, b"salt"), (token_ids, b"salt")]


def test_a_window_needs_only_the_blocks_that_the_hit_can_still_see() -> None:
    """After 6 blocks a query at 388 sees tokens after 288: blocks 4 (260 to 323) and 5."""
    manager = make_manager((FULL, 20), (Visibility(window=100), 20), (Visibility(chunk=192), 20))
    tables = served(manager, PROMPT)
    cache = opened(manager, PROMPT)
    assert cache.num_hit_tokens == 4 + 6 * 64
    assert cache.block_tables == [
        tables[0],
        [None] * 4 + tables[1][4:6],
        [None] * 5 + tables[2][5:6],  # sees 384 and later: the last 4 tokens of block 5
    ]


def test_a_hit_is_as_long_as_the_group_that_lost_most_allows() -> None:
    manager = make_manager((FULL, 20), (Visibility(window=65), 6))
    served(manager, PROMPT)
    other = opened(manager, [-1] * 200)
    assert other.extend(0, 132)
    assert other.extend(132, 196)
    other.release()
    cache = opened(manager, PROMPT)
    assert cache.num_hit_tokens == 4 + 6 * 64
    cache.release()
    busy = opened(manager, [-2] * len(PROMPT))
    assert compute(manager, busy, len(PROMPT), len(PROMPT))
    assert opened(manager, PROMPT).num_hit_tokens == 0


def test_a_window_drops_blocks_and_a_failed_step_changes_nothing_else() -> None:
    manager = make_manager((FULL, 12), (Visibility(window=100), 5))
    num_tokens = 4 + 10 * 64
    cache = opened(manager, list(range(num_tokens)))
    assert cache.extend(0, 132) and cache.extend(132, 260)
    full = list(range(9))
    assert cache.block_tables == [full, [0, 1, 2, 3]]
    assert not cache.extend(260, 516)  # sees blocks 2 and 3, and there is no room for 4 more
    assert cache.block_tables == [full, [None, None, 2, 3]]
    assert manager.num_free_blocks == [3, 3]
    assert cache.extend(260, 388)
    assert cache.block_tables[1][:4] == [None, None, 2, 3]
    assert len(cache.block_tables[1]) == 6
    manager.check_integrity()


def test_a_step_of_two_chunks_keeps_what_its_first_chunk_sees() -> None:
    manager = make_manager((Visibility(window=100), 10))
    cache = opened(manager, list(range(4 + 10 * 64)))
    assert cache.extend(0, 132) and cache.extend(132, 388)
    assert cache.block_tables == [[0, 1, 2, 3, 4, 5]]  # 132 sees 33 and later
    assert cache.extend(388, 644)
    assert [block_id is None for block_id in cache.block_tables[0]] == [True] * 4 + [False] * 5


def test_forks_share_blocks_and_go_their_own_ways() -> None:
    manager = make_manager((FULL, 8), (Visibility(window=100), 8), num_slots=2)
    cache = opened(manager, PROMPT)
    assert compute(manager, cache, len(PROMPT), len(PROMPT))
    fork = cache.fork()
    assert fork is not None and fork.slot != cache.slot
    assert (fork.block_tables, fork.num_hit_tokens) == (cache.block_tables, 0)
    assert fork.fork() is None
    for each in (cache, fork):
        assert each.extend(len(PROMPT) + 63, len(PROMPT) + 64)
    assert fork.block_tables[0][:6] == cache.block_tables[0][:6]
    assert fork.block_tables[0][6] != cache.block_tables[0][6]
    assert manager.num_free_blocks[0] == 0
    manager.check_integrity()
    cache.release()
    assert manager.num_free_blocks[0] == 1
    manager.check_integrity()
    fork.release()
    assert manager.num_free_blocks == [8, 8]


def test_a_cache_is_released_once() -> None:
    manager = make_manager((FULL, 8))
    cache = opened(manager, PROMPT)
    cache.release()
    opened(manager, PROMPT)
    with pytest.raises(AssertionError, match="a cache is released once"):
        cache.release()
    manager.check_integrity()
    assert manager.num_running == 1


def test_a_lost_slot_is_noticed() -> None:
    manager = make_manager((FULL, 8), num_slots=2)
    manager._free_slots.pop()
    with pytest.raises(AssertionError, match=r"the free and the taken slots are \[1\]"):
        manager.check_integrity()


def test_every_group_has_a_number_of_blocks() -> None:
    with pytest.raises(ValueError):
        CacheManager(TIMELINE, [FULL, FULL], [8], 1, True)


@given(
    timeline=timelines,
    groups=st.lists(st.tuples(visibilities, st.integers(0, 16)), min_size=1, max_size=2),
    num_prompt_tokens=st.integers(1, 1200),
    num_generated=st.integers(0, 400),
    num_recomputed=st.integers(0, 400),
)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_what_a_manager_can_ever_hold_runs_alone_to_its_end(
    timeline: Timeline,
    groups: list[tuple[Visibility, int]],
    num_prompt_tokens: int,
    num_generated: int,
    num_recomputed: int,
) -> None:
    manager = make_manager(*groups, timeline=timeline)
    token_ids = [0] * (num_prompt_tokens + min(num_recomputed, num_generated))
    num_tokens = num_prompt_tokens + num_generated
    if manager.can_ever_hold(num_tokens, num_prompt_tokens):
        for _ in range(2):  # the second time with hits
            cache = opened(manager, token_ids, num_prompt_tokens)
            assert compute(manager, cache, num_prompt_tokens, num_tokens)
            cache.release()
        assert manager.num_free_blocks == [num_blocks for _, num_blocks in groups]
    elif num_generated <= num_recomputed:
        assert manager.open(token_ids, num_prompt_tokens) is None


@pytest.mark.parametrize("visibility", [Visibility(window=w) for w in (1, 2, 65, 66, 100, 512, 513)])
def test_a_window_needs_no_block_less_than_it_asks_for(visibility: Visibility) -> None:
    timeline = Timeline()
    prompt = [0] * 3000
    managers = [make_manager((visibility, n), timeline=timeline, caches_prefixes=False) for n in range(30)]
    manager = next(manager for manager in managers if manager.can_ever_hold(3000, 3000))
    cache = opened(manager, prompt)
    num_free = []
    for start, end in ((0, 516), (516, 1028), (1028, 1540), (1540, 2052)):
        assert cache.extend(start, end)
        num_free += manager.num_free_blocks
    assert min(num_free) == 0


@given(
    timeline=timelines,
    groups=st.lists(st.tuples(visibilities, st.integers(0, 5)), min_size=1, max_size=2),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_max_tokens_is_the_last_length_that_fits_whatever_part_is_prompt(
    timeline: Timeline, groups: list[tuple[Visibility, int]]
) -> None:
    manager = make_manager(*groups, timeline=timeline)
    limit = min(manager.max_tokens, 1100)

    def fits(num_tokens: int) -> bool:
        return all(manager.can_ever_hold(num_tokens, n) for n in {*range(1, num_tokens, 37), num_tokens})

    assert all(fits(n) for n in range(0, limit + 1, 11)) and fits(limit)
    assert limit == 1100 or not fits(limit + 1)
