"""ServedModel: one model of a server, who uses it and who waits for it; and how it is loaded on a thread."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turboquant_server.api.prompts import PromptTokenizer
    from turboquant_server.model_manager import ModelManager

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class ServedModel:
    """One model and who uses it.

    Attributes:
        manager: Loads and unloads it.
        prompt_tokenizer: Of its prompts.
        num_users: Requests that are prepared for its engine, or wait for all of their answer.
        waiting: Requests that wait for it.
        last_used: When it was last seen at work, in seconds of time.monotonic().
        failure: Why it could not be loaded, and when.
        is_leaving: It takes no more users, because it is about to be unloaded.
    """

    manager: ModelManager
    prompt_tokenizer: PromptTokenizer
    num_users: int = 0
    waiting: list[asyncio.Future[None]] = field(default_factory=list)
    last_used: float = field(default_factory=time.monotonic)
    failure: tuple[str, float] | None = None
    is_leaving: bool = False

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.manager.model_names[0]

    @property
    def is_at_rest(self) -> bool:
        """Tell whether it may go: clients that have not read all of their streams do not need it any more."""
        if self.num_users:
            return False
        engine = self.manager.engine if self.manager.is_ready else None
        # In the order in which requests go from one to the other, on the engine's thread.
        return engine is None or not (engine.is_alive and (engine.num_waiting or engine.num_running))

    def refuse(self, error: Exception) -> None:
        """End the waiting of all who wait."""
        for place in self.waiting:
            if not place.done():
                place.set_exception(error)
        self.waiting.clear()


def try_to_load(manager: ModelManager) -> str | None:
    """Load a model; return why that failed, in one sentence, or None if it did not."""
    # Here, because they import torch, for which the application has no use.
    from turboquant_server.load_error import ModelLoadError
    from turboquant_server.memory import free_memory

    try:
        manager.load()
        return None
    except ModelLoadError as error:
        failure = str(error)
    except Exception as error:
        logger.exception("loading failed")
        failure = f"loading the model failed with {type(error).__name__}; the log above has the details"
    free_memory()  # which the errors' tracebacks held
    return failure


async def on_thread(function: Callable[[], str | None]) -> str | None:
    """Run a function on a thread of its own, which does not keep a process that ends."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[str | None] = loop.create_future()

    def tell(result: str | None, error: BaseException | None) -> None:
        if not done.done():
            done.set_exception(error) if error is not None else done.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # of a loop that has been closed meanwhile
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, name="model life", daemon=True).start()
    return await done
