"""What the server costs beside the model: chunks per second of many streams, and one request's added latency.

    python scripts/benchmark_overhead.py
    python scripts/benchmark_overhead.py --streams 16 --max-tokens 512

The bundled model is served by a process of its own, with a model runner that returns at once and always the
same token; scheduler, cache, detokenizer, API and HTTP are the server's. This process counts the chunks that
arrive, as cheaply as it can. The engine's own latency is measured in the other process, by asking the engine
itself. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from aligned_table import format_table

TOKEN = 300  # any that is a piece of plain text
HOST = "127.0.0.1"
START_SECONDS = 120
SUBJECTS: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "Describe the harbour."}]},
    "completions": {"prompt": "The harbour"},
}


def serve(pipe: Connection, max_num_seqs: int, num_requests: int) -> None:
    """Send the port and the engine's own latency in seconds, and serve until the process is ended."""
    import torch
    import uvicorn

    from turboquant_server.app import build_app
    from turboquant_server.cli import SWITCH_INTERVAL
    from turboquant_server.config import ServerConfig
    from turboquant_server.engine.model_runner import ModelRunner
    from turboquant_server.engine.pending_step import PendingStep
    from turboquant_server.engine.sampling_params import SamplingParams
    from turboquant_server.engine.scheduler import ScheduledBatch
    from turboquant_server.model_manager import ModelManager

    def launch_at_once(runner: ModelRunner, batch: ScheduledBatch) -> PendingStep:
        results, num_tokens = [], 0
        for item in (*batch.prefills, *batch.decodes):
            first, num_tokens = num_tokens, num_tokens + len(item.choices)
            results.append((item, range(first, num_tokens)))
        return PendingStep(results, torch.full((num_tokens,), TOKEN))

    torch.set_num_threads(1)
    manager = ModelManager(
        ServerConfig(model=None, device="cpu", max_num_seqs=max_num_seqs, kv_cache_memory=2**29)
    )
    manager.load()
    ModelRunner.launch = launch_at_once  # type: ignore[method-assign]

    async def ask_engine() -> float:
        seconds = []
        for index in range(num_requests):
            started = time.perf_counter()
            async for _ in manager.engine.generate([TOKEN] * 20, SamplingParams(max_tokens=1), str(index)):
                pass
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    sys.setswitchinterval(SWITCH_INTERVAL)
    latency = asyncio.run(ask_engine())
    with socket.create_server((HOST, 0), backlog=1024) as listener:
        pipe.send((listener.getsockname()[1], latency))
        server = uvicorn.Server(
            uvicorn.Config(build_app(manager), log_config=None, access_log=False, lifespan="off")
        )
        server.run(sockets=[listener])


def as_request(endpoint: str, **fields: Any) -> bytes:
    """Return an HTTP request as it goes over the wire."""
    body = json.dumps({**SUBJECTS[endpoint], "ignore_eos": True, **fields}).encode()
    head = f"POST /v1/{endpoint} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class ChunkCounter(asyncio.Protocol):
    """Send a request and count the events of the answer, without looking at anything else.

    Args:
        request: As it goes over the wire.

    Attributes:
        num_events: So many have begun, the one that says that it was the last included.
        done: The whole answer is there.
    """

    EVENT = b"\ndata: "
    END = b"\r\n0\r\n\r\n"

    def __init__(self, request: bytes) -> None:
        self.num_events = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count the events in what has come."""
        # With what may be the beginning of one, too short to be one that was counted.
        data = self._tail + data
        self.num_events += data.count(self.EVENT)
        self._tail = data[1 - len(self.EVENT) :]
        if data.endswith(self.END):
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell whoever waits that the end will not come."""
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed a stream before its end"))


async def count_tokens(port: int, request: bytes, num_streams: int, max_tokens: int) -> float:
    """Return how many tokens per second come from so many streams at once, each in a chunk of its own.

    Raises:
        ConnectionError: Streams were refused, or had fewer chunks than tokens.
    """
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    pairs = await asyncio.gather(
        *(loop.create_connection(lambda: ChunkCounter(request), HOST, port) for _ in range(num_streams))
    )
    counters = [counter for _, counter in pairs]
    await asyncio.gather(*(counter.done for counter in counters))
    seconds = time.perf_counter() - started
    for transport, _ in pairs:
        transport.close()
    if any(counter.num_events < max_tokens for counter in counters):
        raise ConnectionError("a stream had fewer chunks than tokens")
    return num_streams * max_tokens / seconds


def measure_latency(port: int, request: bytes, num_requests: int) -> float:
    """Return the median of the seconds that one request takes, one after another on one connection."""
    seconds = []
    with socket.create_connection((HOST, port)) as connection:
        for _ in range(num_requests):
            started = time.perf_counter()
            connection.sendall(request)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            seconds.append(time.perf_counter() - started)
        assert b" 200 OK" in answer, answer
    return statistics.median(seconds)


def measure(args: argparse.Namespace, port: int, endpoint: str, engine_latency: float) -> dict[str, Any]:
    """Return the figures of one endpoint."""
    stream = as_request(endpoint, stream=True, max_tokens=args.max_tokens)
    rates = [
        asyncio.run(count_tokens(port, stream, args.streams, args.max_tokens)) for _ in range(args.repeats)
    ]
    request = as_request(endpoint, max_tokens=1)
    latency = statistics.median(measure_latency(port, request, args.requests) for _ in range(args.repeats))
    return {
        "endpoint": endpoint,
        "chunks_per_second": round(statistics.median(rates)),
        "worst": round(min(rates)),
        "best": round(max(rates)),
        "latency_ms": round(latency * 1e3, 3),
        "added_ms": round((latency - engine_latency) * 1e3, 3),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=64, help="streams at a time (default: 64)")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens of a stream (default: 256)")
    parser.add_argument("--requests", type=int, default=200, help="to measure the latency (default: 200)")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement (default: 5)")
    args = parser.parse_args(argv)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, args.streams, args.requests), daemon=True)
    server.start()
    try:
        if not ours.poll(START_SECONDS):
            raise SystemExit("the server did not start")
        port, engine_latency = ours.recv()
        rows = [measure(args, port, endpoint, engine_latency) for endpoint in SUBJECTS]
    finally:
        server.terminate()
        server.join()
    num_cores = len(os.sched_getaffinity(0))
    print(f"{num_cores} cores; {args.streams} streams of {args.max_tokens} tokens, {args.repeats} times")
    heading = ["endpoint", "chunks/s, median", "worst", "best", "latency, ms", "over the engine's, ms"]
    print(*format_table([heading, *([str(value) for value in row.values()] for row in rows)]), sep="\n")
    about = {"cores": num_cores, **vars(args), "engine_ms": round(engine_latency * 1e3, 3)}
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
