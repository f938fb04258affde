"""Hold an engine's steps back, so that a test sees requests wait, run and end one step at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

TIMEOUT = 20


class HeldSteps:
    """Steps of an engine, each of which waits before its end until the test lets it go."""

    def __init__(self) -> None:
        self._steps = threading.Semaphore(0)
        self._reached = threading.Semaphore(0)

    def wait_for_step(self) -> None:
        """Wait until a step has computed its tokens and is held."""
        assert self._reached.acquire(timeout=TIMEOUT)

    def let_go(self, count: int = 10**6) -> None:
        """Let steps end, by default all."""
        self._steps.release(count)

    def reach(self) -> None:
        self._reached.release()
        assert self._steps.acquire(timeout=TIMEOUT)


@contextmanager
def held_steps(model_manager: Any) -> Iterator[HeldSteps]:
    """Hold the steps of the engine until the end of the ``with`` block."""
    held = HeldSteps()
    engine = model_manager.engine._engine
    step = engine.step

    def held_step() -> Any:
        outputs = step()
        held.reach()
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", held_step)
        try:
            yield held
        finally:
            held.let_go()
