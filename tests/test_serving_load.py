"""When the load generator's requests start, seen by an asked one that only waits, on a clock of its own."""

from __future__ import annotations

import asyncio
import math
import random
import selectors
import time
from collections.abc import Iterator
from itertools import pairwise
from statistics import mean

import pytest
from serving_client import Answer, ServerError
from serving_load import Load, arrival_times
from tqdm import tqdm


class InstantLoop(asyncio.SelectorEventLoop):
    """Waits for nothing: its clock goes on at once to the next time that is waited for."""

    def __init__(self) -> None:
        loop = self
        self.now = 0.0

        class InstantSelector(selectors.DefaultSelector):
            def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
                loop.now += timeout or 0
                return super().select(0)

        super().__init__(InstantSelector())

    def time(self) -> float:
        return self.now


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[InstantLoop]:
    loop = InstantLoop()
    monkeypatch.setattr(time, "perf_counter", loop.time)
    yield loop
    loop.close()


def start_times(loop: InstantLoop, load: Load, num_requests: int, seconds: float) -> list[float]:
    """Run a load against answers that take so many seconds; return when it asked for them."""
    asked: list[float] = []

    async def ask(prompt: str, max_tokens: int) -> Answer:
        asked.append(loop.time())
        await asyncio.sleep(seconds)
        if prompt == "1":
            raise ServerError("refused")
        return Answer(max_tokens, asked[-1])

    with tqdm(disable=True) as bar:
        requests = [(str(request), 1) for request in range(num_requests)]
        loop.run_until_complete(load.run(ask, requests, bar))
    return asked


def test_arrivals_are_a_poisson_process() -> None:
    times = arrival_times(random.Random(0), 8.0, 20_000)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] == 0 and min(gaps) >= 0
    for gap in (0.05, 0.125, 0.3):  # of an exponential distribution
        assert mean(g > gap for g in gaps) == pytest.approx(math.exp(-8 * gap), abs=0.015)
    assert (
        times == arrival_times(random.Random(0), 8.0, 20_000) != arrival_times(random.Random(1), 8.0, 20_000)
    )


@pytest.mark.parametrize("num_requests", [2, 10, 1000])
def test_arrivals_have_just_the_rate(num_requests: int) -> None:
    times = arrival_times(random.Random(0), 8.0, num_requests)
    assert len(times) == num_requests and times[-1] == pytest.approx((num_requests - 1) / 8)
    assert arrival_times(random.Random(0), 8.0, 1) == [0]


def test_an_open_loop_starts_requests_at_their_times_and_waits_for_the_last_end(loop: InstantLoop) -> None:
    times = arrival_times(random.Random(0), 100.0, 30)
    load = Load(request_rate=100.0, start_times=times)
    assert start_times(loop, load, 30, 0.2) == pytest.approx(times, abs=1e-6)
    assert load.duration == pytest.approx(times[-1] + 0.2)
    assert len(load.answers) == 29 and load.failures == {"refused": 1}


def test_a_closed_loop_starts_a_request_when_another_ends(loop: InstantLoop) -> None:
    load = Load(concurrency=2)
    assert start_times(loop, load, 6, 0.05) == pytest.approx([0, 0, 0.05, 0.05, 0.1, 0.1], abs=1e-6)
    assert len(load.answers) == 5 and load.failures == {"refused": 1}
