"""Requests of a closed or an open loop, and what they gave. Knows when each starts, not how to ask."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from serving_client import Answer, Ask, ServerError
from tqdm import tqdm


def arrival_times(generator: random.Random, request_rate: float, num_requests: int) -> list[float]:
    """Return when the requests of a Poisson process start, in seconds after the first of them.

    They are stretched to have just the wished rate: that of a few dozen random gaps is often a fifth off.
    """
    gaps = [generator.expovariate(request_rate) for _ in range(num_requests - 1)]
    stretch = len(gaps) / request_rate / sum(gaps) if gaps else 1.0
    return list(accumulate((stretch * gap for gap in gaps), initial=0.0))


@dataclass
class Load:
    """What one row's requests gave so far.

    Attributes:
        concurrency: How many are under way at any time: a closed loop.
        start_times: When each starts, in seconds, whatever became of those before it: an open loop.
        request_rate: The mean behind `start_times`, per second.
        answers: Those that are complete.
        failures: How many requests failed, by why.
        duration: Seconds from the first request to the last end.
    """

    concurrency: int | None = None
    request_rate: float | None = None
    start_times: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    duration: float = 0.0

    async def run(self, ask: Ask, requests: Iterable[tuple[str, int]], bar: tqdm[Any]) -> None:
        """Send requests until there are no more or the task is cancelled."""
        remaining = iter(requests)

        async def send(prompt: str, max_tokens: int) -> None:
            try:
                self.answers.append(await ask(prompt, max_tokens))
            except ServerError as error:
                self.failures[str(error)] += 1
            bar.update()

        async def send_one_after_another() -> None:
            for request in remaining:
                await send(*request)

        async def send_at(second: float, request: tuple[str, int]) -> None:
            await asyncio.sleep(started + second - time.perf_counter())
            await send(*request)

        started = time.perf_counter()
        if self.concurrency is None:
            senders = [send_at(*start) for start in zip(self.start_times, remaining, strict=True)]
        else:
            senders = [send_one_after_another() for _ in range(self.concurrency)]
        try:
            await asyncio.gather(*senders)
        finally:
            self.duration = time.perf_counter() - started
