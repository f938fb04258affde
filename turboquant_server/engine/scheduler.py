"""Who computes how many tokens in the next step. Knows no model; opens and releases the requests' caches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turboquant_server.engine.request import FinishReason, Request, RequestStatus

if TYPE_CHECKING:
    from transformers import Cache

# A prompt is computed in pieces of this many tokens, so that an abort takes effect within one piece.
PREFILL_CHUNK_SIZE = 512


@dataclass(frozen=True)
class ScheduledBatch:
    """The requests of one step and how many tokens of each it computes."""

    requests: list[Request]
    num_scheduled_tokens: list[int]


class Scheduler:
    """Run the requests one after another, in the order in which they came.

    Args:
        open_cache: Opens an empty cache for one request.
        prefill_chunk_size: Most tokens of one request in one step.

    Attributes:
        waiting: Requests that hold no cache yet, the oldest first.
        running: The request that holds a cache, if any.
    """

    def __init__(self, open_cache: Callable[[], Cache], prefill_chunk_size: int = PREFILL_CHUNK_SIZE) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._open_cache = open_cache
        self._prefill_chunk_size = prefill_chunk_size

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def schedule(self) -> ScheduledBatch:
        """Admit the next request when none runs, and give the running one its share of tokens."""
        if self.waiting and not self.running:
            request = self.waiting.popleft()
            request.cache = self._open_cache()
            request.status = RequestStatus.RUNNING
            self.running.append(request)
        return ScheduledBatch(
            requests=list(self.running),
            num_scheduled_tokens=[
                min(request.num_tokens - request.num_computed_tokens, self._prefill_chunk_size)
                for request in self.running
            ],
        )

    def find(self, request_id: str) -> Request | None:
        """Return the request of this id unless it has finished."""
        for request in [*self.running, *self.waiting]:
            if request.request_id == request_id:
                return request
        return None

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Take a request out and release its cache."""
        (self.running if request.status is RequestStatus.RUNNING else self.waiting).remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.cache = None
