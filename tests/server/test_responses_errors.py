"""What POST /v1/responses does not take is refused by the name that the field has there."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import install

from turboquant_server.api.responses_request import ResponsesRequest

RESPONSES = "/v1/responses"
USER: Any = {"role": "user", "content": "Hi"}
CALL: Any = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
OUTPUT: Any = {"type": "function_call_output", "call_id": "call_1", "output": "1"}
JSON = {"Content-Type": "application/json"}
FUNCTION: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}}


def error_of(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post(RESPONSES, json={"input": "Hi", "max_output_tokens": 2, **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert f"'{error['param']}'" in error["message"]
    return error


@pytest.mark.parametrize(
    ("items", "param"),
    [
        (3, "input"),
        ([], "input"),
        ("\ud800", "input"),
        ([3], "input[0]"),
        ([USER, {"type": "item_reference", "id": "msg_1"}], "input[1].type"),
        ([{"type": "computer_call_output", "call_id": "c", "output": {}}], "input[0].type"),
        ([{"role": "robot", "content": "Hi"}], "input[0].role"),
        ([{"role": "user"}], "input[0].content"),
        ([{"role": "user", "content": 3}], "input[0].content"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        ([USER, {**CALL, "arguments": "[1]"}], "input[1].arguments"),
        ([USER, {**CALL, "name": ""}], "input[1].name"),
        ([USER, {**CALL, "call_id": None}], "input[1].call_id"),
        ([USER, {"type": "reasoning", "encrypted_content": "x"}], "input[1].encrypted_content"),
        # Calls and outputs that do not belong together.
        ([USER, OUTPUT], "input[1].call_id"),
        ([USER, CALL, {**OUTPUT, "call_id": "call_2"}], "input[2].call_id"),
        ([USER, CALL], "input[1]"),
        ([{"role": "system", "content": "a"}, USER, CALL, {**CALL, "call_id": "2"}, OUTPUT], "input[3]"),
        ([USER, CALL, USER], "input[1]"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isascii() else "",
)
def test_a_wrong_item_is_refused_by_its_path(http: httpx.Client, items: Any, param: str) -> None:
    body = json.dumps({"input": items, "max_output_tokens": 2})
    response = http.post(RESPONSES, content=body, headers=JSON)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and f"'{param}'" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 3}, "model"),
        ({"instructions": 3}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"include": ["everything"]}, "include[0]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
        ({"tools": [{"type": "teleport"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom"}]}, "tools[0].name"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [FUNCTION]}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "g"}, "tools": [FUNCTION]}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "strange"}}}},
            "text.format.schema",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_value_is_refused_by_its_path(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    assert error_of(http, **fields)["param"] == param


@pytest.mark.parametrize(
    ("field", "something", "nothing"),
    [
        ("background", True, False),
        ("background_options", {}, None),
        ("context_management", [{"type": "compaction"}], []),
        ("conversation", "conv_1", None),
        ("enable_response_messages", True, False),
        ("previous_input_messages", [{}], None),
        ("previous_response", {}, None),
        ("previous_response_id", "resp_1", None),
        ("prompt", {"id": "pmpt_1"}, None),
        ("truncation", "auto", "disabled"),
        ("vllm_xargs", {"a": 1}, {}),
        ("logprobs", True, None),
        ("max_completion_tokens", 3, None),
        ("max_tokens", 3, None),
        ("messages", [USER], None),
        ("n", 2, 1),
        ("prompt_logprobs", 1, None),
        ("reasoning_effort", "low", None),
        ("response_format", {"type": "json_object"}, None),
        ("return_token_ids", True, False),
        ("reasoning.mode", "pro", "standard"),
    ],
)
def test_a_known_field_that_is_not_supported_is_refused_unless_it_asks_for_nothing(
    http: httpx.Client, field: str, something: Any, nothing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fields(value: Any) -> dict[str, Any]:
        *parents, name = field.split(".")
        return {parents[0]: {name: value}} if parents else {name: value}

    error = error_of(http, **fields(something))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    body = {"input": "Hi", "max_output_tokens": 2, **fields(nothing)}
    assert http.post(RESPONSES, json=body).status_code == 200
    assert not caplog.records


def test_fields_that_change_nothing_are_accepted(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    body = {
        "input": [{"type": "message", "id": "msg_1", "status": "completed", **USER}],
        "max_output_tokens": 2,
        "include": ["reasoning.encrypted_content", "file_search_call.results"],
        "reasoning": {"summary": "detailed", "generate_summary": "concise"},
        "service_tier": "auto",
        "store": True,
        "stream": True,
        "stream_options": {"include_obfuscation": False},
        "text": {"verbosity": "low"},
        "prompt_cache_retention": "24h",
    }
    assert http.post(RESPONSES, json=body).status_code == 200
    assert not caplog.records


def test_a_stateful_conversation_is_refused_with_the_way_out(http: httpx.Client) -> None:
    message = error_of(http, previous_response_id="resp_1")["message"]
    assert "keeps no responses" in message and "'input'" in message


def test_the_path_that_counts_tokens_is_no_response(http: httpx.Client) -> None:
    response = http.get(f"{RESPONSES}/input_tokens")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert "GET is not allowed" in response.json()["error"]["message"]


def test_errors_about_both_wishes_for_a_grammar_have_the_names_of_this_api(http: httpx.Client) -> None:
    text = {"format": {"type": "json_object"}}
    error = error_of(http, text=text, structured_outputs={"regex": "a"})
    assert error["param"] == "structured_outputs.regex" and "'text.format'" in error["message"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_wrong_schema_of_a_tool_has_the_name_of_this_api(
    http: httpx.Client, server: Any, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    install(monkeypatch, server.model_manager)
    schema = {"type": "object", "properties": {"a": {"type": "strange"}}}
    wrong = {"type": "function", "name": "g", "parameters": schema, "strict": strict}
    wish = {"text": {"format": {"type": "json_object"}}} if strict else {"tool_choice": "required"}
    assert error_of(http, tools=[FUNCTION, wrong], **wish)["param"] == "tools[1].parameters"


def test_what_the_template_does_not_take_is_the_input(
    http: httpx.Client, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, server.model_manager, "{{ raise_exception('Roles must alternate') }}")
    response = http.post(RESPONSES, json={"input": "Hi"})
    assert response.json()["error"]["param"] == "input"


def test_an_input_that_leaves_no_room_is_refused(http: httpx.Client) -> None:
    error = http.post(RESPONSES, json={"input": "x" * 2048}).json()["error"]
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")


def test_a_missing_input_is_named(http: httpx.Client) -> None:
    error = http.post(RESPONSES, json={"model": "tiny"}).json()["error"]
    assert (error["param"], error["code"]) == ("input", "missing_required_parameter")


def test_an_unknown_model_is_not_found(http: httpx.Client) -> None:
    response = http.post(RESPONSES, json={"input": "Hi", "model": "gpt-4"})
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.floats(),
    st.text(st.characters(), max_size=5),
    st.sampled_from(["user", "message", "function", "auto", "text", "{}", "\ud800"]),
    st.sampled_from(["custom", "namespace", "grammar", "web_search", "web_search_call", "custom_tool_call"]),
)
names = ["type", "role", "content", "text", "name", "format", "call_id", "arguments", "output", "tools"]
names += ["namespace", "input", "definition", "syntax"]
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(names), inner, max_size=4),
    max_leaves=8,
)
items = st.sampled_from([USER, CALL, OUTPUT, {"type": "reasoning"}, {"role": "assistant", "content": []}])
items |= st.sampled_from([{"type": "web_search_call"}, {**CALL, "type": "custom_tool_call", "input": "a"}])
fields = sorted({*ResponsesRequest.model_fields, "unknown"} - {"max_output_tokens"})


def test_no_body_makes_the_server_fail(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    @settings(deadline=None, max_examples=150)
    @given(
        st.lists(items, max_size=5) | documents,
        st.dictionaries(st.sampled_from(fields), documents, max_size=4),
    )
    def check(value: Any, body: dict[str, Any]) -> None:
        content = json.dumps({"input": value, "max_output_tokens": 2, **body})
        response = http.post(RESPONSES, content=content, headers=JSON)
        assert response.status_code in (200, 400, 404), response.text

    with caplog.at_level(logging.CRITICAL):
        check()
