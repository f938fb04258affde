"""Each step has the tokens that it should have, whoever comes, waits, is preempted or ends."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import pytest

from turboquant_core import CacheManager, Timeline, Visibility
from turboquant_server.engine.request import FinishReason, Request, RequestStatus
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.engine.scheduler import ScheduledBatch, Scheduler

TIMELINE = Timeline()  # cuts at 4 + 512, 4 + 1024, ..
EVERYTHING = Visibility()
TOKEN = 7


class Bench:
    """A scheduler over a real cache, and a model that always says the same."""

    def __init__(
        self,
        *num_blocks: int,
        num_slots: int = 8,
        budget: int = 2048,
        visibilities: tuple[Visibility, ...] = (EVERYTHING,),
        one_shot: bool = False,
    ) -> None:
        self.manager = CacheManager(
            TIMELINE, visibilities, num_blocks or (200,), num_slots, caches_prefixes=not one_shot
        )
        self.scheduler = Scheduler(self.manager.open, TIMELINE, budget, one_shot=one_shot)
        self.num_added = 0

    def add(self, num_tokens: int, *, n: int = 1, prompt: list[int] | None = None) -> Request:
        """Queue a prompt that shares nothing with others, unless it is given."""
        self.num_added += 1
        token_ids = [100 + self.num_added] * num_tokens if prompt is None else prompt
        request, *request.forks = (
            Request(
                str(self.num_added),
                token_ids,
                SamplingParams(max_tokens=1000, n=n),
                cast(Any, None),
                choice_index=index,
            )
            for index in range(n)
        )
        self.scheduler.add(request)
        return request

    def step(self) -> ScheduledBatch:
        batch = self.scheduler.schedule()
        for item in (*batch.prefills, *batch.decodes):
            self.scheduler.advance(item)
            request = item.request
            if request.num_computed_tokens == request.num_tokens:
                for choice in (request, *(fork for fork, _ in self.scheduler.fork(request))):
                    choice.token_ids.append(TOKEN)
        self.manager.check_integrity()
        return batch

    def prefills(self) -> dict[str, list[tuple[int, int]]]:
        """Step; return the chunks of each prompt."""
        return {
            item.request.request_id: [(chunk.start, chunk.end) for chunk in item.chunks]
            for item in self.step().prefills
        }

    def assert_nothing_is_held(self) -> None:
        assert not self.scheduler.running and not self.scheduler.waiting
        self.manager.check_integrity()
        assert self.manager.num_running == 0
        assert self.manager.num_free_blocks == [group.blocks.num_blocks for group in self.manager._groups]


def test_prompts_share_the_budget_oldest_first_in_whole_chunks() -> None:
    bench = Bench(budget=1200)
    for num_tokens in (1700, 300, 200, 300):
        bench.add(num_tokens)
    assert bench.prefills() == {"1": [(0, 516), (516, 1028)]}
    assert bench.prefills() == {"1": [(1028, 1540), (1540, 1700)], "2": [(0, 300)], "3": [(0, 200)]}
    assert bench.prefills() == {"4": [(0, 300)]}


def test_the_first_chunk_is_computed_whatever_the_budget() -> None:
    bench = Bench(budget=1)
    bench.add(600)
    bench.add(10)
    assert [bench.prefills() for _ in range(2)] == [{"1": [(0, 600)]}, {"2": [(0, 10)]}]


def test_who_generates_gets_a_token_in_every_step_beside_a_long_prompt() -> None:
    bench = Bench(budget=512)
    short = bench.add(20)
    bench.step()
    bench.add(3000)
    for num_tokens in range(22, 27):
        batch = bench.step()
        assert [item.request for item in batch.decodes] == [short]
        assert [chunk.num_tokens for chunk in batch.decodes[0].chunks] == [1]
        assert len(batch.prefills) == 1
        assert short.num_tokens == num_tokens


def test_a_request_is_not_admitted_before_its_first_chunk_has_room() -> None:
    bench = Bench(budget=600)
    first, second, third = (bench.add(1000, prompt=[5] * 900 + [last] * 100) for last in (1, 2, 3))
    assert bench.prefills() == {"1": [(0, 516)]}
    assert [r.status for r in (first, second, third)] == [RequestStatus.RUNNING, *[RequestStatus.WAITING] * 2]
    assert bench.prefills() == {"1": [(516, 1000)]}
    # So it finds what the first has computed meanwhile.
    assert bench.prefills() == {"2": [(0, 4), (516, 1000)]}
    assert second.num_cached_tokens == 516


@pytest.mark.parametrize(
    ("budget", "chunks"), [(1027, [(0, 4), (516, 1028)]), (1028, [(0, 4), (516, 1028), (1028, 1540)])]
)
def test_the_sinks_of_a_cached_prefix_are_charged_to_the_budget(
    budget: int, chunks: list[tuple[int, int]]
) -> None:
    bench = Bench(budget=budget)
    bench.add(900, prompt=[5] * 900)
    bench.step()
    bench.add(1700, prompt=[5] * 900 + [6] * 800)
    assert bench.prefills() == {"2": chunks}


def test_a_request_that_does_not_fit_keeps_those_behind_it_waiting() -> None:
    bench = Bench(10)
    bench.add(500)
    bench.step()
    bench.add(700)
    short = bench.add(10)
    bench.step()
    assert len(bench.scheduler.waiting) == 2
    bench.scheduler.finish(bench.scheduler.running[0], FinishReason.STOP)
    bench.step()
    assert short.num_output_tokens == 1


def test_no_request_is_admitted_without_a_slot() -> None:
    bench = Bench(num_slots=2)
    for _ in range(3):
        bench.add(10)
    bench.step()
    assert (len(bench.scheduler.running), len(bench.scheduler.waiting)) == (2, 1)


def test_when_blocks_run_out_the_youngest_waits_in_front_of_all_that_came_after_it() -> None:
    bench = Bench(4)
    requests = [bench.add(190) for _ in range(3)]
    for _ in range(10):
        bench.step()
    assert bench.manager.num_free_blocks == [1]
    later = bench.add(400)
    while not bench.scheduler.num_preemptions:
        bench.step()
    assert requests[:2] == bench.scheduler.running
    assert list(bench.scheduler.waiting) == [requests[2], later]
    assert (requests[2].status, requests[2].num_computed_tokens) == (RequestStatus.WAITING, 0)


def test_a_preempted_request_computes_its_tokens_again_as_they_were_computed_before() -> None:
    bench = Bench()
    request = bench.add(1000)
    for _ in range(200):
        bench.step()
    assert request.num_tokens == 1200
    bench.scheduler._preempt(request)
    # Generated tokens have cuts at 4 + 64 * i; one chunk of them a step. The last token is decoded as always.
    assert bench.prefills() == {"1": [(0, 4), (516, 1000), (1000, 1028)]}
    assert bench.prefills() == {"1": [(1028, 1092)]}
    assert bench.prefills() == {"1": [(1092, 1156)]}
    assert bench.prefills() == {"1": [(1156, 1200)]}
    assert request.num_tokens == 1201
    assert bench.step().decodes[0].chunks[0].start == 1200
    assert request.num_cached_tokens == 0  # of the first time


def test_a_prompt_that_is_computed_again_is_published_again() -> None:
    bench = Bench(20)
    prompt = [5] * 900
    request = bench.add(900, prompt=prompt)
    for _ in range(3):
        bench.step()
    bench.scheduler._preempt(request)
    other = bench.manager.open([6] * 1280, 1280)  # takes so many blocks that the prompt's are not found
    assert other is not None
    other.release()
    assert bench.prefills() == {"1": [(0, 516), (516, 900), (900, 903)]}
    bench.scheduler.finish(request, FinishReason.STOP)
    bench.add(900, prompt=prompt)
    assert bench.prefills() == {"2": [(0, 4), (516, 900)]}


def test_layers_with_a_window_get_as_many_chunks_at_a_time_as_they_have_blocks_for() -> None:
    window = Visibility(window=64)
    alone = Bench(40, 9, visibilities=(EVERYTHING, window))  # a chunk's blocks and one before it
    alone.add(2000)
    assert [alone.prefills() for _ in range(3)] == [
        {"1": [(0, 516)]},
        {"1": [(516, 1028)]},
        {"1": [(1028, 1540)]},
    ]
    wide = Bench(40, 16, visibilities=(EVERYTHING, window))
    wide.add(2000)
    assert wide.prefills() == {"1": [(0, 516), (516, 1028)]}
    assert alone.scheduler.num_preemptions == wide.scheduler.num_preemptions == 0


def test_a_request_that_is_preempted_by_an_older_prompt_is_no_part_of_the_step() -> None:
    bench = Bench(80, 17, budget=1500, visibilities=(EVERYTHING, Visibility(window=64)))
    for num_tokens in (1700, 1700):
        bench.add(num_tokens)
    bench.scheduler._admit(bench.scheduler.waiting.popleft())
    bench.scheduler._admit(bench.scheduler.waiting.popleft())
    young = bench.scheduler.running[1]
    assert young.cache is not None
    assert young.cache.extend(0, 1028)  # all but one of the window's blocks
    assert bench.prefills() == {"1": [(0, 516)]}  # nor admitted again at once, though there is room
    assert young.status is RequestStatus.WAITING
    assert bench.scheduler.num_preemptions == 1


def test_a_request_that_finds_its_own_blocks_after_a_preemption_reports_none_of_them() -> None:
    bench = Bench(budget=600)
    request = bench.add(1200)
    bench.step()
    bench.scheduler._preempt(request)
    assert bench.prefills() == {"1": [(0, 4), (516, 1028)]}
    assert request.num_cached_tokens == 0


def test_forks_share_the_prompts_blocks_and_run_beside_it() -> None:
    bench = Bench()
    request = bench.add(600, n=3)
    bench.step()
    assert [r.choice_index for r in bench.scheduler.running] == [0, 1, 2]
    tables = [r.cache.block_tables for r in bench.scheduler.running if r.cache]
    assert tables[0] == tables[1] == tables[2]
    assert len({r.cache.slot for r in bench.scheduler.running if r.cache}) == 3
    assert request.forks == []
    assert len(bench.step().decodes) == 3


def test_forks_without_a_slot_wait_and_find_the_prompt_in_the_cache() -> None:
    bench = Bench(num_slots=2)
    bench.add(900, n=3)
    bench.step()
    later = bench.add(10)
    waiting = list(bench.scheduler.waiting)
    assert [(r.request_id, r.choice_index) for r in waiting] == [("1", 2), ("2", 0)]
    bench.scheduler.finish(bench.scheduler.running[0], FinishReason.STOP)
    assert bench.prefills() == {"1": [(0, 4), (516, 900)]}
    assert list(bench.scheduler.waiting) == [later]
    assert waiting[0].num_output_tokens == 1
    assert waiting[0].num_cached_tokens == 0  # as of the choices that did not have to wait


def test_one_shot_computes_all_of_a_request_in_one_step() -> None:
    bench = Bench(budget=100, one_shot=True)
    bench.add(1700)
    assert bench.prefills() == {"1": [(0, 516), (516, 1028), (1028, 1540), (1540, 1700)]}
    for _ in range(200):
        bench.step()
    bench.scheduler._preempt(bench.scheduler.running[0])
    [chunks] = bench.prefills().values()
    assert chunks[0][0] == 0 and chunks[-1][1] == 1901
    assert all(chunk[1] == following[0] for chunk, following in pairwise(chunks))


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_request_can_be_finished_in_every_phase_and_leaves_nothing(num_steps: int) -> None:
    bench = Bench(budget=600, num_slots=3)
    request = bench.add(1000, n=4)
    for _ in range(num_steps):
        bench.step()
    choices = bench.scheduler.find("1")
    assert len(choices) == 4 and request in choices
    for choice in choices:
        bench.scheduler.finish(choice, FinishReason.ABORT)
    assert all(choice.status is RequestStatus.FINISHED for choice in choices)
    assert bench.scheduler.find("1") == []
    bench.assert_nothing_is_held()
    assert bench.scheduler.schedule() == ScheduledBatch([], [])


def test_a_request_that_nothing_can_hold_is_an_error_and_no_endless_loop() -> None:
    bench = Bench(5)
    bench.add(1000)
    with pytest.raises(AssertionError, match="nothing can hold"):
        bench.step()
