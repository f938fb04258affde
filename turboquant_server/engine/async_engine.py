"""The engine on its own thread, and asyncio's way to it. Nothing else here knows of threads."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakValueDictionary

from turboquant_server.engine.engine import Engine, StepOutput
from turboquant_server.engine.followers import Followers
from turboquant_server.engine.messages import Abort, Add, Pause, Step, dump, state_of
from turboquant_server.engine.observer import Observer
from turboquant_server.engine.request import (
    EngineDeadError,
    Request,
    RequestOutput,
    RequestStatus,
    RequestTimeoutError,
)
from turboquant_server.engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

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
        observer: Hears what becomes of requests.
        request_timeout: Most seconds that a request takes, from its place in the queue on.
        followers: Processes whose engines take the same steps.
    """

    def __init__(
        self,
        engine: Engine,
        observer: Observer | None = None,
        request_timeout: float | None = None,
        followers: Followers | None = None,
    ) -> None:
        self._engine = engine
        self._followers = followers
        if followers is not None:
            followers.on_failure = lambda: self._die("A part of the model is lost; the server ends.")
        self._observer = observer or Observer()
        self._request_timeout = request_timeout
        # Those that nobody has asked for an output yet; whoever drops one before has to tell nobody.
        self._created: WeakValueDictionary[str, AsyncGenerator[RequestOutput, None]] = WeakValueDictionary()
        self._unstarted: deque[Request] = deque()  # of the engine thread
        self._step_began = time.monotonic()
        self._inbox: queue.SimpleQueue[Add | Abort | Pause | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._unseen: set[str] = set()  # what lies in the inbox
        self._death: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)  # or a process stays

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def follow(self, steps: Iterable[Step]) -> None:
        """Take, on this thread and in place of `start`, the steps of another rank's engine."""
        for step in steps:
            step.apply(self._engine)
            self._engine.step()

    def shutdown(self, timeout: float | None = None) -> None:
        """End the engine after the current step, or give that up; unfinished requests get EngineDeadError."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join(timeout)
            self._die("The engine has been shut down.")  # in case the step hangs

    @property
    def is_alive(self) -> bool:
        """Tell whether it takes requests."""
        return self._death is None and self._thread.is_alive()

    @property
    def is_computing(self) -> bool:
        """Tell whether there are requests, or answers to be compared, for which nobody waits."""
        return self.is_alive and self._engine.has_work

    def pause_comparisons(self, is_paused: bool) -> None:
        """Let answers that wait to be compared wait, after the slice that is under way, or go on."""
        self._inbox.put(Pause(is_paused))

    @property
    def vocab_size(self) -> int:
        """The token ids that the model takes are below this."""
        return self._engine.vocab_size

    @property
    def num_waiting(self) -> int:
        """Count the requests that have not been started, those included that the engine has not seen yet."""
        return len(self._created) + len(self._unseen) + len(self._engine.scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Count the requests that hold a cache."""
        return len(self._engine.scheduler.running)

    def count_queued(self, num_slots: int) -> int:
        """Count the requests that wait for others to end, of which `num_slots` may run at a time.

        Those that the engine has not seen yet will not wait if there are slots and nobody is before them.
        """
        num_waiting = len(self._engine.scheduler.waiting)
        num_free = 0 if num_waiting else num_slots - self.num_running
        return num_waiting + max(0, len(self._created) + len(self._unseen) - num_free)

    @property
    def running(self) -> list[Request]:
        """The requests that hold a cache, each choice on its own; the engine goes on changing them."""
        return list(self._engine.scheduler.running)

    @property
    def num_preemptions(self) -> int:
        """Count how often a request has given its cache back unfinished."""
        return self._engine.scheduler.num_preemptions

    @property
    def seconds_in_step(self) -> float:
        """Tell how long ago the current step began; 0 while there is nothing to do."""
        return time.monotonic() - self._step_began if self._has_work else 0.0

    def generate(
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
        outputs = self._generate(prompt_token_ids, sampling_params, request_id, cache_salt)
        self._created[request_id] = outputs
        return outputs

    async def _generate(
        self, prompt_token_ids: list[int], sampling_params: SamplingParams, request_id: str, cache_salt: str
    ) -> AsyncGenerator[RequestOutput, None]:
        self._created.pop(request_id, None)
        self._engine.check_prompt(prompt_token_ids)
        if request_id in self._streams:
            raise ValueError(f"request id {request_id!r} is in use")
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        num_unfinished = sampling_params.n
        failure: Exception | None = None
        timer = self._start_timer(request_id, stream)
        self._streams[request_id] = stream
        self._observer.arrived(request_id, sampling_params)
        try:
            # Looked at after the stream is listed: a death from here on reaches the stream.
            if self._death is not None:
                failure = EngineDeadError(str(self._death))
                raise failure
            if not self._has_work:
                self._step_began = time.monotonic()
            self._unseen.add(request_id)
            self._inbox.put(Add(request_id, prompt_token_ids, sampling_params, cache_salt))
            while num_unfinished:
                item = await stream.items.get()
                if not isinstance(item, RequestOutput):
                    failure = item
                    num_unfinished = 0  # the engine has ended the other choices too, or been told to
                    raise item
                num_unfinished -= item.finish_reason is not None
                yield item
        finally:
            del self._streams[request_id]
            if num_unfinished:
                self._inbox.put(Abort(request_id))
            if timer is not None:
                timer.cancel()
            self._observer.left(request_id, failure)

    @property
    def _has_work(self) -> bool:
        return bool(self._unseen) or self._engine.has_unfinished_requests

    def _start_timer(self, request_id: str, stream: _Stream) -> asyncio.TimerHandle | None:
        """End a request, be its outputs read or not, when its time is over."""
        seconds = self._request_timeout
        if seconds is None:
            return None

        def end() -> None:
            message = f"The answer was not finished within the {seconds:g} seconds that it may take."
            stream.items.put_nowait(RequestTimeoutError(request_id, message))
            self._inbox.put(Abort(request_id))

        return stream.loop.call_later(seconds, end)

    def _run(self) -> None:
        """Work until shutdown or an error that belongs to no request. The engine thread's only function."""
        message = "The engine has been shut down."
        try:
            while self._receive():
                self._step_began = time.monotonic()
                outputs = self._engine.step()
                self._tell_started()
                streams = [(self._streams.get(output.request_id), output) for output in outputs]
                self._send([(stream, output) for stream, output in streams if stream is not None])
        except BaseException:
            logger.critical("the engine died", exc_info=True)
            message = "The engine died of an error; the server's log has the details."
            if self._followers is not None:  # they may wait for this step for ever
                self._followers.fail()
        finally:
            self._engine.scheduler.waiting.clear()
            self._engine.scheduler.running.clear()
            self._unseen.clear()
            self._die(message)  # last: who learns of it finds nothing left

    def _die(self, message: str) -> None:
        """Tell all who wait that there will be nothing more; on any thread."""
        self._death = EngineDeadError(message)
        self._send([(stream, EngineDeadError(message)) for stream in list(self._streams.values())])

    def _receive(self) -> bool:
        """Take in all that arrived, waiting while there is nothing to do; False says shut down."""
        messages: list[Add | Abort | Pause] = []
        while True:
            try:
                message = self._inbox.get(block=not self._engine.has_work)
            except queue.Empty:
                break
            if message is None:
                return False
            messages.append(message)
            message.apply(self._engine)
            if isinstance(message, Add):
                self._unseen.discard(message.request_id)  # not before it waits, so that it always counts
                self._unstarted.append(self._engine.scheduler.waiting[-1])
        if self._followers is not None:
            self._followers.send(dump(Step(messages, state_of(self._engine))))
        return True

    def _tell_started(self) -> None:
        """Tell the observer which requests this step was the first for; they start in their order."""
        while self._unstarted:
            request = self._unstarted[0]
            if request.num_cached_tokens is not None:
                self._observer.started(request.request_id, self._step_began)
            elif request.status is not RequestStatus.FINISHED:
                return
            self._unstarted.popleft()

    def _send(self, items: list[tuple[_Stream, _StreamItem]]) -> None:
        """Put items in their streams' queues, waking each event loop once."""
        items_of_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, _StreamItem]]] = defaultdict(list)
        for stream, item in items:
            items_of_loop[stream.loop].append((stream, item))

        def put(loop_items: list[tuple[_Stream, _StreamItem]]) -> None:
            for stream, item in loop_items:
                stream.items.put_nowait(item)
            self._observer.stepped([item for _, item in loop_items if not isinstance(item, EngineDeadError)])

        for loop, loop_items in items_of_loop.items():
            try:
                loop.call_soon_threadsafe(put, loop_items)
            except RuntimeError:
                logger.warning("an event loop was closed with %d requests in flight", len(loop_items))
