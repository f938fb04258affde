"""Streams byte for byte, their errors, and what becomes of requests whose client has left."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from turboquant_server.api import response_models
from turboquant_server.api.completion_request import CompletionRequest
from turboquant_server.api.generation import NO_CHOICES, chunk_writer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "What is the access code?"}]
# With slow_steps this takes 30 s: an engine that is idle sooner has been told to stop.
LONG = {"max_tokens": 1500, "ignore_eos": True}


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


@given(
    model=st.text() | st.just(NO_CHOICES),
    texts=st.lists(st.text() | st.just(NO_CHOICES), max_size=2),
    include_usage=st.booleans(),
)
def test_a_chunk_is_what_pydantic_writes(model: str, texts: list[str], include_usage: bool) -> None:
    template = response_models.Completion(id="cmpl-1", created=1, model=model, choices=[])
    choices = [
        response_models.CompletionChoice(index=index, text=text, finish_reason=None)
        for index, text in enumerate(texts)
    ]
    whole = template.model_copy(update={"choices": choices})
    expected = whole.model_dump_json(exclude=None if include_usage else {"usage"})
    options = {"stream_options": {"include_usage": include_usage}}
    body = CompletionRequest.model_validate({"prompt": "", "stream": True, **options})
    assert chunk_writer(template, body, [], num_choices=1)(choices=choices) == expected


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body()), (COMPLETIONS, completion_body())], ids=str)
def test_the_usage_comes_in_a_chunk_of_its_own_before_done(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    response = http.post(path, json={**body, "stream_options": {"include_usage": True}})
    *data, last, _ = [
        json.loads(event) if event != b"[DONE]" else None for event in events_of(response.content)
    ]
    assert last["choices"] == []
    assert set(last["usage"]) == {
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
        "prompt_tokens_details",
    }
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert all(chunk["usage"] is None for chunk in data)


def test_a_stream_of_several_choices_gives_all_roles_first_and_ends_once(http: httpx.Client) -> None:
    *data, done = events_of(http.post(CHAT, json=chat_body(n=3, temperature=1, seed=2)).content)
    assert done == b"[DONE]"
    chunks = [json.loads(chunk) for chunk in data]
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [(choice["index"], choice["delta"].get("role")) for choice in choices[:3]] == [
        (index, "assistant") for index in range(3)
    ]
    assert all("role" not in choice["delta"] for choice in choices[3:])
    ends = [choice["index"] for choice in choices if choice["finish_reason"] is not None]
    assert sorted(ends) == [0, 1, 2]


@pytest.mark.usefixtures("slow_steps", "idle_afterwards")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_leaving_before_the_whole_answer_is_there_frees_the_engine(server: Any, path: str, n: int) -> None:
    subject = {"messages": MESSAGES} if path == CHAT else {"prompt": ["a", "b" * 700]}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + path, json={**subject, **LONG, "n": n}, timeout=0.3)


@pytest.mark.usefixtures("slow_steps", "idle_afterwards")
@pytest.mark.parametrize("num_answers", [1, 3, 30], ids=["one", "several", "more than run at a time"])
def test_a_client_that_leaves_in_the_middle_of_a_stream_frees_its_blocks(
    client: OpenAI, server: Any, num_answers: int
) -> None:
    num_free = server.num_free_blocks
    with client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": f"{num_answers} " + "middle" * 150}],
        stream=True,
        n=num_answers,
        extra_body=LONG,
    ) as stream:
        assert any(chunk.choices[0].delta.content for chunk in stream)
        assert server.num_free_blocks != num_free
