"""Two hundred clients that leave at random moments leave no block, request, task or socket behind."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from transformers import AutoModelForCausalLM

from turboquant_server.engine.async_engine import AsyncEngine
from turboquant_server.metrics import Metrics

if TYPE_CHECKING:
    from conftest import RunningServer
    from transformers import PreTrainedTokenizerFast

NUM_CLIENTS = 200
NUM_ALONE = 40  # the others come in a crowd, where most leave the queue
CROWD = 16
TIMEOUT = 60
WORDS = ("harbour", "light", "ship", "tide", "anchor")
PROMPT = "The harbour"


@dataclass(frozen=True)
class Visit:
    """What a client asks and when it leaves.

    Attributes:
        path: Of the endpoint.
        body: Of the request.
        share: How much of the request it sends.
        num_events: It waits for so many events of the stream.
        seconds: It waits so long before, or after.
        resets: It leaves with a reset, not with an end of file.
    """

    path: str
    body: dict[str, Any]
    share: float
    num_events: int
    seconds: float
    resets: bool


def random_visit(draw: random.Random) -> Visit:
    text = " ".join(draw.choices(WORDS, k=draw.choice([1, 500])))
    chat = draw.random() < 0.5
    stream = draw.random() < 0.7
    body = {
        **({"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}),
        "stream": stream,
        "max_tokens": 400,
        "ignore_eos": True,
        "n": draw.choice([1, 1, 1, 2, 5]),
        "seed": draw.randrange(100),
    }
    return Visit(
        path="/v1/chat/completions" if chat else "/v1/completions",
        body=body,
        share=draw.choice([0.3, 0.99] + [1.0] * 10),
        num_events=draw.choice([0, 0, 0, 1, 2, 5]) if stream else 0,
        seconds=draw.uniform(0, 0.15),
        resets=draw.random() < 0.5,
    )


async def pay(visit: Visit, port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(visit.body).encode()
    head = f"POST {visit.path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    writer.write(request[: int(visit.share * len(request))])
    await writer.drain()
    if visit.share == 1.0:
        for _ in range(visit.num_events):
            await reader.readuntil(b"\n\n")
    await asyncio.sleep(visit.seconds)
    if visit.resets:
        writer.transport.abort()
    else:
        writer.close()
    await asyncio.wait((asyncio.ensure_future(writer.wait_closed()),))


async def pay_all(visits: list[Visit], at_a_time: int, port: int) -> None:
    places = asyncio.Semaphore(at_a_time)

    async def come_in(visit: Visit) -> None:
        async with places:
            await asyncio.wait_for(pay(visit, port), TIMEOUT)

    await asyncio.gather(*(come_in(visit) for visit in visits))


def num_sockets() -> int:
    """Count the sockets of this process, which is the server's, too."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:  # the descriptor of the listing itself
            continue
    return count


def test_clients_that_leave_at_any_moment_leave_nothing_behind(
    running_server: Callable[..., AbstractContextManager[RunningServer]],
    save_model: Callable[..., Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    phases: Counter[str] = Counter()
    loops: set[asyncio.AbstractEventLoop] = set()
    left, generate = Metrics.left, AsyncEngine.generate

    def noting_phase(metrics: Metrics, request_id: str, failure: Exception | None) -> None:
        record = metrics._records[request_id]
        phase = "queue" if record.start is None else "prefill" if record.first_token is None else "decode"
        phases[phase if record.num_unfinished else "end"] += 1
        left(metrics, request_id, failure)

    def noting_loop(engine: AsyncEngine, *arguments: Any) -> Any:
        loops.add(asyncio.get_running_loop())
        return generate(engine, *arguments)

    monkeypatch.setattr(Metrics, "left", noting_phase)
    monkeypatch.setattr(AsyncEngine, "generate", noting_loop)
    path = save_model("llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    inputs = tiny_tokenizer(PROMPT, return_tensors="pt")
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    expected = whole[0, inputs["input_ids"].shape[1] :].tolist()
    options = {"max_num_seqs": 6, "max_num_batched_tokens": 1024}
    with (
        running_server(path, **options) as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT) as http,
    ):

        def answer() -> Any:
            body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20, "return_token_ids": True}
            return http.post("/v1/completions", json=body).json()["choices"][0]["token_ids"]

        def held() -> tuple[int, int]:
            [loop] = loops
            return len(asyncio.all_tasks(loop)), num_sockets()

        assert answer() == expected
        http.post("/v1/completions", json={"prompt": PROMPT, "stream": True})  # a task stays that all share
        time.sleep(0.3)
        at_rest = held()
        draw = random.Random(0)
        visits = [random_visit(draw) for _ in range(NUM_CLIENTS)]
        port = httpx.URL(server.url).port or 0
        asyncio.run(pay_all(visits[:NUM_ALONE], 1, port))
        asyncio.run(pay_all(visits[NUM_ALONE:], CROWD, port))
        assert min(phases[phase] for phase in ("queue", "prefill", "decode")) > 0
        assert server.wait_until_idle() < 5
        assert answer() == expected
        deadline = time.monotonic() + 5
        while any(now > then for now, then in zip(held(), at_rest, strict=True)):
            assert time.monotonic() < deadline, f"{held()} tasks and sockets, and {at_rest} before"
            time.sleep(0.01)  # connections close a little later than their requests end
        assert not server.model_manager.engine._streams
        assert not server.model_manager.metrics._records
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
