"""The models of a server by their names: loaded when a request comes for one, unloaded when told or idle.

A load has the process for itself: transformers changes torch's default type meanwhile, and a GPU's memory is
measured and its graphs are recorded then. So what was under way ends first, and what comes waits. All of this
is the event loop's, but for each load and unload, which has a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from turboquant_server.api.errors import ApiError, queue_full, shutting_down
from turboquant_server.api.models import model_not_found
from turboquant_server.api.prompts import PromptTokenizer
from turboquant_server.served_model import ServedModel, on_thread, try_to_load

if TYPE_CHECKING:
    from turboquant_server.engine.async_engine import AsyncEngine
    from turboquant_server.model_manager import ModelManager

ModelState = Literal["loaded", "loading", "unloaded", "failed"]

# Seconds for which requests are told why a load has failed, before one of them tries again: each try would
# unload another model.
FAILURE_SECONDS = 30
POLL_SECONDS = 0.02

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Change:
    """A load or an unload that waits for its turn; ``done`` if somebody has told the server to."""

    model: ServedModel
    loads: bool
    done: asyncio.Future[None] | None = None


class Models:
    """Give each request its model, and see to it that not too many are loaded.

    Args:
        managers: Of the models, the first of which is for requests that name none.
    """

    def __init__(self, managers: Sequence[ModelManager]) -> None:
        self._models = [ServedModel(manager, PromptTokenizer(manager)) for manager in managers]
        config = managers[0].config
        self._max_loaded = config.max_loaded_models
        self._idle_unload = config.idle_unload
        self._has_started = False
        self._changes: deque[_Change] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._is_loading = False  # or about to, as soon as nobody is at work

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def managers(self) -> list[ModelManager]:
        """Of all models."""
        return [model.manager for model in self._models]

    @property
    def has_started(self) -> bool:
        """Tell whether the models that are loaded at the start have been."""
        if not self._has_started:
            first = self.managers[: self._max_loaded]
            self._has_started = all(manager.is_ready for manager in first)
        return self._has_started

    @property
    def is_changing(self) -> bool:
        """Tell whether a thread may be loading."""
        return not self.has_started or bool(self._changes)

    def load_first(self) -> str | None:
        """Load as many models as there may be; to be called once, on any thread.

        Returns:
            Why that failed, in one sentence; None if it did not.
        """
        for manager in self.managers[: self._max_loaded]:
            if failure := try_to_load(manager):
                return failure
        return None

    def state(self, model: ServedModel) -> ModelState:
        """Tell whether a model is in memory; one that failed is tried again when a request or a key asks."""
        if model.manager.is_ready:
            return "loaded"
        if not self.has_started or self._will_load(model):
            return "loading"
        return "failed" if model.failure else "unloaded"

    def find(self, name: str | None) -> ServedModel:
        """Return the model of a name, or the first one.

        Raises:
            ApiError: There is none (404).
        """
        for model in self._models:
            if name is None or name in model.manager.model_names:
                return model
        raise model_not_found(name or "", [name for one in self._models for name in one.manager.model_names])

    def can_enter(self, model: ServedModel) -> bool:
        """Tell whether a request can have a model at once."""
        return model.manager.is_ready and not (model.is_leaving or self._is_loading)

    async def enter(self, model: ServedModel) -> None:
        """Wait until a model is loaded, and keep it so until `leave`: until its engine has got the request.

        Raises:
            ApiError: Too many wait already (429), or it could not be loaded (503).
        """
        if self.can_enter(model):
            model.num_users += 1
            return
        if model.failure is not None and not self._will_load(model):
            reason, failed = model.failure
            if time.monotonic() < failed + FAILURE_SECONDS:
                raise _load_failed(reason)
        limit = model.manager.config.max_num_queued_requests
        if limit is not None and len(model.waiting) >= limit:
            model.manager.metrics.refused()
            raise queue_full()
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        model.waiting.append(place)
        self._let_in()
        try:
            await place
        except asyncio.CancelledError:
            if place in model.waiting:
                model.waiting.remove(place)
            elif not place.cancelled() and place.exception() is None:
                self.leave(model)  # let in, and gone at the same moment
            raise

    def leave(self, model: ServedModel) -> None:
        """Tell that the engine has got a request, or that it is over."""
        model.num_users -= 1
        model.last_used = time.monotonic()

    async def load(self, model: ServedModel) -> None:
        """Load a model, if it is not loaded; a failure before counts for nothing.

        Raises:
            ApiError: It cannot be loaded (503).
        """
        await self._tell(model, loads=True)

    async def unload(self, model: ServedModel) -> None:
        """Unload a model when its users have left; the next request loads it again."""
        await self._tell(model, loads=False)

    def unload_idle(self) -> None:
        """Begin to unload each model that has been at rest for long enough; to be called often."""
        if self._idle_unload is None:
            return
        now = time.monotonic()
        for model in self._models:
            if not (self.has_started and self.can_enter(model) and model.is_at_rest):
                model.last_used = now
            elif now - model.last_used >= self._idle_unload and not self._changes:
                self._add(_Change(model, loads=False))

    def send_away(self) -> None:
        """End the waiting of all requests, and let no other load or unload begin, because the server ends."""
        for model in self._models:
            model.refuse(shutting_down())
        for change in self._changes:
            if change.done is not None and not change.done.done():
                change.done.set_exception(shutting_down())
        if self._worker is not None:
            self._worker.cancel()

    async def _tell(self, model: ServedModel, *, loads: bool) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._add(_Change(model, loads, done))
        await done

    def _add(self, change: _Change) -> None:
        self._changes.append(change)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())

    def _let_in(self) -> None:
        """Let in who waits for a model that is there, and see to it that the others are loaded."""
        for model in self._models:
            if self.can_enter(model):
                for place in model.waiting:
                    if not place.done():
                        place.set_result(None)
                        model.num_users += 1
                model.waiting.clear()
            elif model.waiting and not (model.manager.is_ready or self._will_load(model)):
                self._add(_Change(model, loads=True))

    def _will_load(self, model: ServedModel) -> bool:
        return any(change.model is model and change.loads for change in self._changes)

    async def _work(self) -> None:
        """Make one change after the other. Whoever waits for a model has it before the next begins."""
        while self._changes:
            change = self._changes[0]
            try:
                failure = await (self._load(change) if change.loads else self._unload(change))
            except Exception as error:  # such as of a GPU that is lost
                logger.exception("%s could not be unloaded", change.model.name)
                failure = f"unloading a model failed with {type(error).__name__}; the log has the details"
                change.model.refuse(_load_failed(failure))
            self._changes.popleft()
            if change.done is not None and not change.done.done():
                if failure is None:
                    change.done.set_result(None)
                else:
                    change.done.set_exception(_load_failed(failure))
            self._let_in()
        self._worker = None

    async def _load(self, change: _Change) -> str | None:
        """Load a model, unless it is loaded or nobody waits for it any more; return why it failed, if so."""
        model = change.model
        if model.manager.is_ready:
            return None
        self._is_loading = True
        staying: list[AsyncEngine] = []
        try:
            await _wait_for_rest(self._models)
            if change.done is None and not model.waiting:
                return None
            loaded = [one for one in self._models if one.manager.is_ready]
            loaded.sort(key=lambda one: one.last_used)
            for one in loaded[: max(0, len(loaded) + 1 - self._max_loaded)]:
                await self._unload(_Change(one, loads=False))
            staying += [one.manager.engine for one in self._models if one.manager.is_ready]
            for engine in staying:
                engine.pause_comparisons(True)
            while any(engine.is_computing for engine in staying):
                await asyncio.sleep(POLL_SECONDS)
            logger.info("loading %s", model.name)
            failure = await on_thread(lambda: try_to_load(model.manager))
        finally:
            self._is_loading = False
            for engine in staying:
                engine.pause_comparisons(False)
        model.last_used = time.monotonic()
        model.failure = None if failure is None else (failure, time.monotonic())
        if failure is None:
            logger.info("%s is loaded\n%s", model.name, model.manager.startup_report())
        else:
            logger.error("%s could not be loaded: %s", model.name, failure)
            model.refuse(_load_failed(failure))
        return failure

    async def _unload(self, change: _Change) -> None:
        model = change.model
        if not model.manager.is_ready:
            return
        model.is_leaving = True
        try:
            await _wait_for_rest([model])
            await on_thread(model.manager.unload)
        finally:
            model.is_leaving = False
        logger.info("%s is unloaded", model.name)


def _load_failed(reason: str) -> ApiError:
    return ApiError(
        503,
        f"The model could not be loaded: {reason}.",
        code="model_load_failed",
        # OpenAI's clients would try again at once.
        headers={"Retry-After": str(FAILURE_SECONDS), "x-should-retry": "false"},
    )


async def _wait_for_rest(models: Iterable[ServedModel]) -> None:
    while not all(model.is_at_rest for model in models):
        await asyncio.sleep(POLL_SECONDS)
