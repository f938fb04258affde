"""Who computes which tokens in the next step. Knows no model and no tensor; opens and releases caches.

Requests are served in the order in which they came. One that generates gets its next token in every step,
though the host may not know the one before it yet, until it has all that it may have; what the token budget
leaves goes to prompts, oldest first, in the chunks of the timeline. When blocks run out the youngest request
gives its cache back and waits in front of all that came after it; later it computes its tokens again, the
generated ones as they were generated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from turboquant_core import Chunk, Moves, RequestCache, Timeline
from turboquant_server.engine.request import FinishReason, Request, RequestStatus

OpenCache: TypeAlias = Callable[[Sequence[int], int, bytes], RequestCache | None]


class ScheduledRequest(NamedTuple):
    """A request and the chunks of its tokens that a step computes."""

    request: Request
    chunks: list[Chunk]

    @property
    def choices(self) -> list[Request]:
        """Return the choices that get a token when these are computed: none while a prompt is incomplete."""
        request = self.request
        return [request, *request.forks] if self.chunks[-1].end == request.num_tokens else []


@dataclass(frozen=True)
class ScheduledBatch:
    """The requests of one step.

    Attributes:
        prefills: Those that have several tokens to compute.
        decodes: Those that have one, the one that was generated last.
        moves: Of each layer group, the copies to and from host memory that come before all else.
    """

    prefills: list[ScheduledRequest]
    decodes: list[ScheduledRequest]
    moves: Sequence[Moves] = field(default_factory=list)


class Scheduler:
    """Share steps and blocks among requests.

    Args:
        open_cache: Opens a cache for tokens, of which so many are a prompt, with a salt; None if there is no
            room for it.
        timeline: Where prompts are cut.
        max_num_batched_tokens: Most tokens of prompts in one step.
        one_shot: Compute all of a request's tokens in one step; for models that cannot go on from the middle
            of a prompt.
        take_moves: Returns the copies that the step needs which has been made room for.

    Attributes:
        waiting: Requests that hold no cache, the oldest first.
        running: Requests that hold a cache.
        num_preemptions: How often a request gave its cache back unfinished.
    """

    def __init__(
        self,
        open_cache: OpenCache,
        timeline: Timeline,
        max_num_batched_tokens: int,
        *,
        one_shot: bool = False,
        take_moves: Callable[[], Sequence[Moves]] = list,
    ) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._open_cache = open_cache
        self._take_moves = take_moves
        self._timeline = timeline
        self._longest_chunk = timeline.num_sinks + timeline.segment_size + timeline.residual_length
        self._max_num_batched_tokens = max_num_batched_tokens
        self._one_shot = one_shot
        self._num_added = 0

    def add(self, request: Request) -> None:
        """Queue a request; its forks run once its prompt is computed."""
        for choice in (request, *request.forks):
            choice.arrival = self._num_added
            self._num_added += 1
        self.waiting.append(request)

    def schedule(self) -> ScheduledBatch:
        """Choose the next step's tokens and make room for them."""
        num_preemptions = self.num_preemptions
        decodes = [
            ScheduledRequest(request, [self._chunk(request, request.num_computed_tokens, request.num_tokens)])
            for request in self._by_arrival()
            if request.is_decoding
            and not request.is_complete
            and self._make_room(request, request.num_tokens)
        ]
        budget = self._max_num_batched_tokens
        prefills: list[ScheduledRequest] = []
        for request in self._by_arrival():
            if request.cache is not None and not request.is_decoding:
                budget -= self._schedule_prefill(request, budget, prefills)
        while self.waiting and self.num_preemptions == num_preemptions:
            request = self.waiting[0]
            # Not before its first chunk has room, however long: until then it would hold blocks in vain, and
            # not find those that others compute of the same prompt.
            first_chunk = min(request.num_prompt_tokens, self._longest_chunk)
            if (prefills and budget < first_chunk) or not self._admit(request):
                break
            self.waiting.popleft()
            budget -= self._schedule_prefill(request, budget, prefills)
        # The store reads slots that follow each other without a copy.
        decodes.sort(key=lambda item: item.chunks[0].cache.slot)
        batch = ScheduledBatch(_still_running(prefills), _still_running(decodes), self._take_moves())
        is_idle = not batch.prefills and not batch.decodes and not any(r.is_complete for r in self.running)
        assert not (is_idle and self.waiting), "a request waits that nothing can hold"
        return batch

    def advance(self, scheduled: ScheduledRequest) -> None:
        """Note that a step computes what was scheduled, and offer the prompt's blocks to later steps."""
        request = scheduled.request
        assert request.cache is not None
        request.num_computed_tokens = scheduled.chunks[-1].end
        if scheduled.chunks[0].start < request.num_prompt_tokens:
            request.cache.publish(request.num_computed_tokens)

    def fork(self, request: Request) -> list[tuple[Request, int]]:
        """Let the other choices of a request go on from its prompt, now that it is computed.

        Returns:
            The choices that run from now on and the slots that they got, which the request's own must be
            copied to. The others wait, and will find the prompt's blocks in the cache.
        """
        assert request.cache is not None
        started = []
        forks, request.forks = request.forks, []
        for fork in forks:
            fork.num_cached_tokens = request.num_cached_tokens
            cache = request.cache.fork()
            if cache is None:
                self._wait(fork)
                continue
            fork.cache = cache
            fork.num_computed_tokens = request.num_computed_tokens
            fork.status = RequestStatus.RUNNING
            self.running.append(fork)
            started.append((fork, cache.slot))
        return started

    def find(self, request_id: str) -> list[Request]:
        """Return the choices of a request that have not finished."""
        found = [r for r in (*self.running, *self.waiting) if r.request_id == request_id]
        return [*found, *(fork for request in found for fork in request.forks)]

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Take a request out and release its cache."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:  # or the fork of one that has not been computed yet
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason

    def _by_arrival(self) -> list[Request]:
        return sorted(self.running, key=lambda request: request.arrival)

    def _chunk(self, request: Request, start: int, end: int) -> Chunk:
        assert request.cache is not None
        return Chunk(request.cache, start, end, request.num_prompt_tokens)

    def _admit(self, request: Request) -> bool:
        request.cache = self._open_cache(request.token_ids, request.num_prompt_tokens, request.cache_salt)
        if request.cache is None:
            return False
        request.num_computed_tokens = request.cache.num_hit_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.cache.num_hit_tokens
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        return True

    def _schedule_prefill(self, request: Request, budget: int, prefills: list[ScheduledRequest]) -> int:
        """Append a request's next chunks and return the number of their tokens."""
        chunks = self._next_chunks(request, budget, is_first=not prefills)
        # Layers with a window always have room for one chunk of the oldest request, but not for several.
        while (
            chunks
            and chunks[-1].start > request.num_computed_tokens
            and not self._one_shot
            and not self._has_room(request, chunks[-1].end)
        ):
            chunks.pop()
        if not chunks or not self._make_room(request, chunks[-1].end):
            return 0
        prefills.append(ScheduledRequest(request, chunks))
        return sum(chunk.num_tokens for chunk in chunks)

    def _next_chunks(self, request: Request, budget: int, *, is_first: bool) -> list[Chunk]:
        assert request.cache is not None
        chunks = []
        start = request.num_computed_tokens
        if 0 < start == request.cache.num_hit_tokens and self._timeline.num_sinks:
            # Blocks hold all that was found in the cache but the sinks; they cost less again than to keep.
            chunks.append(self._chunk(request, 0, self._timeline.num_sinks))
            budget -= self._timeline.num_sinks
        while start < request.num_tokens:
            end = min(self._timeline.chunk_end(start, request.num_prompt_tokens), request.num_tokens)
            budget -= end - start
            if budget < 0 and not is_first and not self._one_shot:
                break
            chunks.append(self._chunk(request, start, end))
            is_first = False
            if start >= request.num_prompt_tokens and not self._one_shot:
                break  # the next one reads what this one leaves in the slot
            start = end
        return chunks if chunks and chunks[-1].start >= request.num_computed_tokens else []

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Get blocks for a request's first `num_tokens`; False if it had to give back its own."""
        while request.cache is not None:
            if self._has_room(request, num_tokens):
                return True
            self._preempt(max(self.running, key=lambda running: running.arrival))
        return False

    def _has_room(self, request: Request, num_tokens: int) -> bool:
        """Get blocks for a request's first `num_tokens`, if there are enough."""
        assert request.cache is not None
        return request.cache.extend(request.num_computed_tokens, num_tokens)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        self.num_preemptions += 1
        self._wait(request)

    def _wait(self, request: Request) -> None:
        """Put a request among the waiting ones, behind those that came before it."""
        request.status = RequestStatus.WAITING
        place = sum(other.arrival < request.arrival for other in self.waiting)
        self.waiting.insert(place, request)

    def _release(self, request: Request) -> None:
        assert request.cache is not None
        request.cache.release()
        request.cache = None


def _still_running(scheduled: list[ScheduledRequest]) -> list[ScheduledRequest]:
    """Drop those that gave their caches back to an older request after they had been scheduled."""
    return [item for item in scheduled if item.request.cache is item.chunks[0].cache]
