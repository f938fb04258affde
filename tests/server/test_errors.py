"""Whatever a client sends, the answer is OpenAI's error body, which names the field that is at fault.

More than 300 lines, most of them rows of wrong requests.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from turboquant_server.api import request_model
from turboquant_server.api.chat_request import ChatCompletionRequest
from turboquant_server.api.completion_request import CompletionRequest
from turboquant_server.engine.request import RequestFailedError

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = {"role": "user", "content": "Hi"}
JSON = {"Content-Type": "application/json"}


def post(http: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    """Post a body that is right but for ``fields``; as ASCII, so that lone surrogates can be sent."""
    subject = {"messages": [USER]} if path == CHAT else {"prompt": "Hi"}
    body = {**subject, "max_tokens": 2, **fields}
    return http.post(path, content=json.dumps(body), headers=JSON)


def error_of(response: httpx.Response, status: int = 400) -> dict[str, str | None]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, str | None] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"] and error["type"]
    return error


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (CHAT, "tools", [{"type": "function", "function": {"name": "f"}}]),
        (CHAT, "functions", [{"name": "f"}]),
        (CHAT, "function_call", {"name": "f"}),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "audio", {"voice": "alloy", "format": "wav"}),
        (CHAT, "web_search_options", {}),
        (COMPLETIONS, "suffix", "end"),
        (COMPLETIONS, "best_of", 2),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused(http: httpx.Client, path: str, field: str, value: object) -> None:
    error = error_of(post(http, path, **{field: value}))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "cache_salt": None, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"n": None, "temperature": None, "top_p": None, "seed": None, "stop": None, "stream": None},
        {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": False},
        {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "top_k": -1},
        {"best_of": 1, "echo": False, "suffix": ""},
        {"min_p": 0, "min_tokens": 0, "repetition_penalty": 1.0, "stop_token_ids": []},
        {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}},
    ],
    ids=str,
)
def test_fields_that_ask_for_nothing_are_accepted(
    http: httpx.Client, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = COMPLETIONS if "echo" in fields else CHAT
    assert post(http, path, **fields).status_code == 200
    assert not caplog.records


def test_an_unknown_field_is_ignored_and_told_once(
    http: httpx.Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_model, "_logged_fields", set())
    for _ in range(2):
        assert post(http, CHAT, frobnicate={"a": 1}, messages=[{**USER, "mood": 3}]).status_code == 200
    assert sorted(record.args[0] for record in caplog.records) == ["frobnicate", "mood"]  # type: ignore[index]


def test_unknown_fields_cannot_flood_the_log(
    http: httpx.Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_model, "_logged_fields", set())
    assert post(http, CHAT, **{f"{i}{'x' * 1000}": 1 for i in range(1000)}).status_code == 200
    assert len(caplog.records) == request_model.MAX_LOGGED_FIELDS
    assert max(len(record.getMessage()) for record in caplog.records) < 200


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (CHAT, {"messages": [3] * 100_000}, "Invalid 'messages[0]': input should be an object."),
        (CHAT, {"stream": True, "stream_options": 3}, "Invalid 'stream_options': input should be an object."),
        (CHAT, {"messages": []}, "Invalid 'messages': list should have at least 1 item"),
        (COMPLETIONS, {"prompt": ["a"] * 2049}, "Invalid 'prompt': list should have at most 2048 items"),
        (COMPLETIONS, {"temperature": 3}, "Invalid 'temperature': input should be less than or equal to 2."),
        (CHAT, {"stop": ""}, "Invalid 'stop': string should have at least 1 character."),
        (COMPLETIONS, {"\ud800": 1}, "Invalid body: input should be a valid string"),
    ],
    ids=["message", "options", "no messages", "prompts", "temperature", "stop", "name"],
)
def test_the_message_says_what_the_value_should_be(
    http: httpx.Client, path: str, fields: dict[str, Any], message: str
) -> None:
    assert str(error_of(post(http, path, **fields))["message"]).startswith(message)


def test_a_long_wrong_name_is_not_sent_back_whole(http: httpx.Client) -> None:
    assert len(str(error_of(post(http, CHAT, model="m" * 10**6), 404)["message"])) < 500


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [USER, 3]}, "messages[1]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "user", "content": None}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
            "messages[0].function_call",
        ),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"model": 3}, "model"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "2"}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a", 3]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_value_is_refused_by_its_path(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error = error_of(post(http, CHAT, **fields))
    assert error["param"] == param
    assert f"'{param}'" in str(error["message"])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("n", value) for value in (0, -1, 129, "2", True, 1.5, [2])),
        *(("cache_salt", value) for value in ("", 3, True, ["a"], "\ud800")),
    ],
)
def test_a_wrong_number_of_choices_or_salt_is_refused(
    http: httpx.Client, path: str, field: str, value: object
) -> None:
    error = error_of(post(http, path, **{field: value}))
    assert error["param"] == field
    assert f"'{field}'" in str(error["message"])


@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (COMPLETIONS, "prompt")])
def test_a_missing_field_is_named(http: httpx.Client, path: str, param: str) -> None:
    error = error_of(http.post(path, json={"model": "tiny"}))
    assert (error["param"], error["code"]) == (param, "missing_required_parameter")


@pytest.mark.parametrize(
    ("content", "content_type", "words"),
    [
        (b'{"messages": [', "application/json", "not valid JSON"),
        (b"\xff\xfe\x00", "application/json", "not valid UTF-8"),
        (b"[1]", "application/json", "must be a JSON object"),
        (b'"text"', "application/json", "must be a JSON object"),
        (b"null", "application/json", "must be a JSON object"),
        (b"", "application/json", "must be a JSON object"),
        (b"[" * 100_000, "application/json", "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", "cannot be read as JSON"),
        (b'{"messages": []}', "text/plain", "Unsupported content type: 'text/plain'"),
        (b"a=b", "application/x-www-form-urlencoded", "Content-Type: application/json"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_a_body_that_is_no_json_object_is_refused(
    http: httpx.Client, content: bytes, content_type: str, words: str
) -> None:
    response = http.post(CHAT, content=content, headers={"Content-Type": content_type})
    assert words in str(error_of(response)["message"])


def test_json_may_come_with_a_charset(http: httpx.Client) -> None:
    body = json.dumps({"messages": [USER], "max_tokens": 1})
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert http.post(CHAT, content=body, headers=headers).status_code == 200


def test_an_unknown_path_and_a_wrong_method_are_told(http: httpx.Client) -> None:
    assert (
        error_of(http.post("/v1/embeddings", json={}), 404)["message"] == "Unknown URL: POST /v1/embeddings"
    )
    response = http.get(CHAT)
    assert error_of(response, 405)["message"] == f"GET is not allowed on {CHAT}"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (RequestFailedError("r", "out of memory"), "out of memory"),
        (ZeroDivisionError("secret"), "its log has the details"),
    ],
    ids=["the request's", "the server's"],
)
def test_a_failure_while_generating_is_a_server_error(
    client: OpenAI, server: Any, monkeypatch: pytest.MonkeyPatch, failure: Exception, words: str
) -> None:
    async def fail(*arguments: object) -> AsyncIterator[None]:
        raise failure
        yield

    monkeypatch.setattr(server.model_manager.engine, "generate", fail)
    with pytest.raises(openai.InternalServerError, match=words) as caught:
        client.chat.completions.create(model="tiny", messages=[USER])  # type: ignore[list-item]
    assert caught.value.type == "server_error"
    assert "secret" not in caught.value.message


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.floats(),
    st.text(st.characters(), max_size=5),
    st.sampled_from(["user", "text", "tiny", "\ud800", 10**30, -(2**70)]),
)
documents = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=4)
    ),
    max_leaves=8,
)
fields = sorted(
    {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, "unknown"}
    - {"max_tokens", "max_completion_tokens"}
)


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.CRITICAL):
        yield


@pytest.mark.usefixtures("quiet")
def test_no_body_makes_the_server_fail(http: httpx.Client) -> None:
    @settings(deadline=None, max_examples=150)
    @given(st.sampled_from([CHAT, COMPLETIONS]), st.dictionaries(st.sampled_from(fields), documents))
    def check(path: str, body: dict[str, Any]) -> None:
        response = post(http, path, **body)
        if response.status_code != 200:
            assert response.status_code in (400, 404)
            error_of(response, response.status_code)

    check()
