"""The run of a soak: clients come and go, the server is stopped and goes on, and what came of it is noted.

Knows nothing of how it is judged.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from server_process import ServerProcess
from soak_client import Outcome, pay
from soak_requests import Visit, VisitMaker
from tqdm import tqdm

PAUSE_SECONDS = 5.0
BETWEEN_PAUSES = (5.0, 60.0)
REST_SECONDS = 60.0  # within which all must be given back
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_bytes_compressed")


@dataclass
class Soak:
    """What happens while a soak runs.

    Attributes:
        visits: What the clients ask.
        server: None if it is somebody else's.
        known: The answers of the probes, asked alone.
        outcomes: How many visits of a kind came to what.
        problems: What went wrong.
        memory: Resident bytes of the server, once a second.
        num_pauses: How often the server was stopped.
    """

    visits: VisitMaker
    server: ServerProcess | None
    known: list[tuple[str, ...]] = field(default_factory=list)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    num_pauses: int = 0

    async def ask_probes(self, http: httpx.AsyncClient) -> list[tuple[str, ...]]:
        """Return the probes' answers, one asked after the other."""
        outcomes = [
            await pay(self.visits.probe_visit(number), http) for number in range(len(self.visits.probes))
        ]
        self.problems += [outcome.problem for outcome in outcomes if outcome.problem]
        return [outcome.texts for outcome in outcomes]

    def note(self, visit: Visit, outcome: Outcome) -> None:
        """Count a visit, and compare its answer with the one that is known."""
        kind, problem = outcome.kind, outcome.problem
        if kind == "answered" and visit.probe is not None and outcome.texts != self.known[visit.probe]:
            kind = "wrong"
            problem = f"{outcome.texts} in place of {self.known[visit.probe]} for {visit.body.decode()}"
        self.outcomes[visit.kind, kind] += 1
        if problem:
            self.problems.append(problem)

    async def run(self, url: str, seconds: float, num_clients: int, seed: int) -> None:
        """Let the clients come and go for so long, and wait until the last has its answer."""
        ended = asyncio.Event()

        async def come_again(number: int) -> None:
            draw = random.Random(f"{seed} client {number}")
            async with httpx.AsyncClient(base_url=url, timeout=None) as http:
                while not ended.is_set():
                    visit = self.visits.visit(draw)
                    outcome = await pay(visit, http)
                    self.note(visit, outcome)
                    await asyncio.sleep(draw.uniform(0, 2 if outcome.kind == "limited" else 0.2))

        others = [asyncio.create_task(self._show_progress(seconds))]
        if self.server:
            others.append(asyncio.create_task(self._stop_and_go(random.Random(f"{seed} pauses"))))
        clients = asyncio.gather(*(come_again(number) for number in range(num_clients)))
        await asyncio.wait([clients], timeout=seconds)
        for task in others:
            task.cancel()
        await asyncio.wait(others)
        ended.set()
        await clients

    async def _stop_and_go(self, draw: random.Random) -> None:
        assert self.server is not None
        while True:
            await asyncio.sleep(draw.uniform(*BETWEEN_PAUSES))
            self.num_pauses += 1
            self.server.process.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(PAUSE_SECONDS)
            finally:
                self.server.process.send_signal(signal.SIGCONT)

    async def _show_progress(self, seconds: float) -> None:
        started = time.monotonic()
        with tqdm(total=round(seconds), unit="s") as bar:
            while True:
                await asyncio.sleep(1)
                if self.server:
                    self.memory.append(resident_bytes(self.server))
                told = {"requests": self.outcomes.total(), "problems": len(self.problems)}
                if self.memory:
                    told["MiB"] = self.memory[-1] >> 20
                bar.set_postfix(told)
                bar.update(min(round(time.monotonic() - started), bar.total) - bar.n)


def resident_bytes(server: ServerProcess) -> int:
    """Return how much memory a server's process has."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def num_descriptors(server: ServerProcess | None) -> int:
    """Return how many files and sockets a server has open; 0 where that is not known."""
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) if server else 0


async def read_metrics(http: httpx.AsyncClient) -> Counter[str]:
    """Return the server's metrics by their names, of whichever engines."""
    metrics: Counter[str] = Counter()
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            metrics[sample.name.partition(":")[2]] += sample.value
    return metrics


async def wait_for_rest(
    url: str, server: ServerProcess | None, at_most: int | None = None
) -> tuple[Counter[str], int]:
    """Return metrics and the number of open files as soon as nothing is held, or when the time is over.

    Args:
        url: Of the server.
        server: Its process, if it is ours.
        at_most: So many files may be open; None allows any number.
    """
    deadline = time.monotonic() + REST_SECONDS
    while True:
        async with httpx.AsyncClient(base_url=url, timeout=None) as http:
            metrics = await read_metrics(http)
        await asyncio.sleep(0.5)  # for the server to see that this connection is closed
        num_open = num_descriptors(server)
        is_held = any(metrics[name] for name in GAUGES) or (at_most is not None and num_open > at_most)
        if not is_held or time.monotonic() > deadline:
            return metrics, num_open
