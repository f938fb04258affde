"""The engine on its own thread, and asyncio's way to it. Nothing else here knows of threads."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TypeAlias

from turboquant_server.engine.engine import Engine, StepOutput
from turboquant_server.engine.request import RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine has ended, by an error or by shutdown, and will answer no more requests."""


@dataclass(frozen=True)
class _Add:
    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    cache_salt: str


@dataclass(frozen=True)
class _Abort:
    request_id: str


class _Shutdown:
    pass


_StreamItem: TypeAlias = StepOutput | EngineDeadError


@dataclass(frozen=True)
class _Stream:
    """Where one request's outputs go: a queue that belongs to an event loop."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[_StreamItem]


class AsyncEngine:
    """Run an Engine on a thread and hand its outputs to asyncio.

    Only that thread touches the engine, its requests and their caches. It never waits for a consumer:
    outputs go to unbounded queues, with one wake-up of the event loop per step.

    Args:
        engine: Belongs to this object from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Shutdown] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._unseen: set[str] = set()  # ids of the requests that lie in the inbox
        self._death: EngineDeadError | None = None
        # A daemon, so that a process that forgets shutdown() can still end.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine thread.

        Raises:
            RuntimeError: It was started before.
        """
        self._thread.start()

    def shutdown(self) -> None:
        """End the engine after the current step and wait; unfinished requests get EngineDeadError."""
        if self._thread.is_alive():
            self._inbox.put(_Shutdown())
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Tell whether requests are being worked on."""
        return self._death is None and self._thread.is_alive()

    @property
    def vocab_size(self) -> int:
        """The token ids that the model takes are below this."""
        return self._engine.vocab_size

    @property
    def num_waiting(self) -> int:
        """Count the requests that have not been started, those included that the engine has not seen yet."""
        return len(self._unseen) + len(self._engine.scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Count the requests that hold a cache."""
        return len(self._engine.scheduler.running)

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        request_id: str,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate one answer or several; stopping early, by aclose() or cancellation, aborts the request.

        Args:
            prompt_token_ids: 1 to max_model_len - 1 tokens of the model's vocabulary.
            sampling_params: What is asked of the sampler and of the stop conditions.
            request_id: One that no earlier request had.
            cache_salt: Only requests with the same one share parts of their prompts' caches.

        Yields:
            What each step adds to a choice, the last of each choice with a finish reason.

        Raises:
            ValueError: The prompt is not what it must be, or the id is in use.
            RequestFailedError: This request could not be finished; others go on.
            EngineDeadError: The engine has ended.
        """
        self._engine.check_prompt(prompt_token_ids)
        if request_id in self._streams:
            raise ValueError(f"request id {request_id!r} is in use")
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        num_unfinished = sampling_params.n
        self._streams[request_id] = stream
        try:
            # Looked at after the stream is listed: a death from here on reaches the stream.
            if self._death is not None:
                raise EngineDeadError(str(self._death))
            self._unseen.add(request_id)
            self._inbox.put(_Add(request_id, prompt_token_ids, sampling_params, cache_salt))
            while num_unfinished:
                item = await stream.items.get()
                if not isinstance(item, RequestOutput):
                    num_unfinished = 0  # the engine has ended the other choices too
                    raise item
                num_unfinished -= item.finish_reason is not None
                yield item
        finally:
            del self._streams[request_id]
            if num_unfinished:
                self._inbox.put(_Abort(request_id))

    def _run(self) -> None:
        """Work until shutdown or an error that belongs to no request. The engine thread's only function."""
        message = "The engine has been shut down."
        try:
            while self._receive():
                self._deliver(self._engine.step())
        except BaseException:
            logger.critical("the engine died", exc_info=True)
            message = "The engine died of an error; the server's log has the details."
        finally:
            self._death = EngineDeadError(message)
            self._unseen.clear()
            self._engine.scheduler.waiting.clear()
            self._engine.scheduler.running.clear()
            self._send([(stream, EngineDeadError(message)) for stream in list(self._streams.values())])

    def _receive(self) -> bool:
        """Take in all that arrived, waiting while there is nothing to do; False says shut down."""
        while True:
            try:
                message = self._inbox.get(block=not self._engine.has_unfinished_requests)
            except queue.Empty:
                return True
            if isinstance(message, _Shutdown):
                return False
            if isinstance(message, _Abort):
                self._engine.abort_request(message.request_id)
            else:
                self._unseen.discard(message.request_id)
                self._engine.add_request(
                    message.request_id,
                    message.prompt_token_ids,
                    message.sampling_params,
                    message.cache_salt,
                )

    def _deliver(self, outputs: list[StepOutput]) -> None:
        streams = [(self._streams.get(output.request_id), output) for output in outputs]
        self._send([(stream, output) for stream, output in streams if stream is not None])

    @staticmethod
    def _send(items: list[tuple[_Stream, _StreamItem]]) -> None:
        """Put items in their streams' queues, waking each event loop once."""
        items_of_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, _StreamItem]]] = defaultdict(list)
        for stream, item in items:
            items_of_loop[stream.loop].append((stream, item))

        def put(loop_items: list[tuple[_Stream, _StreamItem]]) -> None:
            for stream, item in loop_items:
                stream.items.put_nowait(item)

        for loop, loop_items in items_of_loop.items():
            try:
                loop.call_soon_threadsafe(put, loop_items)
            except RuntimeError:
                logger.warning("an event loop was closed with %d requests in flight", len(loop_items))
