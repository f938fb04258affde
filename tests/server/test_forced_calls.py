"""Calls that must be made, by models that know no tools and answer at a high temperature."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import jsonschema
import pytest
from answers import chat_format
from openai import OpenAI
from openai.types.chat import ChatCompletion
from test_call_grammar import SCHEMAS, TEMPLATES
from test_call_grammar import TOOLS as CLOSED_TOOLS
from test_response_template import JSON_CALLS
from test_tool_calls import join, whole
from tiny_tokenizer import CHAT_TEMPLATE

import turboquant_server

if TYPE_CHECKING:
    from conftest import RunningServer

DEMO = Path(turboquant_server.__file__).parent / "demo"
CHAT = "/v1/chat/completions"
USER: Any = {"role": "user", "content": "Hi"}
ANSWER = {
    "type": "object",
    "properties": {"place": {"enum": ["here", "there"]}},
    "required": ["place"],
    "additionalProperties": False,
}
# One of them says nothing of parameters, so it has none.
TOOLS: Any = [*CLOSED_TOOLS[:2], {"type": "function", "function": {"name": "now"}}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}


def use(manager: Any, monkeypatch: pytest.MonkeyPatch, name: str, response_template: Any = None) -> None:
    """Let a model write as one with this format's template, but for the reasoning."""
    parsers = {} if response_template else {"reasoning_parser": "none"}
    known = chat_format(manager.tokenizer, TEMPLATES[name], response_template, **parsers)
    monkeypatch.setattr(manager, "chat_format", known)
    end = "<|start|>assistant" if name == "openai" else ""
    monkeypatch.setattr(manager.tokenizer, "chat_template", CHAT_TEMPLATE + end)


def ask(client: OpenAI, **fields: Any) -> Any:
    defaults = {"temperature": 1.5, "seed": 5, "max_tokens": 250, "tools": TOOLS, "tool_choice": "required"}
    return client.chat.completions.create(**{"model": "tiny", "messages": [USER], **defaults, **fields})


def check(completion: ChatCompletion, finish_reason: str = "tool_calls") -> list[list[str]]:
    """Return the names that each answer has called; leave out answers that were cut off."""
    names = []
    for choice in completion.choices:
        calls: Any = choice.message.tool_calls or []
        for call in calls:
            jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        if choice.finish_reason != "length":
            assert calls and not choice.message.content
            assert choice.finish_reason == finish_reason
            names.append([call.function.name for call in calls])
    return names


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_are_made_in_the_format_of_the_model(
    client: OpenAI, server: RunningServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    use(server.model_manager, monkeypatch, name)
    single = check(ask(client, n=4, parallel_tool_calls=False))
    assert len(single) >= 2 and {len(names) for names in single} == {1}
    for tool in ("add-note_2", "now"):
        named = {"type": "function", "function": {"name": tool}}
        assert check(ask(client, n=2, tool_choice=named), "stop") == [[tool], [tool]]
    answer = whole(ask(client, tools=TOOLS[2:], max_tokens=150))
    assert {tuple(call) for call in answer[0]["calls"]} == {("now", "{}")}
    assert join(list(ask(client, tools=TOOLS[2:], max_tokens=150, stream=True))) == answer


def test_the_bundled_model_calls(
    running_server: Callable[..., AbstractContextManager[RunningServer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(DEMO, kv_cache_memory=64 * 2**20) as server:
        use(server.model_manager, monkeypatch, "hermes")
        with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
            called = check(ask(client, model=str(DEMO), n=4, max_tokens=120))
    assert len(called) >= 2


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "openai"])
def test_beside_tools_an_answer_calls_or_follows_its_format(
    client: OpenAI, server: RunningServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    use(server.model_manager, monkeypatch, name)
    tools = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    kinds = set()
    for choice in ask(client, n=12, tools=tools, tool_choice="auto", response_format=FORMAT).choices:
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), ANSWER)
        for call in choice.message.tool_calls or ():
            jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        kinds.add(choice.finish_reason)
    assert {"stop", "tool_calls"} <= kinds
    only = ask(client, tool_choice="none", response_format=FORMAT).choices[0].message.content
    jsonschema.validate(json.loads(only), ANSWER)


@pytest.mark.parametrize(
    ("fields", "param", "named"),
    [
        ({"tools": None}, "tool_choice", "no tools"),
        ({"tools": []}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "'f'"),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "f"}}],
                    },
                }
            },
            "tool_choice",
            "'f'",
        ),
        ({"guided_choice": ["a"]}, "guided_choice", "tool_choice"),
        ({"min_tokens": 3}, "min_tokens", "min_tokens"),
        (
            {"tools": [TOOLS[0], {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]},
            "tools[1].function.parameters",
            "not",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
            "object",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_called_is_refused(
    http: httpx.Client,
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
    fields: dict[str, Any],
    param: str,
    named: str,
) -> None:
    use(server.model_manager, monkeypatch, "hermes")
    body = {"messages": [USER], "tools": TOOLS, "tool_choice": "required", "max_tokens": 3, "stream": stream}
    response = http.post(CHAT, json={**body, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert named in error["message"]


def test_a_format_that_cannot_be_written_is_told(
    http: httpx.Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(server.model_manager, monkeypatch, "hermes", response_template=JSON_CALLS)
    body = {"messages": [USER], "tools": TOOLS, "max_tokens": 3}
    response = http.post(CHAT, json={**body, "tool_choice": "required"})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (
        400,
        "tool_choice",
        "unsupported_parameter",
    )
    assert "tool_choice" in error["message"] and "auto" in error["message"]
    # There, a format for the answer means that it calls nothing.
    body |= {"response_format": FORMAT, "max_tokens": 60}
    message = http.post(CHAT, json=body).json()["choices"][0]["message"]
    jsonschema.validate(json.loads(message["content"]), ANSWER)
