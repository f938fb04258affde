"""Observer: what can be heard of requests while they are worked on. Does not know what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turboquant_server.engine.engine import StepOutput
    from turboquant_server.engine.sampling_params import SamplingParams


class Observer:
    """Hear what becomes of requests, and do nothing; subclasses count.

    All calls but ``started`` come from the event loop of the request, so that the engine waits for none.
    """

    def arrived(self, request_id: str, sampling_params: SamplingParams) -> None:
        """A request has been put in the queue."""

    def started(self, request_id: str, time: float) -> None:
        """A step that began at `time`, in seconds of ``time.monotonic``, was the first to work on a request.

        Called by the engine thread.
        """

    def stepped(self, outputs: Sequence[StepOutput]) -> None:
        """A step has had these outputs."""

    def left(self, request_id: str, failure: Exception | None) -> None:
        """A request has ended: finished, failed, or given up by whoever made it."""
