"""Whatever requests come, end and fail in whatever order, each step obeys the timeline and nobody starves.

The engine is real but for the model. In its place stands a runner that remembers which tokens lie in which
slot and block, and looks at each step whether a request finds there what it needs. More than 300 lines: the
runner is a model of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from turboquant_core import BLOCK_SIZE, CacheManager, Chunk, RequestCache, Timeline, Visibility
from turboquant_core.step_plan import new_blocks, visible_blocks
from turboquant_server.engine.engine import Engine
from turboquant_server.engine.pending_step import PendingStep, StepResult
from turboquant_server.engine.request import Request, RequestFailedError, RequestStatus
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.engine.scheduler import ScheduledBatch, ScheduledRequest, Scheduler

MAX_PROMPT = 3000
VOCAB_SIZE = 300
EOS = 2
SHORT = Timeline(residual_length=64, segment_size=128)


@dataclass(frozen=True)
class Setup:
    """A pool that holds few requests beside the longest."""

    timeline: Timeline
    groups: tuple[tuple[Visibility, int], ...]
    num_slots: int
    budget: int
    one_shot: bool = False
    num_host_blocks: int = 0


SETUPS = (
    Setup(Timeline(), ((Visibility(), 49),), num_slots=16, budget=2048),
    Setup(
        Timeline(), ((Visibility(), 60), (Visibility(window=300), 14)), 8, budget=2048, num_host_blocks=100
    ),
    Setup(
        SHORT,
        ((Visibility(), 49), (Visibility(window=100), 6), (Visibility(chunk=192), 9)),
        6,
        budget=300,
        num_host_blocks=20,
    ),
    Setup(SHORT, ((Visibility(window=130), 5),), num_slots=3, budget=1000),
    Setup(SHORT, ((Visibility(), 50),), num_slots=12, budget=1),
    Setup(Timeline(), ((Visibility(), 49),), num_slots=12, budget=700, one_shot=True),
)


class SilentTokenizer:
    """Give no token a text."""

    def decode(self, token_ids: list[int], **options: bool) -> str:
        return ""


class CheckingRunner:
    """Stand in for the ModelRunner: look at what a step would read, note what it writes, make tokens up."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.visibilities = [visibility for visibility, _ in setup.groups]
        self.slots: dict[int, list[int]] = {}  # the tokens whose newest lie there
        self.blocks: list[dict[int, int]] = [{} for _ in setup.groups]
        self.host: list[dict[int, int]] = [{} for _ in setup.groups]
        self.contents: dict[Request, list[int]] = {}
        self.random = random.Random(0)
        self.is_failing = False
        self.max_model_len = 0
        self.batch = ScheduledBatch([], [])
        self.tokens: list[int] = []  # of the newest step

    def copy_slot(self, source: int, target: int) -> None:
        self.slots[target] = self.slots[source]

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        self.batch = batch
        scheduled = [*batch.prefills, *batch.decodes]
        assert len({id(item.request) for item in scheduled}) == len(scheduled)
        for item in batch.decodes:
            request = item.request
            assert [(chunk.start, chunk.end) for chunk in item.chunks] == [
                (request.num_tokens - 1, request.num_tokens)
            ]
            assert 0 < request.num_output_tokens < request.sampling_params.max_tokens
            assert request.num_tokens < self.max_model_len
        for item in batch.prefills:
            self.check_cuts(item.request, item.chunks)
        self.check_budget(batch.prefills)
        for moves, blocks, host in zip(batch.moves, self.blocks, self.host, strict=True):
            host |= {host_id: blocks[block_id] for block_id, host_id in moves.to_host}
            blocks |= {block_id: host[host_id] for block_id, host_id in moves.to_device}
        for item in scheduled:
            for chunk in item.chunks:
                self.compute(item.request, chunk)
        self.tokens = []
        results = [(item, self.result(item)) for item in scheduled]
        return PendingStep(results, torch.tensor(self.tokens, dtype=torch.int64))

    def tokens_of(self, request: Request) -> list[int]:
        """Return a request's tokens, that included which only the step before knows."""
        *known, newest = request.token_ids
        assert min(known, default=0) >= 0
        return [*known, newest if newest >= 0 else self.tokens[-1 - newest]]

    def check_cuts(self, request: Request, chunks: Sequence[Chunk]) -> None:
        timeline, num_prompt_tokens = self.setup.timeline, request.num_prompt_tokens
        assert request.cache is not None
        start = request.num_computed_tokens
        if 0 < start == request.cache.num_hit_tokens:
            assert (chunks[0].start, chunks[0].end) == (0, timeline.num_sinks)
            chunks = chunks[1:]
        assert chunks
        for chunk in chunks:
            end = min(timeline.chunk_end(start, num_prompt_tokens), request.num_tokens)
            assert (chunk.start, chunk.end, chunk.num_prompt_tokens) == (start, end, num_prompt_tokens)
            start = end
        if self.setup.one_shot:
            assert chunks[0].start == 0 and start == request.num_tokens
        else:
            assert all(chunk.start < num_prompt_tokens for chunk in chunks[:-1])

    def check_budget(self, prefills: Sequence[ScheduledRequest]) -> None:
        """The budget may be exceeded by the first chunk, and the sinks that go with it."""
        counts = [chunk.num_tokens for item in prefills for chunk in item.chunks]
        num_first = 2 if prefills and prefills[0].chunks[0].end == self.setup.timeline.num_sinks else 1
        if not self.setup.one_shot and len(counts) > num_first:
            assert sum(counts) <= self.setup.budget

    def compute(self, request: Request, chunk: Chunk) -> None:
        cache, timeline = chunk.cache, self.setup.timeline
        assert request.cache is cache and request.status is RequestStatus.RUNNING
        tokens = self.tokens_of(request)
        if chunk.start and chunk.start != cache.num_hit_tokens:
            assert self.slots[cache.slot] == tokens[: chunk.start]
        self.slots[cache.slot] = tokens[: chunk.end]
        contents = self.contents_of(request, chunk.end)
        for group, visibility in enumerate(self.visibilities):
            seen = visible_blocks(chunk, group, visibility, timeline)
            for index, block_id in enumerate(seen.ids, start=(seen.start - timeline.num_sinks) // BLOCK_SIZE):
                assert self.blocks[group][block_id] == contents[index]
            first, due = new_blocks(chunk, group, timeline)
            for index, block_id in enumerate(due, start=first):
                self.blocks[group][block_id] = contents[index]

    def contents_of(self, request: Request, num_tokens: int) -> list[int]:
        """Return for each block a number that stands for the salt and all tokens up to the block's end."""
        contents = self.contents.setdefault(request, [hash((request.cache_salt, *request.token_ids[:4]))])
        start = self.setup.timeline.num_sinks + BLOCK_SIZE * (len(contents) - 1)
        for first in range(start, num_tokens - BLOCK_SIZE + 1, BLOCK_SIZE):
            contents.append(hash((contents[-1], *self.tokens_of(request)[first : first + BLOCK_SIZE])))
        return contents[1:]

    def result(self, item: ScheduledRequest) -> StepResult:
        request = item.request
        if self.is_failing:
            self.is_failing = False
            return RequestFailedError(request.request_id, "no luck")
        if item.chunks[-1].end < request.num_tokens:
            return []
        first = len(self.tokens)
        self.tokens += [self.random.randrange(EOS, 200) for _ in (request, *request.forks)]
        return range(first, len(self.tokens))


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self, setup: Setup, overlaps_steps: bool) -> None:
        super().__init__()
        self.setup = setup
        self.num_added = 0
        self.manager = CacheManager(
            setup.timeline,
            [visibility for visibility, _ in setup.groups],
            [num_blocks for _, num_blocks in setup.groups],
            setup.num_slots,
            caches_prefixes=not setup.one_shot,
            num_host_blocks=setup.num_host_blocks,
        )
        self.opened: list[RequestCache] = []
        self.scheduler = Scheduler(
            self.open,
            setup.timeline,
            setup.budget,
            one_shot=setup.one_shot,
            take_moves=self.manager.take_moves,
        )
        self.runner = CheckingRunner(setup)
        self.runner.max_model_len = max_model_len = min(self.manager.max_tokens, MAX_PROMPT + 100)
        assert max_model_len > MAX_PROMPT
        self.engine = Engine(
            self.scheduler,
            cast(Any, self.runner),
            cast(Any, SilentTokenizer()),
            (EOS,),
            vocab_size=VOCAB_SIZE,
            max_model_len=max_model_len,
            overlaps_steps=overlaps_steps,
        )
        self.expected: dict[str, int] = {}  # how many choices of each request are to end

    @precondition(lambda self: len(self.expected) < 20)
    @rule(seed=st.integers(0, 2**16), num_requests=st.sampled_from([8, 2, 1]))
    def add(self, seed: int, num_requests: int) -> None:
        choose = random.Random(seed)
        for _ in range(num_requests):
            self.num_added += 1
            length = choose.randint(1, choose.choice([200, 600, 1200, MAX_PROMPT]))
            num_shared = min(length, choose.choice([0, 200, 700, 1100, MAX_PROMPT]))
            prompt = [3] * num_shared + [100 + self.num_added % 100] * (length - num_shared)
            n = choose.choice([1, 1, 1, 2, 4])
            params = SamplingParams(max_tokens=choose.choice([1, 5, 70, 200]), n=n)
            self.engine.add_request(str(self.num_added), prompt, params, choose.choice(["", "", "", "a"]))
            self.expected[str(self.num_added)] = n

    @rule(num_steps=st.sampled_from([1, 3, 30, 70]))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step_once()

    def open(self, token_ids: Sequence[int], num_prompt_tokens: int, salt: bytes) -> RequestCache | None:
        assert token_ids is self.scheduler.waiting[0].token_ids, "a request overtakes"
        cache = self.manager.open(token_ids, num_prompt_tokens, salt)
        self.opened += [cache] if cache else []
        return cache

    def step_once(self) -> None:
        oldest = min(self.scheduler.running, key=lambda request: request.arrival, default=None)
        has_all_tokens = oldest is not None and oldest.is_complete
        num_preemptions = self.scheduler.num_preemptions
        self.opened.clear()
        outputs = self.engine.step()
        scheduled = [*self.runner.batch.prefills, *self.runner.batch.decodes]
        if oldest is not None and not has_all_tokens:
            assert oldest in [item.request for item in scheduled], "the oldest request was not served"
        if self.scheduler.num_preemptions == num_preemptions:
            caches = [item.chunks[0].cache for item in scheduled]
            assert all(cache in caches for cache in self.opened), "blocks are held before they are needed"
        for output in outputs:
            if isinstance(output, RequestFailedError):
                del self.expected[output.request_id]
            elif output.finish_reason is not None:
                self.expected[output.request_id] -= 1
        self.expected = {request_id: n for request_id, n in self.expected.items() if n}

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), fails=st.booleans())
    def end_early(self, data: st.DataObject, fails: bool) -> None:
        if fails:
            self.runner.is_failing = True
            return
        request_id = data.draw(st.sampled_from(sorted(self.expected)))
        self.engine.abort_request(request_id)
        del self.expected[request_id]

    @invariant()
    def adds_up(self) -> None:
        self.manager.check_integrity()
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert self.manager.num_running == len(running)
        assert all(request.cache is not None for request in running)
        assert all(request.cache is None and request.num_computed_tokens == 0 for request in waiting)
        arrivals = [request.arrival for request in waiting]
        assert arrivals == sorted(arrivals)
        alive = [r for request in (*running, *waiting) for r in (request, *request.forks)]
        assert {r.request_id for r in alive} == self.expected.keys()
        assert len(alive) == sum(self.expected.values())

    def teardown(self) -> None:
        # The oldest is always served, and no request takes so many steps.
        for _ in range(400 * sum(self.expected.values())):
            if not self.engine.has_unfinished_requests:
                break
            self.step_once()
        assert not self.expected, "some requests never end"
        self.manager.check_integrity()
        assert self.manager.num_running == 0
        assert self.manager.num_free_blocks == [num_blocks for _, num_blocks in self.setup.groups]


@pytest.mark.parametrize("overlaps_steps", [False, True])
@pytest.mark.parametrize(
    "setup", SETUPS, ids=lambda setup: f"budget {setup.budget}, {len(setup.groups)} groups"
)
def test_every_step_obeys_the_timeline_and_every_request_ends(setup: Setup, overlaps_steps: bool) -> None:
    run_state_machine_as_test(
        cast(Any, lambda: SchedulerMachine(setup, overlaps_steps)),
        settings=settings(max_examples=30, stateful_step_count=30, deadline=None, derandomize=True),
    )
