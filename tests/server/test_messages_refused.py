"""What /v1/messages refuses, and how: by the paths of Anthropic's fields, in Anthropic's error body."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic
from anthropic.types import (
    ToolParam,
    message_count_tokens_params,
    message_create_params,
)
from anthropic.types.beta import BetaOutputConfigParam
from anthropic.types.beta import message_count_tokens_params as beta_count_params
from anthropic.types.beta import message_create_params as beta_create_params
from scripted_engine import ScriptedEngine

from turboquant_server import app
from turboquant_server.api.messages_request import (
    CountTokensRequest,
    CustomTool,
    MessagesRequest,
    OutputConfig,
)
from turboquant_server.api.request_model import RequestModel
from turboquant_server.engine.request import RequestFailedError

PATH = "/v1/messages"
USER: Any = {"role": "user", "content": "What is the access code?"}
MESSAGES: Any = [USER]
WEATHER: Any = {"name": "get_weather", "input_schema": {"type": "object"}}
STRANGE = {"type": "json_schema", "schema": {"type": "strange"}}


def ask(client: Anthropic, **fields: Any) -> Any:
    return client.messages.create(**{"model": "tiny", "messages": MESSAGES, "max_tokens": 30, **fields})


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (MessagesRequest, message_create_params.MessageCreateParamsBase),
        (MessagesRequest, beta_create_params.MessageCreateParamsBase),
        (CountTokensRequest, message_count_tokens_params.MessageCountTokensParams),
        (CountTokensRequest, beta_count_params.MessageCountTokensParams),
        (CustomTool, ToolParam),
        (OutputConfig, BetaOutputConfigParam),
    ],
    ids=str,
)
def test_every_field_of_the_sdk_is_known(model: type[RequestModel], params: Any) -> None:
    known = model.model_fields.keys() | model.harmless_fields | {"betas"}  # which are a header
    assert params.__annotations__.keys() <= known


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "'max_tokens'"),
        ({"temperature": 1.5}, "'temperature'"),
        ({"top_p": 2}, "'top_p'"),
        ({"stop_sequences": [""]}, r"'stop_sequences\[0\]'"),
        ({"messages": []}, "'messages'"),
        ({"messages": [{"role": "developer", "content": "a"}]}, r"'messages\[0\].role'"),
        ({"mcp_servers": [{"type": "url"}]}, "'mcp_servers'"),
        ({"container": "a"}, "'container'"),
        (
            {"messages": [{"role": "user", "content": "x" * 2100}]},
            r"^prompt is too long: \d{4} tokens > 2048 maximum, which leaves no room for an answer\.$",
        ),
    ],
    ids=str,
)
def test_a_wrong_field_is_refused_by_its_name(
    anthropic_client: Anthropic, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(anthropic_client, extra_body=fields)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert re.search(words, body["error"]["message"])
    assert body["request_id"] == caught.value.response.headers["x-request-id"]


def test_max_tokens_must_be_given(http: httpx.Client) -> None:
    response = http.post(PATH, json={"messages": MESSAGES})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "Missing required parameter: 'max_tokens'."
    assert http.post(f"{PATH}/count_tokens", json={"messages": MESSAGES}).status_code == 200


def test_an_unknown_model_is_not_found(anthropic_client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="'claude' does not exist") as caught:
        ask(anthropic_client, model="claude")
    body: Any = caught.value.body
    assert body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.NotFoundError):
        anthropic_client.messages.count_tokens(model="claude", messages=MESSAGES)


def test_other_paths_keep_openais_errors(http: httpx.Client) -> None:
    for path in ("/v1/chat/completions", "/v1/messagesx"):
        assert "code" in http.post(path, json={}).json()["error"]
    assert set(http.get(f"{PATH}/x").json()) == set(http.get(PATH).json()) == {"type", "error", "request_id"}
    assert "object" in http.get("/v1/models").json()


def test_who_shows_no_key_gets_anthropics_error(running_server: Any, tiny_model_dir: Path) -> None:
    with running_server(tiny_model_dir, api_key=("secret",), served_model_name=("tiny",)) as server:
        for key, options in [("wrong", {}), (None, {"auth_token": "wrong"})]:
            with (
                Anthropic(base_url=server.url, api_key=key, max_retries=0, **options) as client,
                pytest.raises(anthropic.AuthenticationError) as caught,
            ):
                ask(client)
            body: Any = caught.value.body
            assert body["error"]["type"] == "authentication_error"
        for key, options in [("secret", {}), (None, {"auth_token": "secret"})]:
            with Anthropic(base_url=server.url, api_key=key, max_retries=0, **options) as client:
                assert ask(client, max_tokens=1).usage.output_tokens == 1


def test_a_body_that_is_too_large_gets_anthropics_error(
    server: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MAX_BODY_BYTES", 1000)
    with serve(app.build_app(server.model_manager)) as url, Anthropic(base_url=url, api_key="a") as client:
        with pytest.raises(anthropic.ContentTooLargeError) as caught:
            ask(client, system="a" * 1000)
        body: Any = caught.value.body
        assert body["error"]["type"] == "request_too_large"


def test_a_server_that_is_busy_or_about_to_end_gets_anthropics_errors(
    server: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing = app.build_app(server.model_manager)
    closing.state.door.is_closing = True
    with serve(closing) as url:
        response = httpx.post(url + PATH, json={"messages": MESSAGES, "max_tokens": 1})
    assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")
    config = server.model_manager.config.model_copy(update={"max_num_queued_requests": 0})
    monkeypatch.setattr(server.model_manager, "_config", config)
    for is_streamed in (False, True):
        body = {"messages": MESSAGES, "max_tokens": 1, "stream": is_streamed}
        response = httpx.post(server.url + PATH, json=body)
        assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")


@pytest.fixture
def failing(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a request fail after its first tokens."""
    generate = server.model_manager.engine.generate

    async def fail(*args: Any) -> Any:
        async for output in generate(*args):
            yield output
            if output.num_output_tokens == 3:
                raise RequestFailedError(output.request_id, "Out of luck.")

    monkeypatch.setattr(server.model_manager.engine, "generate", fail)
    yield


@pytest.mark.usefixtures("failing")
def test_an_error_in_the_middle_of_a_stream_is_an_event(
    http: httpx.Client, anthropic_client: Anthropic
) -> None:
    body = {"messages": MESSAGES, "max_tokens": 30, "stream": True}
    *_, last = http.post(PATH, json=body).text.strip().split("\n\n")
    name, data = last.split("\n")
    error = json.loads(data.removeprefix("data: "))
    assert name == "event: error"
    assert error["error"] == {"type": "api_error", "message": "Out of luck."}
    with pytest.raises(anthropic.APIStatusError, match="Out of luck"):
        list(ask(anthropic_client, stream=True))
    with pytest.raises(anthropic.InternalServerError, match="Out of luck"):
        ask(anthropic_client)


CALLED = {
    "role": "assistant",
    "content": [{"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}}],
}


def result(call_id: str, content: Any = "a") -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call_id, "content": content}]}


@pytest.mark.parametrize(
    ("messages", "path"),
    [
        ([USER, CALLED], "messages[1].content[0].id"),
        ([USER, CALLED, USER], "messages[1].content[0].id"),
        ([USER, CALLED, CALLED, result("toolu_1")], "messages[2].content[0].id"),
        ([USER, CALLED, result("toolu_1"), result("toolu_1")], "messages[3].content[0].tool_use_id"),
        ([USER, CALLED, result("toolu_2")], "messages[2].content[0].tool_use_id"),
        ([result("toolu_1")], "messages[0].content[0].tool_use_id"),
        ([{"role": "user", "content": CALLED["content"]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"type": "tool_result"}]}], "messages[0].content[0].tool_use_id"),
        (
            [USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "input": {}}]}],
            "messages[1].content[0].name",
        ),
        ([{"role": "system", "content": "a"}], "messages"),
        ([USER, {"role": "assistant", "content": ""}], "messages[1]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_blocks_that_do_not_fit_are_refused_by_their_path(
    http: httpx.Client, engine: ScriptedEngine, messages: Any, path: str
) -> None:
    for url, fields in [(PATH, {"max_tokens": 5}), (f"{PATH}/count_tokens", {})]:
        response = http.post(url, json={"messages": messages, "tools": [WEATHER], **fields})
        assert response.status_code == 400
        assert f"'{path}'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}, "tools": []}, "tool_choice"),
        (
            {
                "tool_choice": {"type": "any"},
                "tools": [
                    {"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "x"}}}}
                ],
            },
            "tools[0].input_schema",
        ),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "loud"}}, "thinking.type"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_config": {"format": STRANGE}}, "output_config.format.schema"),
        ({"output_format": STRANGE}, "output_format.schema"),
    ],
    ids=str,
)
def test_wrong_tools_are_refused_by_their_path(
    anthropic_client: Anthropic, engine: ScriptedEngine, fields: dict[str, Any], path: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(anthropic_client, tools=[WEATHER], extra_body=fields)
    body: Any = caught.value.body
    assert f"'{path}'" in body["error"]["message"]


def test_the_name_of_a_tool_may_be_as_long_as_anthropics(http: httpx.Client, engine: ScriptedEngine) -> None:
    engine.texts = ["Hi"]
    for length, status in ((128, 200), (129, 400)):
        body = {"messages": MESSAGES, "max_tokens": 5, "tools": [{**WEATHER, "name": "a" * length}]}
        assert http.post(PATH, json=body).status_code == status
