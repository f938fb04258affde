"""Tools and reasoning as OpenAI's SDK sees them, through a real server whose engine answers from a script.

More than 300 lines: the helpers at the top are for all of them.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from answers import CALLS, FORMATS, TOOLS, chat_format
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from scripted_engine import TEMPLATE, ScriptedEngine, hermes_call, install

from turboquant_server.engine.request import FinishReason

USER: Any = {"role": "user", "content": "Weather in Zürich?"}
WEATHER: Any = TOOLS[0]
CALL = hermes_call("get_weather", '{"city": "Zürich", "days": 2}')
THOUGHT = "<think>\nIs it {cold}?\n</think>\n\n"
CHAT = "/v1/chat/completions"


def ask(client: OpenAI, engine: ScriptedEngine, *texts: str, **fields: Any) -> ChatCompletion:
    engine.texts = list(texts)
    body = {"model": "tiny", "messages": [USER], "tools": [WEATHER], **fields}
    completion = client.chat.completions.create(**body)
    assert isinstance(completion, ChatCompletion)
    return completion


def stream(client: OpenAI, engine: ScriptedEngine, *texts: str, **fields: Any) -> list[ChatCompletionChunk]:
    engine.texts = list(texts)
    body = {"model": "tiny", "messages": [USER], "tools": [WEATHER], "stream": True, **fields}
    return list(client.chat.completions.create(**body))


def join(chunks: list[ChatCompletionChunk]) -> tuple[dict[str, Any], str | None]:
    """Return the message that the chunks of one answer make, without ids, and why it ended."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "reasoning_content": "", "calls": []}
    for choice in (chunk.choices[0] for chunk in chunks):
        delta = choice.delta
        message["content"] += delta.content or ""
        for name in ("reasoning", "reasoning_content"):
            message[name] += (delta.model_extra or {}).get(name, "")
        for call in delta.tool_calls or ():
            assert call.function is not None
            if call.id is not None:
                assert call.index == len(message["calls"])
                assert call.type == "function" and call.function.arguments == ""
                message["calls"].append([call.function.name, ""])
            else:
                assert call.type is call.function.name is None
            message["calls"][call.index][1] += call.function.arguments
    return message, chunks[-1].choices[0].finish_reason


def whole(completion: ChatCompletion) -> tuple[dict[str, Any], str | None]:
    [choice] = completion.choices
    extra = choice.message.model_extra or {}
    calls: Any = choice.message.tool_calls or []
    message = {
        "content": choice.message.content or "",
        "reasoning": extra.get("reasoning", ""),
        "reasoning_content": extra.get("reasoning_content", ""),
        "calls": [[call.function.name, call.function.arguments] for call in calls],
    }
    return message, choice.finish_reason


def test_a_call_has_an_id_a_type_a_name_and_arguments(client: OpenAI, engine: ScriptedEngine) -> None:
    [choice] = ask(client, engine, CALL).choices
    [call] = choice.message.tool_calls or []
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert call.id.startswith("call_") and call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Zürich", "days": 2}


def test_a_stream_gives_the_name_first_and_then_arguments(client: OpenAI, engine: ScriptedEngine) -> None:
    chunks = stream(client, engine, f"I look.\n{CALL}{CALL}")
    calls: list[Any] = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.index for call in calls] == [0, 0, 1, 1]
    assert [call.function.name for call in calls] == ["get_weather", None] * 2
    assert len({call.id for call in calls if call.id}) == 2
    message, finish_reason = join(chunks)
    assert message["content"] == "I look."
    assert finish_reason == "tool_calls"


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", FORMATS)
def test_streamed_and_whole_answers_say_the_same(
    client: OpenAI,
    engine: ScriptedEngine,
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    length: int,
) -> None:
    known = chat_format(server.model_manager.tokenizer, FORMATS[name].template)
    monkeypatch.setattr(server.model_manager, "chat_format", known)
    engine.piece_length = length
    for text in [
        FORMATS[name].write("Why\nnot", "So 😀", CALLS),
        FORMATS[name].write("", "", CALLS[:1], " Done"),
        FORMATS[name].write("Why", "Plain text\n"),
        FORMATS[name].write("Why", "", CALLS)[:-25],
    ]:
        answer = whole(ask(client, engine, text))
        assert answer == join(stream(client, engine, text))
        assert answer[0]["reasoning"] == answer[0]["reasoning_content"]
        assert answer[1] == ("tool_calls" if answer[0]["calls"] else "stop")


def test_reasoning_has_both_names_and_is_no_content(client: OpenAI, engine: ScriptedEngine) -> None:
    message = ask(client, engine, f"{THOUGHT}Yes.").choices[0].message
    assert message.content == "Yes."
    assert message.model_extra == {"reasoning": "Is it {cold}?", "reasoning_content": "Is it {cold}?"}
    thinking, _ = join(stream(client, engine, f"{THOUGHT}Yes.", tools=openai.omit))
    assert thinking["reasoning_content"] == "Is it {cold}?"


def test_answers_without_reasoning_and_calls_have_no_such_fields(
    http: httpx.Client, engine: ScriptedEngine
) -> None:
    engine.texts = ["Hello "]
    message = http.post(CHAT, json={"messages": [USER]}).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Hello ", "refusal": None}


@pytest.mark.parametrize("text", [CALL[:-20], hermes_call("get_weather", "[1]"), "<tool_call>{]</tool_call>"])
def test_a_call_that_is_cut_off_or_malformed_is_content(
    client: OpenAI, engine: ScriptedEngine, text: str
) -> None:
    engine.finish_reason = FinishReason.LENGTH
    message, finish_reason = whole(ask(client, engine, f"So {text}"))
    assert (message["content"], message["calls"], finish_reason) == (f"So {text}", [], "length")


def test_a_limit_ends_an_answer_as_length_though_it_has_calls(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.finish_reason = FinishReason.LENGTH
    message, finish_reason = whole(ask(client, engine, CALL + CALL[:9]))
    assert (len(message["calls"]), finish_reason) == (1, "length")


def test_none_hides_the_tools_and_leaves_calls_in_the_text(
    client: OpenAI, engine: ScriptedEngine, server: Any
) -> None:
    assert whole(ask(client, engine, CALL, tool_choice="none"))[0]["content"] == CALL
    assert "get_weather" not in engine.prompt(server.model_manager)
    assert whole(ask(client, engine, CALL, tool_choice="auto"))[0]["content"] == ""
    assert '"name": "get_weather"' in engine.prompt(server.model_manager)


@pytest.mark.parametrize("n", [1, 2])
def test_without_parallel_calls_each_answer_has_one(client: OpenAI, engine: ScriptedEngine, n: int) -> None:
    two = CALL + "\n" + CALL
    choices = ask(client, engine, *[two] * n, parallel_tool_calls=False, n=n).choices
    assert [len(choice.message.tool_calls or ()) for choice in choices] == [1] * n
    assert len({call.id for choice in choices for call in choice.message.tool_calls or ()}) == n
    choices = ask(client, engine, *[two] * n, parallel_tool_calls=True, n=n).choices
    assert [len(choice.message.tool_calls or ()) for choice in choices] == [2] * n


def test_a_call_that_the_request_has_named_ends_as_stop(client: OpenAI, engine: ScriptedEngine) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    for choice, finish_reason in (("required", "tool_calls"), (named, "stop")):
        answer = whole(ask(client, engine, CALL, tool_choice=choice))
        assert (len(answer[0]["calls"]), answer[1]) == (1, finish_reason)
        assert join(stream(client, engine, CALL, tool_choice=choice)) == answer


def test_only_the_tools_that_are_allowed_are_offered(
    client: OpenAI, engine: ScriptedEngine, server: Any
) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "other"}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": allowed}
    message, _ = whole(ask(client, engine, "No.", tools=[WEATHER, other], tool_choice=choice))
    assert message["content"] == "No."
    assert "get_weather" not in engine.prompt(server.model_manager)
    assert '"name": "other"' in engine.prompt(server.model_manager)


def test_reasoning_may_be_left_out_but_counts(client: OpenAI, engine: ScriptedEngine) -> None:
    silent: Any = {"extra_body": {"include_reasoning": False}}
    completion = ask(client, engine, f"{THOUGHT}Yes.", **silent)
    message, _ = answer = whole(completion)
    assert (message["content"], message["reasoning"]) == ("Yes.", "")
    assert join(stream(client, engine, f"{THOUGHT}Yes.", **silent)) == answer
    told = ask(client, engine, f"{THOUGHT}Yes.", extra_body={"include_reasoning": True})
    assert whole(told)[0]["reasoning"] and told.usage == completion.usage


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": 3}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"include_reasoning": "no"}, "include_reasoning"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ],
    ids=str,
)
def test_wrong_tools_are_refused_by_their_path(
    http: httpx.Client, engine: ScriptedEngine, fields: dict[str, Any], param: str
) -> None:
    response = http.post(CHAT, json={"messages": [USER], **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_tools_are_refused_where_the_template_has_no_place_for_them(http: httpx.Client) -> None:
    response = http.post(CHAT, json={"messages": [USER], "tools": [WEATHER], "max_tokens": 1})
    assert response.status_code == 400
    assert "chat template takes no tools" in response.json()["error"]["message"]
    body = {"messages": [USER], "tools": [WEATHER], "tool_choice": "none", "max_tokens": 1}
    assert http.post(CHAT, json=body).status_code == 200


class get_weather(BaseModel):
    """Tell the weather."""

    city: str
    days: int


def test_the_sdks_stream_helper_parses_the_arguments(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.texts = [f"{THOUGHT}I look. {CALL}"]
    tools = [openai.pydantic_function_tool(get_weather)]
    with client.chat.completions.stream(model="tiny", messages=[USER], tools=tools) as events:
        done: list[Any] = [event for event in events if event.type == "tool_calls.function.arguments.done"]
        [choice] = events.get_final_completion().choices
    assert [event.parsed_arguments for event in done] == [get_weather(city="Zürich", days=2)]
    [call] = choice.message.tool_calls or []
    assert call.function.parsed_arguments == get_weather(city="Zürich", days=2)
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    engine.texts = [CALL]
    parsed = client.chat.completions.parse(model="tiny", messages=[USER], tools=tools)
    [again] = parsed.choices[0].message.tool_calls or []
    assert again.function == call.function


def test_a_tool_loop_ends_with_an_answer(client: OpenAI, engine: ScriptedEngine, server: Any) -> None:
    engine.texts = [f"{THOUGHT}{CALL}\n{CALL}", "It is cold."]
    messages: list[Any] = [USER]
    while True:
        completion = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER])
        message = completion.choices[0].message
        if not message.tool_calls:
            break
        messages.append(message.model_dump())
        for number, call in enumerate(message.tool_calls):
            result = {"role": "tool", "tool_call_id": call.id, "content": f"{number} degrees"}
            messages.append(result)
    assert message.content == "It is cold."
    turn = "<think>Is it {cold}?</think>" + CALL + CALL
    assert engine.prompt(server.model_manager).endswith(
        f"<|im_start|>assistant\n{turn}<|im_end|>\n<|im_start|>tool\n0 degrees<|im_end|>\n"
        "<|im_start|>tool\n1 degrees<|im_end|>\n<|im_start|>assistant\n"
    )


def test_effort_and_variables_reach_the_template(client: OpenAI, engine: ScriptedEngine, server: Any) -> None:
    quiet = "<think>\n\n</think>\n\n"
    for fields, end in [
        ({"reasoning_effort": "low"}, "low"),
        ({"reasoning_effort": "none"}, quiet),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, quiet),
        (
            {"reasoning_effort": "high", "extra_body": {"chat_template_kwargs": {"reasoning_effort": "x"}}},
            "x",
        ),
    ]:
        ask(client, engine, "Hi", **fields)
        assert engine.prompt(server.model_manager).endswith(f"assistant\n{end}")


def test_a_template_that_opens_the_reasoning_is_seen(
    client: OpenAI, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = install(monkeypatch, server.model_manager, TEMPLATE + "<think>\n")
    message, _ = whole(ask(client, engine, f"Hm.\n</think>\n{CALL}"))
    assert (message["reasoning"], message["content"], len(message["calls"])) == ("Hm.", "", 1)
