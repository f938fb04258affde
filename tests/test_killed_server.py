"""A server that is killed under load: its clients are told at once, and the next one starts where it was."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import ServerProcess, started_server

NUM_STREAMS, MAX_NUM_SEQS = 8, 4  # the others wait
TOLD_SECONDS = 5
QUESTION = {
    "messages": [
        {"role": "user", "content": "The access code of Ada is 271828. What is the access code of Ada?"}
    ],
    "temperature": 0,
}
WAITING = re.compile(rf"num_requests_waiting{{.*}} {NUM_STREAMS - MAX_NUM_SEQS}\.0$", re.MULTILINE)
CACHES = ("XDG_CACHE_HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def ask(server: ServerProcess) -> Any:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=QUESTION, timeout=60).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]


async def stream(url: str, starts: list[float]) -> float:
    """Read a long stream until the connection breaks, and return when that was."""
    body = {"prompt": "The harbour", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with pytest.raises(httpx.TransportError):
        async with (
            httpx.AsyncClient(timeout=60) as http,
            http.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            starts.append(time.monotonic())
            async for _ in response.aiter_lines():
                pass
    return time.monotonic()


async def kill_under_load(server: ServerProcess) -> None:
    starts: list[float] = []
    streams = [asyncio.create_task(stream(server.url, starts)) for _ in range(NUM_STREAMS)]
    async with httpx.AsyncClient() as http:
        while len(starts) < NUM_STREAMS or not WAITING.search((await http.get(f"{server.url}/metrics")).text):
            await asyncio.sleep(0.05)
    assert not any(task.done() for task in streams)
    server.process.kill()
    killed = time.monotonic()
    ends = await asyncio.gather(*streams)
    assert max(ends) - killed < TOLD_SECONDS


def test_a_killed_server_is_noticed_and_the_next_one_starts_where_it_was(tmp_path: Path) -> None:
    arguments = ("--port", str(free_port()), "--max-num-seqs", str(MAX_NUM_SEQS))
    variables = {name: str(tmp_path / name) for name in CACHES}
    with started_server(tmp_path, variables, arguments) as server:
        first = ask(server)
        assert first[0] == "271828"
        asyncio.run(kill_under_load(server))

    # And one that is killed while it loads.
    with pytest.raises(RuntimeError), started_server(tmp_path, variables, arguments, start_seconds=1):
        pass

    with started_server(tmp_path, variables, arguments) as server:
        assert ask(server) == first  # nothing was found in the cache, as at first
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'finished_reason="abort",model_name="turboquant-demo"} 0.0' in metrics
        assert server.stop() == 0
        assert " ERROR " not in server.log.read_text()
