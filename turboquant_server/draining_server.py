"""uvicorn's server, with an end that takes its time: open requests finish, new ones are sent away."""

from __future__ import annotations

import math
import os
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from turboquant_server.api.door import Door
    from turboquant_server.model_life import Models

CUT_OFF_SECONDS = 5  # for the last words of what is cut off


class DrainingServer(uvicorn.Server):
    """Serve until a signal and until what was under way has finished.

    The first signal closes the door: the port stays open, and what comes is answered with 503. When nobody
    is inside any more, or the time is over, or after a second signal, the server ends; what is cut off gets
    an error of its own.

    Args:
        config: uvicorn's.
        door: Of the application.
        models: Their engines end the requests that are cut off.
        timeout: Seconds from the first signal to the cut.
    """

    def __init__(self, config: uvicorn.Config, door: Door, models: Models, timeout: float) -> None:
        super().__init__(config)
        self._door = door
        self._models = models
        self._timeout = timeout
        self._signal: int | None = None
        self._cut_time = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal; what is to be done is done by the next tick, outside the signal's handler."""
        if self._signal is None:
            self._signal = sig
            self._cut_time = time.monotonic() + self._timeout
            self._door.is_closing = True
        else:
            self._cut_time = 0.0

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether it is time to end, or to unload a model."""
        if self._signal is None:
            self._models.unload_idle()
        else:
            is_cut_off = time.monotonic() >= self._cut_time
            if is_cut_off:
                self._models.send_away()
                threading.Thread(target=self._cut_off, name="cut off", daemon=True).start()
            if is_cut_off or not self._door.num_inside:
                super().handle_exit(self._signal, None)
        return await super().on_tick(counter)

    def _cut_off(self) -> None:
        # Neither a step that hangs nor a client that does not read may keep the process.
        timer = threading.Timer(2 * CUT_OFF_SECONDS, _kill)
        timer.daemon = True
        timer.start()
        for manager in self._models.managers:
            with manager.leaving:
                engine = manager.engine if manager.is_ready else None
            if engine is not None:
                engine.shutdown(timeout=CUT_OFF_SECONDS / 2)


def _kill() -> None:
    os._exit(1)
