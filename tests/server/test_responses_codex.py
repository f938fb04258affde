"""POST /v1/responses takes what Codex sends: namespaces, tools with plain text, tools that are not there.

More than 300 lines: requests and answers of its shape are long.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted_engine import ScriptedEngine, hermes_call

from turboquant_server.api import responses_items, responses_tools

RESPONSES = "/v1/responses"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
PATCH = '*** Begin Patch\n*** Add File: a.txt\n+"Zürich"\n*** End Patch\n'
PARAMETERS: Any = {"type": "object", "properties": {}, "additionalProperties": False}
SHELL: Any = {
    "type": "function",
    "name": "exec_command",
    "description": "Run a command.",
    "strict": False,
    "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]},
}
APPLY_PATCH: Any = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Change files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /(.|\\n)+/"},
}


def function(name: str) -> dict[str, Any]:
    return {
        "type": "function",
        "name": name,
        "description": f"Does {name}.",
        "strict": False,
        "parameters": PARAMETERS,
    }


AGENTS: Any = {
    "type": "namespace",
    "name": "multi_agent_v1",
    "description": "Tools for other agents.",
    "tools": [function("spawn_agent"), {**function("wait_agent"), "defer_loading": True}],
}
MCP: Any = {"type": "namespace", "name": "mcp__files", "description": "", "tools": [function("wait_agent")]}
HOSTED: list[Any] = [
    {"type": "web_search", "external_web_access": False},
    {"type": "image_generation", "output_format": "png"},
    {"type": "tool_search", "execution": "client", "description": "Find tools.", "parameters": PARAMETERS},
    {"type": "local_shell"},
]
TOOLS = [SHELL, *HOSTED[:1], AGENTS, APPLY_PATCH, *HOSTED[1:], MCP]
USER: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Go"}]}
BODY: Any = {
    "model": "tiny",
    "instructions": "You are a coding agent.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "Sandbox: read-only."}],
        },
        USER,
    ],
    "tools": TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199",
    "text": {"verbosity": "medium"},
    "client_metadata": {"x-codex-installation-id": "1"},
}


@pytest.fixture(autouse=True)
def forget_what_was_logged() -> None:
    responses_tools._log_left_out.cache_clear()
    responses_items._log_left_out.cache_clear()


def stream(http: httpx.Client, engine: ScriptedEngine, text: str, **fields: Any) -> list[dict[str, Any]]:
    """Return the events of an answer, each of which is one of the SDK's."""
    engine.texts = [text]
    response = http.post(RESPONSES, json={**BODY, **fields})
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    return [EVENT.validate_json(line[6:], strict=True) and json.loads(line[6:]) for line in lines]


def told_functions(engine: ScriptedEngine, server: Any) -> dict[str, Any]:
    """Return what the model was told of each function, by its name."""
    lines = engine.prompt(server.model_manager).split("<|im_end|>")[0].splitlines()
    functions = [json.loads(line)["function"] for line in lines if line.startswith("{")]
    return {function["name"]: function for function in functions}


def test_the_model_is_told_of_what_the_client_can_run(
    http: httpx.Client, engine: ScriptedEngine, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        events = stream(http, engine, "Hello")
    told = told_functions(engine, server)
    assert list(told) == [
        "exec_command",
        "multi_agent_v1__spawn_agent",
        "multi_agent_v1__wait_agent",
        "apply_patch",
        "mcp__files__wait_agent",
    ]
    assert told["exec_command"] == {name: value for name, value in SHELL.items() if name != "type"}
    # Once, because a namespace may have many tools and a long description.
    assert told["multi_agent_v1__spawn_agent"]["description"] == (
        "Tools for other agents.\n\nDoes spawn_agent."
    )
    assert told["multi_agent_v1__wait_agent"]["description"] == "Does wait_agent."
    patch = told["apply_patch"]
    assert patch["description"] == (
        "Change files.\n\nThe input follows this lark grammar:\nstart: /(.|\\n)+/"
    )
    assert patch["parameters"]["required"] == ["input"]
    offered = events[-1]["response"]["tools"]
    assert [tool["name"] for tool in offered] == [
        "exec_command",
        "multi_agent_v1",
        "apply_patch",
        "mcp__files",
    ]
    # Each type is logged once, whatever else Codex says of it.
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split()[4] for message in messages] == [f"{tool['type']}" for tool in HOSTED]


def test_a_call_comes_back_with_its_namespace(http: httpx.Client, engine: ScriptedEngine) -> None:
    calls = [
        ("multi_agent_v1__wait_agent", "wait_agent", "multi_agent_v1"),
        ("mcp__files__wait_agent", "wait_agent", "mcp__files"),
        ("exec_command", "exec_command", None),
    ]
    text = "\n".join(hermes_call(name, '{"a": 1}') for name, _, _ in calls)
    events = stream(http, engine, text, parallel_tool_calls=True)
    for kind in ("response.output_item.added", "response.output_item.done"):
        items = [event["item"] for event in events if event["type"] == kind]
        assert [(item["name"], item["namespace"]) for item in items] == [call[1:] for call in calls]
    assert [item["arguments"] for item in items] == ['{"a": 1}'] * 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (json.dumps({"input": PATCH}), PATCH),
        ('{"input": ""}', ""),
        ('{"patch": "x"}', '{"patch": "x"}'),
        ('{"input": 3}', '{"input": 3}'),
    ],
)
@pytest.mark.parametrize("namespace", [None, "files"])
def test_a_tool_with_plain_text_is_called_with_plain_text(
    http: httpx.Client, engine: ScriptedEngine, arguments: str, text: str, namespace: str | None
) -> None:
    name, tools = "apply_patch", [APPLY_PATCH]
    if namespace:
        tools = [{"type": "namespace", "name": namespace, "description": "Files.", "tools": tools}]
        name = f"{namespace}__{name}"
    events = stream(http, engine, hermes_call(name, arguments), tools=tools)
    kinds = [event["type"] for event in events]
    assert kinds[2:-1] == [
        "response.output_item.added",
        "response.custom_tool_call_input.delta",
        "response.custom_tool_call_input.done",
        "response.output_item.done",
    ]
    added, delta, done, item = events[2:-1]
    assert (added["item"]["input"], delta["delta"], done["input"]) == ("", text, text)
    assert delta["item_id"] == done["item_id"] == item["item"]["id"]
    [output] = events[-1]["response"]["output"]
    assert (
        output
        == item["item"]
        == {
            "id": output["id"],
            "type": "custom_tool_call",
            "status": "completed",
            "call_id": output["call_id"],
            "name": "apply_patch",
            "namespace": namespace,
            "input": text,
        }
    )
    assert Response.model_validate(events[-1]["response"]).output[0].type == "custom_tool_call"


def test_calls_are_passed_back_as_the_model_wrote_them(
    http: httpx.Client, engine: ScriptedEngine, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    written = [
        hermes_call("multi_agent_v1__spawn_agent", "{}"),
        hermes_call("apply_patch", json.dumps({"input": PATCH}, ensure_ascii=False)),
    ]
    events = stream(http, engine, "".join(written), tools=[AGENTS, APPLY_PATCH], parallel_tool_calls=True)
    spawn, patch = events[-1]["response"]["output"]
    caplog.clear()
    items = [
        USER,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": None},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
        {name: spawn[name] for name in ("type", "name", "namespace", "arguments", "call_id")},
        {name: patch[name] for name in ("type", "name", "input", "call_id", "status")},
        {"type": "function_call_output", "call_id": spawn["call_id"], "output": "1"},
        {"type": "custom_tool_call_output", "call_id": patch["call_id"], "output": "Done"},
    ]
    for _ in range(2):
        stream(http, engine, "Ready", input=items, tools=[AGENTS, APPLY_PATCH])
    assert (
        engine.prompt(server.model_manager)
        .removesuffix("medium")
        .endswith(
            f"<|im_start|>assistant\n{''.join(written)}<|im_end|>\n<|im_start|>tool\n1<|im_end|>\n"
            "<|im_start|>tool\nDone<|im_end|>\n<|im_start|>assistant\n"
        )
    )
    [message] = [record.getMessage() for record in caplog.records]
    assert "web_search_call" in message


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ({"type": "custom", "name": "apply_patch"}, "apply_patch"),
        ({"type": "function", "name": "mcp__files__wait_agent"}, "mcp__files__wait_agent"),
    ],
)
def test_a_choice_can_name_what_is_no_plain_function(
    http: httpx.Client, engine: ScriptedEngine, choice: Any, name: str
) -> None:
    events = stream(http, engine, hermes_call(name, '{"input": "a"}'), tool_choice=choice)
    [params] = engine.sampling_params
    assert params.grammar is not None
    assert events[-1]["response"]["tool_choice"] == choice
    assert events[-1]["response"]["output"][0]["name"] == name.rpartition("__")[2]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "mcp", "server_label": "a"}}, "tool_choice.type"),
        ({"tools": HOSTED, "tool_choice": "required"}, "tool_choice"),
        ({"tools": [SHELL, {"type": "teleport"}]}, "tools[1].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom"}]}, "tools[0].name"),
        ({"tools": [{**APPLY_PATCH, "format": {"type": "xml"}}]}, "tools[0].format.type"),
        (
            {"tools": [{**APPLY_PATCH, "format": {"type": "grammar", "syntax": "lark"}}]},
            "tools[0].format.definition",
        ),
        ({"tools": [{"type": "namespace", "name": "a"}]}, "tools[0].tools"),
        ({"tools": [{**AGENTS, "tools": [SHELL, HOSTED[0]]}]}, "tools[0].tools[1].type"),
        ({"tools": [{**AGENTS, "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name"),
        (
            {"tools": [{**AGENTS, "name": "a" * 120}]},
            "tools[0].tools[0].name",
        ),
        # Calls of these could not be told apart.
        ({"tools": [MCP, function("mcp__files__wait_agent")]}, "tools[1].name"),
        ({"tools": [{**APPLY_PATCH, "name": "exec_command"}, SHELL]}, "tools[1].name"),
        (
            {
                "tools": [
                    HOSTED[0],
                    {**MCP, "tools": [SHELL, {**SHELL, "name": "g", "parameters": {"type": 3}}]},
                ],
                "tool_choice": "required",
            },
            "tools[1].tools[1].parameters",
        ),
        ({"input": [USER, {"type": "custom_tool_call", "call_id": "c", "name": "f"}]}, "input[1].input"),
        (
            {"input": [USER, {"type": "custom_tool_call", "call_id": "c", "name": "f", "input": ""}]},
            "input[1]",
        ),
        ({"input": [{"type": "custom_tool_call_output", "call_id": "c", "output": ""}]}, "input[0].call_id"),
        ({"input": [{"type": "local_shell_call", "call_id": "c"}]}, "input[0].type"),
        ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input[0].type"),
        ({"input": [USER, {"type": "reasoning", "encrypted_content": "x"}]}, "input[1].encrypted_content"),
    ],
)
def test_what_would_change_the_conversation_is_refused_by_its_path(
    http: httpx.Client, engine: ScriptedEngine, fields: dict[str, Any], param: str
) -> None:
    response = http.post(RESPONSES, json={**BODY, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and f"'{param}'" in error["message"]


def test_a_call_without_result_is_refused_in_the_words_of_this_api(
    http: httpx.Client, engine: ScriptedEngine
) -> None:
    call = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
    error = http.post(RESPONSES, json={**BODY, "input": [USER, call]}).json()["error"]
    assert error["message"] == (
        "Invalid 'input[1]': its result must follow, a 'function_call_output' with the 'call_id' 'call_1'."
    )
