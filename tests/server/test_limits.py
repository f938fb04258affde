"""A full queue and a time that is over end a request with an error of its own, and touch no other."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from held_steps import HeldSteps, held_steps
from openai import OpenAI

pytestmark = pytest.mark.usefixtures("no_variables")

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "What is the access code?"}]
LONG = {"max_tokens": 1500, "ignore_eos": True}
TIMEOUT = 20
LIMIT = 2


@pytest.fixture(scope="module")
def full(running_server: Any, tiny_model_dir: Path) -> Iterator[Any]:
    """A server of one request at a time and a queue of two."""
    with running_server(tiny_model_dir, max_num_seqs=1, max_num_queued_requests=LIMIT) as server:
        yield server


class Clients:
    """Requests under way, each on a thread of its own."""

    def __init__(self, server: Any, pool: ThreadPoolExecutor) -> None:
        self.server = server
        self._pool = pool

    def post(self, **fields: Any) -> Future[httpx.Response]:
        """Send a completion of four tokens."""
        body = {"prompt": "The", "max_tokens": 4, "ignore_eos": True, **fields}
        return self._pool.submit(httpx.post, self.server.url + COMPLETIONS, json=body, timeout=TIMEOUT)

    def wait_until_queued(self, count: int) -> None:
        deadline = time.monotonic() + TIMEOUT
        while self.server.model_manager.num_queued != count:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def clients(full: Any) -> Iterator[Clients]:
    with ThreadPoolExecutor(40) as pool:
        yield Clients(full, pool)


@pytest.fixture
def held(full: Any) -> Iterator[HeldSteps]:
    with held_steps(full.model_manager) as held:
        yield held


def usage_of(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    tokens: int = response.json()["usage"]["completion_tokens"]
    return tokens


def rejections(server: Any) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    [line] = [line for line in text.splitlines() if line.startswith("turboquant:admission_rejections_total")]
    return float(line.rpartition(" ")[2])


def test_who_finds_the_queue_full_is_told_to_come_later_and_the_others_are_served(
    clients: Clients, full: Any, held: HeldSteps
) -> None:
    running = clients.post()
    held.wait_for_step()
    waiting = []
    for count in range(LIMIT):
        waiting.append(clients.post())
        clients.wait_until_queued(count + 1)
    before = rejections(full)
    refused = [
        httpx.post(full.url + CHAT, json={"messages": MESSAGES}),
        httpx.post(full.url + CHAT, json={"messages": MESSAGES, "stream": True}),
        httpx.post(full.url + COMPLETIONS, json={"prompt": "a"}),
        httpx.post(full.url + COMPLETIONS, json={"prompt": ["a", "b"], "stream": True}),
    ]
    for response in refused:
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert rejections(full) - before == len(refused)
    for path in ("/health", "/v1/models"):
        assert httpx.get(full.url + path).status_code == 200
    held.let_go()
    assert [usage_of(future.result()) for future in (running, *waiting)] == [4] * (1 + LIMIT)
    assert usage_of(clients.post().result()) == 4
    full.wait_until_idle()


def test_the_sdk_waits_as_long_as_it_is_told_and_comes_back(
    clients: Clients, full: Any, held: HeldSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        held.let_go()
        full.wait_until_idle()

    futures = [clients.post()]
    held.wait_for_step()
    futures += [clients.post() for _ in range(LIMIT)]
    clients.wait_until_queued(LIMIT)
    monkeypatch.setattr("openai._base_client.time", SimpleNamespace(**{**vars(time), "sleep": sleep}))
    with OpenAI(base_url=f"{full.url}/v1", api_key="none", max_retries=1) as client:
        completion = client.completions.create(model=full.model_manager.model_names[0], prompt="a")
    assert completion.usage is not None
    assert [usage_of(future.result()) for future in futures] == [4] * (1 + LIMIT)
    assert waited == [5]


@pytest.mark.parametrize("stream", [False, True])
def test_of_many_that_come_at_once_no_more_wait_than_may(
    clients: Clients, full: Any, held: HeldSteps, stream: bool
) -> None:
    running = clients.post()
    held.wait_for_step()
    futures = [clients.post(stream=stream) for _ in range(30)]
    deadline = time.monotonic() + TIMEOUT
    while sum(future.done() for future in futures) < 30 - LIMIT:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    held.let_go()
    assert usage_of(running.result()) == 4
    statuses = sorted(future.result().status_code for future in futures)
    assert statuses == [200] * LIMIT + [429] * (30 - LIMIT)
    full.wait_until_idle()


def test_those_that_the_next_step_will_start_are_not_in_the_queue(
    running_server: Any, tiny_model_dir: Path
) -> None:
    with (
        running_server(tiny_model_dir, max_num_seqs=16, max_num_queued_requests=1) as server,
        ThreadPoolExecutor(16) as pool,
        held_steps(server.model_manager) as held,
    ):
        clients = Clients(server, pool)
        futures = [clients.post()]
        held.wait_for_step()
        futures += [clients.post() for _ in range(15)]
        deadline = time.monotonic() + TIMEOUT
        while server.model_manager.engine.num_waiting < 15:
            assert time.monotonic() < deadline and not any(future.done() for future in futures)
            time.sleep(0.001)
        held.let_go()
        assert [usage_of(future.result()) for future in futures] == [4] * 16


def test_a_client_that_leaves_the_queue_makes_room(clients: Clients, full: Any, held: HeldSteps) -> None:
    running = clients.post(max_tokens=400)
    held.wait_for_step()
    waiting = clients.post()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(full.url + COMPLETIONS, json={"prompt": "a"}, timeout=0.3)
    while full.model_manager.num_queued > 1:  # the engine takes in the abort between two steps
        held.let_go(1)
        held.wait_for_step()
    last = clients.post()
    clients.wait_until_queued(2)
    held.let_go()
    assert [usage_of(future.result()) for future in (running, waiting, last)] == [400, 4, 4]
    full.wait_until_idle()


SECONDS = 0.4


@pytest.fixture(scope="module")
def hasty(running_server: Any, tiny_model_dir: Path) -> Iterator[Any]:
    """A server of one request at a time, whose requests may take less than half a second."""
    with running_server(tiny_model_dir, max_num_seqs=1, request_timeout=SECONDS) as server:
        yield server


@pytest.fixture
def slow(hasty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = hasty.model_manager.engine._engine
    step = engine.step

    def slow_step() -> Any:
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(engine, "step", slow_step)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_that_takes_too_long_is_an_error_that_nobody_sends_again(hasty: Any, n: int) -> None:
    started = time.monotonic()
    with (
        OpenAI(base_url=f"{hasty.url}/v1", api_key="none", max_retries=3) as client,
        pytest.raises(openai.InternalServerError, match=r"within the 0\.4 seconds") as caught,
    ):
        client.chat.completions.create(
            model=hasty.model_manager.model_names[0], messages=MESSAGES, n=n, extra_body=LONG
        )
    assert SECONDS <= time.monotonic() - started < 2 * SECONDS
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (
        504,
        "request_timeout",
        "timeout_error",
    )
    assert hasty.wait_until_idle() < SECONDS


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]], ids=str)
def test_a_stream_that_takes_too_long_ends_with_an_error_and_frees_its_blocks(
    hasty: Any, prompt: Any
) -> None:
    body = {"prompt": prompt, "stream": True, **LONG}
    text = httpx.post(hasty.url + COMPLETIONS, json=body, timeout=TIMEOUT).text
    *chunks, error, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert chunks and all("choices" in json.loads(chunk) for chunk in chunks)
    assert json.loads(error)["error"]["code"] == "request_timeout"
    assert done == "[DONE]"
    assert hasty.wait_until_idle() < SECONDS


@pytest.mark.usefixtures("slow")
def test_time_in_the_queue_counts(hasty: Any) -> None:
    responses: list[httpx.Response] = []

    def post() -> None:
        responses.append(httpx.post(hasty.url + CHAT, json={"messages": MESSAGES, **LONG}, timeout=TIMEOUT))

    started = time.monotonic()
    threads = [threading.Thread(target=post) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 2 * SECONDS
    assert [response.status_code for response in responses] == [504] * 3
    assert hasty.wait_until_idle() < SECONDS


def test_a_quick_answer_is_left_alone(hasty: Any) -> None:
    response = httpx.post(hasty.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 3})
    assert response.status_code == 200
    time.sleep(1.2 * SECONDS)
    hasty.wait_until_idle()
