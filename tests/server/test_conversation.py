"""Calls and results in a conversation: what is refused, and what chat templates get."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from scripted_engine import TEMPLATE, ScriptedEngine, install

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}}
ASKING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "7"}


def post(http: httpx.Client, engine: ScriptedEngine, *messages: Any) -> httpx.Response:
    engine.texts = ["Good."]
    return http.post(
        CHAT, content=json.dumps({"messages": messages}), headers={"Content-Type": "application/json"}
    )


def changed(**fields: Any) -> dict[str, Any]:
    return {**ASKING, "tool_calls": [{**CALL, **fields}]}


def with_arguments(text: Any) -> dict[str, Any]:
    return changed(function={"name": "f", "arguments": text})


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([USER, RESULT], "messages[1].tool_call_id"),
        ([USER, ASKING, {**RESULT, "tool_call_id": "call_2"}], "messages[2].tool_call_id"),
        ([USER, ASKING, RESULT, USER, RESULT], "messages[4].tool_call_id"),
        ([USER, ASKING, {"role": "tool", "content": "7"}], "messages[2].tool_call_id"),
        ([USER, ASKING, {**RESULT, "content": None}], "messages[2].content"),
        ([USER, ASKING, USER], "messages[1].tool_calls[0]"),
        ([USER, ASKING], "messages[1].tool_calls[0]"),
        ([{**ASKING, "role": "user"}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "messages[0].content"),
        ([changed(id="")], "messages[0].tool_calls[0].id"),
        ([changed(id=None)], "messages[0].tool_calls[0].id"),
        ([changed(type="custom")], "messages[0].tool_calls[0].type"),
        ([changed(function={"arguments": "{}"})], "messages[0].tool_calls[0].function.name"),
        ([changed(function={"name": "f"})], "messages[0].tool_calls[0].function.arguments"),
        *(
            ([with_arguments(text)], "messages[0].tool_calls[0].function.arguments")
            for text in ("{", "[]", "3", "[" * 100_000, '{"a":' + "9" * 5000 + "}", {"a": 1}, None)
        ),
        ([USER, with_arguments('{"a": "\\ud800"}'), RESULT], "messages"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_its_path(
    http: httpx.Client, engine: ScriptedEngine, messages: list[Any], param: str
) -> None:
    response = post(http, engine, *messages)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_clients_may_send_back_what_they_got(http: httpx.Client, engine: ScriptedEngine) -> None:
    echoed = {**changed(index=0), "reasoning": "Hm", "reasoning_content": "Hm", "refusal": None}
    assert post(http, engine, USER, echoed, RESULT).status_code == 200
    assert post(http, engine, USER, {**with_arguments(""), "content": "So"}, RESULT, USER).status_code == 200


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ call.arguments | tojson }}", '{"a": "ü"}'),
        ("{{ '<' + call.arguments + '>' }}", '<{"a": "ü"}>'),
        ("{{ call.arguments }}", '{"a": "ü"}'),
        ("{{ call | tojson }}", '{"name": "f", "arguments": {"a": "ü"}}'),
        ("{% for key, value in call.arguments.items() %}{{ key }}={{ value }}{% endfor %}", "a=ü"),
        ("{% if call.arguments is mapping %}{{ call.arguments.a }}{% endif %}", "ü"),
    ],
)
def test_arguments_fit_what_a_template_makes_of_them(
    http: httpx.Client, server: Any, monkeypatch: pytest.MonkeyPatch, template: str, text: str
) -> None:
    begin = "{# tools #}{% for m in messages if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    template = begin + template
    engine = install(monkeypatch, server.model_manager, template + "{% endfor %}")
    assert post(http, engine, USER, ASKING, RESULT).status_code == 200
    assert engine.prompt(server.model_manager) == text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[1].content + '|' }}", "|"),
        ("{{ messages[2].name }} {{ messages[2].tool_call_id }}", "f call_1"),
        ("{# length != 9 #}{{ messages[2].tool_call_id + messages[1].tool_calls[0].id }}", "call_1call_1"),
    ],
)
def test_messages_fit_what_templates_expect(
    http: httpx.Client, server: Any, monkeypatch: pytest.MonkeyPatch, template: str, text: str
) -> None:
    engine = install(monkeypatch, server.model_manager, template)
    assert post(http, engine, USER, ASKING, RESULT).status_code == 200
    assert engine.prompt(server.model_manager) == text


def test_ids_are_as_long_as_a_template_wants_them(
    http: httpx.Client, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = "{% if messages[1].tool_calls[0].id|length != 9 %}{{ raise_exception('9!') }}{% endif %}"
    template = check + "{{ messages[2].tool_call_id }}"
    engine = install(monkeypatch, server.model_manager, template)
    call_id = "call_0123456789abcdef01234567"
    assert (
        post(http, engine, USER, changed(id=call_id), {**RESULT, "tool_call_id": call_id}).status_code == 200
    )
    assert engine.prompt(server.model_manager) == "f01234567"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("variable", ["reasoning_content", "reasoning", "thinking"])
def test_earlier_reasoning_has_the_name_that_the_template_knows(
    http: httpx.Client, server: Any, monkeypatch: pytest.MonkeyPatch, name: str, variable: str
) -> None:
    engine = install(monkeypatch, server.model_manager, "{{ messages[1]." + variable + " }}")
    assert post(http, engine, USER, {**ASKING, name: "Hm"}, RESULT).status_code == 200
    assert engine.prompt(server.model_manager) == "Hm"


def test_a_template_may_fail_in_any_way(
    http: httpx.Client, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for template in (
        "{{ range(10**9) | list }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content.nothing.at }}",
        TEMPLATE + "{{ x.y }}",
    ):
        engine = install(monkeypatch, server.model_manager, template)
        response = post(http, engine, USER)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
