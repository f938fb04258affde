"""relay.py: requests and answers pass unchanged; a lost replica becomes an error that clients understand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI
from scrape import Scrape
from starlette.types import Message, Scope

from turboquant_server.app import MAX_BODY_BYTES
from turboquant_server.metrics import Metrics
from turboquant_server.metrics_text import render_metrics
from turboquant_server.relay import Relay, ReplicaLostError

JSON_TYPE, STREAM_TYPE = b"application/json", b"text/event-stream; charset=utf-8"
CHUNK = {
    "id": "a",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "delta": {"content": "Hi"}}],
}
EVENT = f"data: {json.dumps(CHUNK)}\n\n".encode()


def begin(content_type: bytes, status: int = 200) -> Message:
    headers = [(b"content-type", content_type), (b"x-request-id", b"replica's")]
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data: bytes, more_body: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more_body}


class Replicas:
    """Give the same answer to all, lose themselves after it if asked to, and remember what came."""

    def __init__(
        self, *batches: list[Message], is_lost: bool = False, of_all: Mapping[str, Any] | None = None
    ):
        self.relay = Relay(self._answer, self._ask_all)
        self.seen: list[tuple[str, bytes]] = []
        self._batches, self._is_lost, self._of_all = batches, is_lost, of_all

    async def _answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        self.seen.append((scope["path"], body))
        for batch in self._batches:
            yield batch
        if self._is_lost:
            raise ReplicaLostError("killed")

    async def _ask_all(self, scope: Scope) -> Mapping[str, list[Message]]:
        if self._of_all is None:
            raise ReplicaLostError("there is none")
        return self._of_all

    def request(self, path: str, content: Any = b"") -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.relay)
            async with httpx.AsyncClient(transport=transport, base_url="http://relay") as client:
                return await client.post(path, content=content)

        return asyncio.run(send())


def test_bodies_and_answers_pass_unchanged() -> None:
    replicas = Replicas([begin(JSON_TYPE, 429), body(b"one ", more_body=True)], [], [body(b"two")])
    response = replicas.request("/v1/completions", b'{"prompt": "a"}')
    assert replicas.seen == [("/v1/completions", b'{"prompt": "a"}')]
    assert (response.status_code, response.content) == (429, b"one two")
    assert "x-request-id" not in response.headers  # the proxy in front of it adds its own


def test_of_a_body_that_is_too_large_no_more_is_read_than_shows_it() -> None:
    async def endless() -> AsyncGenerator[bytes, None]:
        while True:
            yield bytes(2**20)

    replicas = Replicas([begin(JSON_TYPE, 413), body(b"")])
    assert replicas.request("/v1/completions", endless()).status_code == 413
    [(_, seen)] = replicas.seen
    assert MAX_BODY_BYTES < len(seen) <= MAX_BODY_BYTES + 2**20


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_replica_lost_before_its_answer_is_an_error_to_retry(path: str) -> None:
    response = Replicas(is_lost=True).request(path)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    kind = {"/v1/messages": "overloaded_error"}.get(path, "service_unavailable_error")
    assert response.json()["error"]["type"] == kind


def test_an_answer_that_is_no_stream_breaks_off() -> None:
    with pytest.raises(ReplicaLostError):
        Replicas([begin(JSON_TYPE), body(b"{", more_body=True)], is_lost=True).request("/v1/completions")


Serve = Callable[[Any], AbstractContextManager[str]]
MESSAGES: Any = [{"role": "user", "content": "a"}]


def test_openais_client_sees_what_came_and_then_the_error(serve: Serve) -> None:
    replicas = Replicas([begin(STREAM_TYPE)], [body(EVENT, more_body=True)], is_lost=True)
    seen = []
    with serve(replicas.relay) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="Please send it again") as raised:
            for chunk in stream:
                seen.append(chunk.choices[0].delta.content)
    assert (seen, raised.value.code) == (["Hi"], "replica_lost")


def test_a_response_ends_with_an_error_event_that_goes_on_counting(serve: Serve) -> None:
    started = {"type": "response.in_progress", "sequence_number": 0, "response": {"id": "a"}}
    begun = body(f"event: {started['type']}\ndata: {json.dumps(started)}\n\n".encode(), more_body=True)
    replicas = Replicas(
        [begin(STREAM_TYPE)], [begun, body(b": keep-alive\n\n", more_body=True)], is_lost=True
    )
    with serve(replicas.relay) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        seen = []
        with pytest.raises(openai.APIError, match="Please send it again") as raised:
            for event in client.responses.create(model="m", input="a", stream=True):
                seen.append(event.type)
    assert (seen, raised.value.code) == (["response.in_progress"], "replica_lost")
    *_, last, rest = replicas.request("/v1/responses").text.split("\n\n")
    name, data = last.split("\n")
    event = json.loads(data.removeprefix("data: "))
    assert (name, rest) == ("event: error", "")
    assert (event["type"], event["code"], event["sequence_number"]) == ("error", "replica_lost", 1)
    assert event["error"]["type"] == "service_unavailable_error"


def test_anthropics_client_sees_the_error(serve: Serve) -> None:
    ping = body(b"event: ping\ndata: {}\n\n", more_body=True)
    replicas = Replicas([begin(STREAM_TYPE), ping], is_lost=True)
    with serve(replicas.relay) as url, Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        stream = client.messages.create(model="m", max_tokens=1, messages=MESSAGES, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
            list(stream)


def metrics_of(num_refused: int) -> list[Message]:
    metrics = Metrics("m")
    for _ in range(num_refused):
        metrics.refused()
    text = render_metrics(metrics.collect(None), with_aliases=True)
    start = begin(b"text/plain; version=0.0.4")
    return [
        {**start, "headers": [*start["headers"], (b"content-length", str(len(text)).encode())]},
        body(text),
    ]


def test_metrics_are_those_of_all_replicas_by_their_names() -> None:
    down = [begin(JSON_TYPE, 503), body(b"{}")]
    response = Replicas(of_all={"x": down, "a": metrics_of(2), "b": metrics_of(3)}).request("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    scrape = Scrape(response.text)
    names = [f"{prefix}admission_rejections_total" for prefix in ("", "vllm:")]
    assert [scrape[f"{name}{{{engine}}}"] for name in names for engine in "ab"] == [2, 3, 2, 3]
    assert response.text.count("# TYPE turboquant:admission_rejections_total ") == 1


@pytest.mark.parametrize(
    ("path", "statuses", "expected"),
    [
        ("/metrics", [401, 401], 401),
        ("/health", [503, 200], 200),
        ("/health", [503, 503], 503),
        ("/health", None, 503),
    ],
)
def test_the_service_is_well_if_one_replica_is(path: str, statuses: list[int] | None, expected: int) -> None:
    answers = statuses and {
        str(i): [begin(JSON_TYPE, status), body(b"{}")] for i, status in enumerate(statuses)
    }
    assert Replicas(of_all=answers).request(path).status_code == expected
