"""Streams byte for byte, their errors, and what becomes of requests whose client has left."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from turboquant_server.api import streaming
from turboquant_server.engine import model_runner
from turboquant_server.engine.async_engine import EngineDeadError
from turboquant_server.engine.request import FinishReason, RequestFailedError, RequestOutput

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "What is the access code?"}]
SLOW_STEP = 0.02
# At SLOW_STEP seconds a token this takes 30 s: an engine that is idle sooner has been told to stop.
LONG = {"max_tokens": 1500, "ignore_eos": True}
SOON = 3.0


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each token take SLOW_STEP seconds."""
    sample = model_runner.sample

    def slow_sample(*arguments: Any, **options: Any) -> Any:
        time.sleep(SLOW_STEP)
        return sample(*arguments, **options)

    monkeypatch.setattr(model_runner, "sample", slow_sample)


@pytest.fixture
def idle_afterwards(server: Any) -> Iterator[None]:
    yield
    assert server.wait_until_idle() < SOON


def events_of(content: bytes) -> list[bytes]:
    """Return the data of each event; check that there is nothing else."""
    assert content.endswith(b"\n\n")
    assert b"\r" not in content
    events = content[:-2].split(b"\n\n")
    assert all(event.startswith(b"data: ") and b"\n" not in event.strip(b"\n") for event in events)
    return [event.strip(b"\n").removeprefix(b"data: ") for event in events]


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "stream": True, "temperature": 0, "max_tokens": 8, **fields}


def completion_body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "The", "stream": True, "temperature": 0, "max_tokens": 8, **fields}


def test_a_chat_stream_is_role_then_text_then_reason_then_done(http: httpx.Client) -> None:
    response = http.post(CHAT, json=chat_body())
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *data, done = events_of(response.content)
    assert done == b"[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(chunk, strict=True) for chunk in data]
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert middle and all(choice.delta.content and choice.delta.role is None for choice in middle)
    assert all(choice.finish_reason is None for choice in middle)
    assert last.finish_reason in ("stop", "length") and last.delta.content is None
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert not any(b'"usage"' in chunk for chunk in data)


def test_a_completion_stream_ends_with_the_reason_and_done(http: httpx.Client) -> None:
    *data, done = events_of(http.post(COMPLETIONS, json=completion_body()).content)
    assert done == b"[DONE]"
    # The SDK's type has no place for the null that OpenAI's own chunks carry until the last.
    Completion.model_validate_json(data[-1], strict=True)
    chunks = [json.loads(chunk) for chunk in data]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])
    assert chunks[0].keys() == chunks[-1].keys()
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert not any(b'"usage"' in chunk for chunk in data)


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body()), (COMPLETIONS, completion_body())], ids=str)
def test_the_usage_comes_in_a_chunk_of_its_own_before_done(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    response = http.post(path, json={**body, "stream_options": {"include_usage": True}})
    *data, last, _ = [
        json.loads(event) if event != b"[DONE]" else None for event in events_of(response.content)
    ]
    assert last["choices"] == []
    assert set(last["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert all(chunk["usage"] is None for chunk in data)


def test_the_text_of_a_stream_is_whole_characters(http: httpx.Client) -> None:
    for event in events_of(http.post(CHAT, json=chat_body(max_tokens=200)).content):
        event.decode("utf-8", errors="strict")


@pytest.mark.usefixtures("slow_steps")
def test_comments_keep_an_idle_stream_open(
    http: httpx.Client, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.03)
    content = http.post(CHAT, json=chat_body()).content
    assert content.count(b": keep-alive\n\n") >= 2
    events_of(content.replace(b": keep-alive\n\n", b""))
    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, max_tokens=8))
    assert chunks[-1].choices[0].finish_reason is not None


@pytest.mark.parametrize(
    ("failure", "words", "code"),
    [
        (RequestFailedError("r", "It ran out of memory."), "It ran out of memory.", None),
        (EngineDeadError("The engine died."), "The engine died.", "engine_dead"),
        (ZeroDivisionError("secret"), "its log has the details", None),
    ],
    ids=["the request's", "the engine's", "the server's"],
)
def test_an_error_inside_a_stream_is_an_event_and_then_done(
    http: httpx.Client,
    client: OpenAI,
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
    words: str,
    code: str | None,
) -> None:
    async def fail(*arguments: object) -> AsyncIterator[RequestOutput]:
        yield RequestOutput("r", "text", [1], 1, 1, None)
        raise failure

    monkeypatch.setattr(server.model_manager.engine, "generate", fail)
    for path, body in ((CHAT, chat_body()), (COMPLETIONS, completion_body())):
        *_, text, event, done = events_of(http.post(path, json=body).content)
        assert b'"text"' in text and done == b"[DONE]"
        error = json.loads(event)["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert words in error["message"] and b"secret" not in event
        assert error["code"] == code
    with pytest.raises(openai.APIError, match=words):
        list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    assert "a stream ended with an error" in caplog.text


def test_one_failed_answer_of_several_ends_the_others(
    http: httpx.Client, server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    generate = server.model_manager.engine.generate

    async def fail_second(token_ids: list[int], params: Any, request_id: str) -> AsyncIterator[RequestOutput]:
        if request_id.endswith("-1"):
            raise RequestFailedError(request_id, "It ran out of memory.")
        async for output in generate(token_ids, params, request_id):
            yield output

    monkeypatch.setattr(server.model_manager.engine, "generate", fail_second)
    body = {**LONG, "prompt": ["a", "b"]}
    assert http.post(COMPLETIONS, json=body).status_code == 500
    assert server.wait_until_idle() < SOON
    assert b"out of memory" in http.post(COMPLETIONS, json={**body, "stream": True}).content
    assert server.wait_until_idle() < SOON


@pytest.mark.usefixtures("slow_steps", "idle_afterwards")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat_body(**LONG)),
        (COMPLETIONS, completion_body(**LONG)),
        (COMPLETIONS, completion_body(**{**LONG, "prompt": ["a", "b", "c"]})),
    ],
    ids=["chat", "completion", "several prompts"],
)
def test_leaving_a_stream_frees_the_engine(
    http: httpx.Client, server: Any, path: str, body: dict[str, Any]
) -> None:
    with http.stream("POST", path, json=body) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
        engine = server.model_manager.engine
        assert engine.num_running + engine.num_waiting == (3 if body.get("prompt") == ["a", "b", "c"] else 1)


@pytest.mark.usefixtures("slow_steps", "idle_afterwards")
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_leaving_while_waiting_leaves_the_running_request_alone(
    http: httpx.Client, server: Any, stream: bool
) -> None:
    engine = server.model_manager.engine
    with http.stream("POST", CHAT, json=chat_body(**LONG)) as response:
        lines = response.iter_lines()
        next(lines)
        with pytest.raises(httpx.ReadTimeout):
            waiting = chat_body(**{**LONG, "stream": stream})
            with httpx.stream("POST", server.url + CHAT, json=waiting, timeout=0.3) as second:
                assert stream
                second.read()
        deadline = time.monotonic() + SOON
        while engine.num_waiting:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert engine.num_running == 1
        assert next(line for line in lines if line.startswith("data"))


@pytest.mark.usefixtures("slow_steps", "idle_afterwards")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_leaving_before_the_whole_answer_is_there_frees_the_engine(server: Any, path: str) -> None:
    subject = {"messages": MESSAGES} if path == CHAT else {"prompt": ["a", "b"]}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + path, json={**subject, **LONG}, timeout=0.3)


def test_the_sdk_closes_a_stream_that_is_broken_off(client: OpenAI, server: Any, slow_steps: None) -> None:
    with client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, extra_body=LONG
    ) as stream:
        next(iter(stream))
    assert server.wait_until_idle() < SOON


def test_finish_reasons_are_openais_words() -> None:
    assert {reason.value for reason in FinishReason} - {"abort"} == {"stop", "length"}
