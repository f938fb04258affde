"""Tools and reasoning in messages as Anthropic's SDK sees them; an engine answers from a script."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from answers import CALLS, FORMATS, chat_format
from anthropic import Anthropic
from anthropic.types import Message
from scripted_engine import ScriptedEngine, hermes_call

from turboquant_server.engine.request import FinishReason

WEATHER: Any = {
    "name": "get_weather",
    "description": "Tell the weather.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "cache_control": {"type": "ephemeral"},
}
USER: Any = {"role": "user", "content": "Weather in Zürich?"}
CALL = hermes_call("get_weather", '{"city": "Zürich", "days": 2}')
THOUGHT = "<think>\nIs it {cold}?\n</think>\n\n"
QUIET = "<think>\n\n</think>\n\n"
PATH = "/v1/messages"


def ask(client: Anthropic, engine: ScriptedEngine, text: str = "Hi", **fields: Any) -> Message:
    engine.texts = [text]
    body = {"model": "tiny", "messages": [USER], "max_tokens": 500, "tools": [WEATHER], **fields}
    message = client.messages.create(**body)
    assert isinstance(message, Message)
    return message


def stream(client: Anthropic, engine: ScriptedEngine, text: str, **fields: Any) -> tuple[Message, list[Any]]:
    """Return a streamed message as the SDK's helper makes it, and the events."""
    engine.texts = [text]
    body = {"model": "tiny", "messages": [USER], "max_tokens": 500, "tools": [WEATHER], **fields}
    with client.messages.stream(**body) as events:
        seen = list(events)
        return events.get_final_message(), seen


def content_of(message: Message) -> list[dict[str, Any]]:
    """Return the blocks without their ids."""
    return [block.model_dump(exclude={"id", "parsed_output"}, exclude_none=True) for block in message.content]


def test_a_call_is_a_block_with_an_id_a_name_and_an_input(
    anthropic_client: Anthropic, engine: ScriptedEngine
) -> None:
    message = ask(anthropic_client, engine, f"{THOUGHT}I look. {CALL}\n{CALL}")
    thinking, text, *calls = message.content
    assert thinking.type == "thinking"
    assert (thinking.thinking, thinking.signature) == ("Is it {cold}?", "")
    assert text.type == "text" and text.text == "I look."
    for call in calls:
        assert call.type == "tool_use" and call.id.startswith("toolu_")
        assert (call.name, call.input) == ("get_weather", {"city": "Zürich", "days": 2})
    assert len({call.id for call in calls if call.type == "tool_use"}) == 2
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize("length", [1, 7, 1000])
@pytest.mark.parametrize("name", FORMATS)
def test_streamed_and_whole_messages_say_the_same(
    anthropic_client: Anthropic,
    engine: ScriptedEngine,
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    length: int,
) -> None:
    known = chat_format(server.model_manager.tokenizer, FORMATS[name].template)
    monkeypatch.setattr(server.model_manager, "chat_format", known)
    engine.piece_length = length
    tools = [{"name": call, "input_schema": {"type": "object"}} for call in ("get_weather", "add-note_v2")]
    for text in [
        FORMATS[name].write("Why\nnot", "So 😀", [CALLS[0], ("add-note_v2", CALLS[1][1])]),
        FORMATS[name].write("", "", CALLS[:1], " Done"),
        FORMATS[name].write("Why", "Plain text\n"),
        FORMATS[name].write("Why", "", CALLS)[:-25],
        "",
    ]:
        message = ask(anthropic_client, engine, text, tools=tools)
        streamed, _ = stream(anthropic_client, engine, text, tools=tools)
        assert content_of(message) == content_of(streamed)
        assert message.usage == streamed.usage
        has_calls = any(block.type == "tool_use" for block in message.content)
        assert message.stop_reason == streamed.stop_reason == ("tool_use" if has_calls else "end_turn")


def test_each_block_has_a_start_deltas_of_its_kind_and_a_stop(
    http: httpx.Client, engine: ScriptedEngine
) -> None:
    engine.texts = [f"{THOUGHT}So.{CALL}"]
    engine.piece_length = 1000
    body = {"messages": [USER], "tools": [WEATHER], "max_tokens": 500, "stream": True}
    lines = http.post(PATH, json=body).text.splitlines()
    events = [httpx.Response(200, text=line[6:]).json() for line in lines if line.startswith("data: ")]
    blocks = [event for event in events if event["type"].startswith("content_block")]
    start, delta, stop = (f"content_block_{kind}" for kind in ("start", "delta", "stop"))
    call = blocks[-3]["content_block"]
    json_text = '{"city": "Zürich", "days": 2}'
    assert blocks == [
        {"type": start, "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
        {"type": delta, "index": 0, "delta": {"type": "thinking_delta", "thinking": "Is it {cold}?"}},
        {"type": delta, "index": 0, "delta": {"type": "signature_delta", "signature": ""}},
        {"type": stop, "index": 0},
        {"type": start, "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": delta, "index": 1, "delta": {"type": "text_delta", "text": "So."}},
        {"type": stop, "index": 1},
        {
            "type": start,
            "index": 2,
            "content_block": {"type": "tool_use", "id": call["id"], "name": "get_weather", "input": {}},
        },
        {"type": delta, "index": 2, "delta": {"type": "input_json_delta", "partial_json": json_text}},
        {"type": stop, "index": 2},
    ]


@pytest.mark.parametrize(
    ("max_tokens", "reason"), [(5, "max_tokens"), (500, "model_context_window_exceeded")]
)
def test_a_limit_counts_more_than_calls(
    anthropic_client: Anthropic, engine: ScriptedEngine, max_tokens: int, reason: str
) -> None:
    engine.finish_reason = FinishReason.LENGTH
    message = ask(anthropic_client, engine, CALL + CALL[:9], max_tokens=max_tokens)
    assert (message.content[0].type, message.stop_reason) == ("tool_use", reason)


def test_a_tool_loop_ends_with_an_answer(
    anthropic_client: Anthropic, engine: ScriptedEngine, server: Any
) -> None:
    messages: list[Any] = [USER]
    answers = [f"{THOUGHT}{CALL}\n{CALL}", "It is cold."]
    while True:
        message = ask(anthropic_client, engine, answers.pop(0), messages=messages)
        messages.append({"role": "assistant", "content": message.content})
        if message.stop_reason != "tool_use":
            break
        ids = [block.id for block in message.content if block.type == "tool_use"]
        results = [
            {"type": "tool_result", "tool_use_id": ids[0], "content": "0 degrees"},
            {"type": "tool_result", "tool_use_id": ids[1], "content": [{"type": "text", "text": "1 degree"}]},
        ]
        # In any order: the prompt has that of the calls.
        messages.append({"role": "user", "content": [*reversed(results), {"type": "text", "text": "So?"}]})
    assert content_of(message) == [{"type": "text", "text": "It is cold."}]
    turn = "<think>Is it {cold}?</think>" + CALL + CALL
    assert engine.prompt(server.model_manager).endswith(
        f"<|im_start|>assistant\n{turn}<|im_end|>\n<|im_start|>tool\n0 degrees<|im_end|>\n"
        "<|im_start|>tool\n1 degree<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tools_reach_the_template_as_openai_describes_them(
    anthropic_client: Anthropic, engine: ScriptedEngine, server: Any
) -> None:
    ask(anthropic_client, engine)
    prompt = engine.prompt(server.model_manager)
    assert '"name": "get_weather"' in prompt and '"parameters": {"type": "object"' in prompt
    assert "input_schema" not in prompt and "cache_control" not in prompt
    count = anthropic_client.messages.count_tokens(model="tiny", messages=[USER], tools=[WEATHER])
    assert count.input_tokens == len(engine.prompts[-1])


def test_none_hides_the_tools(anthropic_client: Anthropic, engine: ScriptedEngine, server: Any) -> None:
    message = ask(anthropic_client, engine, CALL, tool_choice={"type": "none"})
    assert content_of(message) == [{"type": "text", "text": CALL}]
    assert "get_weather" not in engine.prompt(server.model_manager)


def test_without_parallel_calls_there_is_one(anthropic_client: Anthropic, engine: ScriptedEngine) -> None:
    for is_disabled, count in [(True, 1), (False, 2)]:
        choice: Any = {"type": "auto", "disable_parallel_tool_use": is_disabled}
        assert len(ask(anthropic_client, engine, CALL + CALL, tool_choice=choice).content) == count


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=str)
def test_a_call_that_must_be_is_one(anthropic_client: Anthropic, engine: ScriptedEngine, choice: Any) -> None:
    message = ask(anthropic_client, engine, CALL, tool_choice=choice)
    assert (message.content[0].type, message.stop_reason) == ("tool_use", "tool_use")
    assert engine.sampling_params[-1].grammar is not None
    ask(anthropic_client, engine, CALL, tool_choice={"type": "auto"})
    assert engine.sampling_params[-1].grammar is None


def test_who_disables_thinking_sees_none(anthropic_client: Anthropic, engine: ScriptedEngine) -> None:
    message = ask(anthropic_client, engine, f"{THOUGHT}Yes.", thinking={"type": "disabled"})
    assert content_of(message) == [{"type": "text", "text": "Yes."}]


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, ""),
        ({"thinking": {"type": "disabled"}}, QUIET),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, QUIET),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, ""),
        ({"output_config": {"effort": "max"}}, "max"),
    ],
    ids=str,
)
def test_thinking_and_effort_reach_the_template(
    anthropic_client: Anthropic, engine: ScriptedEngine, server: Any, fields: dict[str, Any], end: str
) -> None:
    ask(anthropic_client, engine, **fields)
    assert engine.prompt(server.model_manager).endswith(f"assistant\n{end}")


def test_a_request_of_claude_codes_is_answered(
    anthropic_client: Anthropic, engine: ScriptedEngine, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    engine.texts = [f"{THOUGHT}{CALL}"]
    body: Any = {
        "model": "tiny",
        "max_tokens": 500,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=fa690;"},
            {"type": "text", "text": "You are a coding agent.", **cached},
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>Be brief.</system-reminder>"},
                    {"type": "text", "text": "Weather?", **cached},
                ],
            },
            {"role": "system", "content": "The following agents are there: none."},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "redacted_thinking", "data": "abc"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Bern"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_1",
                        "content": "Offline",
                        "is_error": True,
                        **cached,
                    }
                ],
            },
            {"role": "system", "content": [{"type": "text", "text": "Two tools are left."}]},
        ],
        "tools": [WEATHER],
        "thinking": {"type": "adaptive"},
        "metadata": {"user_id": "user_1"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "betas": ["claude-code-20250219", "interleaved-thinking-2025-05-14"],
    }
    with anthropic_client.beta.messages.stream(**body) as events:
        message = events.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "tool_use"]
    assert not caplog.records
    *_, prompt = engine.prompt(server.model_manager).partition("<|im_end|>\n")
    call = hermes_call("get_weather", '{"city": "Bern"}')
    assert prompt == (
        "<|im_start|>system\nYou are a coding agent.<|im_end|>\n"
        "<|im_start|>user\n<system-reminder>Be brief.</system-reminder>\nWeather?\n"
        "The following agents are there: none.<|im_end|>\n"
        f"<|im_start|>assistant\n<think>Hm.</think>I look.{call}<|im_end|>\n"
        "<|im_start|>tool\nError: Offline\nTwo tools are left.<|im_end|>\n<|im_start|>assistant\nhigh"
    )
