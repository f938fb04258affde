"""Answers of models become content, reasoning and tool calls, wherever their text is cut."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any

import pytest
from answers import CALLS, FORMATS, TOOLS, Call, Format, chat_format, parse
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import build_tokenizer

from turboquant_server.parsing.chat_format import ChatFormat

TOKENIZER = build_tokenizer()
CHATS: dict[str, ChatFormat] = {
    name: chat_format(TOKENIZER, known.template) for name, known in FORMATS.items()
}
every_format = pytest.mark.parametrize("name", FORMATS)


def read(name: str, text: str, *, prompt: str = "", max_calls: int | None = None) -> list[tuple[str, Any]]:
    return parse(CHATS[name].open(prompt, TOOLS, max_calls), [text])


def meaning(reasoning: str, content: str, calls: list[Call], after: str = "") -> list[tuple[str, Any]]:
    texts = [("reasoning", reasoning), ("content", content)]
    events = [*texts, *(("call", call) for call in calls), ("content", after)]
    return [event for event in events if event[1]]


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


@every_format
@pytest.mark.parametrize("num_calls", [0, 1, 2])
@pytest.mark.parametrize("content", ["", "Let me look: {ä} 😀 <b>"])
@pytest.mark.parametrize("reasoning", ["", "Hm.\n\nThe user wants {…}."])
def test_an_answer_is_what_it_was_made_from(name: str, num_calls: int, content: str, reasoning: str) -> None:
    calls = CALLS[:num_calls]
    text = FORMATS[name].write(reasoning, content, calls)
    assert read(name, text) == meaning(reasoning, content, calls)


@every_format
def test_text_may_come_after_calls(name: str) -> None:
    text = FORMATS[name].write("", "First. ", CALLS, "\n\nThen that.\n")
    *events, last = read(name, text)
    assert events == meaning("", "First.", CALLS)
    assert last == ("content", "Then that.\n")


@every_format
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_where_a_text_is_cut_changes_nothing(name: str, data: st.DataObject) -> None:
    known = FORMATS[name]
    reasoning = data.draw(st.sampled_from(["", "Two\nlines"]))
    content = data.draw(st.sampled_from(["", "Text < [ {\n"]))
    text = known.write(
        reasoning, content, CALLS[: data.draw(st.integers(0, 2))], data.draw(st.sampled_from(["", " End"]))
    )
    text = text[: data.draw(st.integers(0, len(text)))]
    pieces = cut(text, data.draw(st.lists(st.integers(0, 10_000), max_size=30)))
    whole = read(name, text)
    assert parse(CHATS[name].open("", TOOLS), pieces) == whole
    assert parse(CHATS[name].open("", TOOLS), list(text)) == whole


def fragments(name: str) -> list[str]:
    """Return pieces that the format's texts are made of, whole marks and halves among them."""
    text = FORMATS[name].write("a", "b", [("get_weather", {"city": "c"})])
    marks = [mark for mark in CHATS[name]._marks(with_tools=True) if mark]
    halves = [half for mark in marks for half in (mark[: len(mark) // 2], mark[len(mark) // 2 :])]
    call = json.dumps({"name": "get_weather", "arguments": {"city": "é"}})
    return [
        *marks,
        *halves,
        text,
        call,
        *'{}[]"\\ \n;a',
        "{}",
        "<",
        ">",
        "get_weather",
        "to=functions.x",
        "```json",
    ]


@every_format
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_text_is_too_strange(name: str, data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.sampled_from(fragments(name)), max_size=14))
    text = "".join(parts)
    whole = read(name, text)
    assert parse(CHATS[name].open("", TOOLS), cut(text, data.draw(st.lists(st.integers(0, 999))))) == whole
    starts_with_mark = name == "openai" or text.lstrip().startswith(FORMATS[name].marks[0])
    if not starts_with_mark and all(kind == "content" for kind, _ in whole):
        assert "".join(value for _, value in whole) == text


@every_format
def test_an_answer_that_is_cut_off_is_text_or_whole_calls(name: str) -> None:
    text = FORMATS[name].write("Why", "So", CALLS)
    for length in range(len(text) + 1):
        events = read(name, text[:length])
        calls = [value for kind, value in events if kind == "call"]
        assert calls == CALLS[: len(calls)]
        kind, value = events[-1] if events else ("", "")
        if kind == "content" and name != "openai":  # word for word
            assert text[:length].endswith(value)
    assert len(calls) == 2


@every_format
def test_no_mark_is_seen_in_a_stream(name: str) -> None:
    text = FORMATS[name].write("Why", "So", CALLS[:1], "Done")
    parser = CHATS[name].open("", TOOLS)
    pieces = [event for character in text for event in parser.feed(character)] + parser.finish()
    texts = [event.text for event in pieces if hasattr(event, "text")]
    assert "".join(texts) == "WhySoDone"


@every_format
def test_text_is_not_held_back(name: str) -> None:
    parser = CHATS[name].open("", TOOLS)
    begin = "<|channel|>final<|message|>" if name == "openai" else ""
    for piece, seen in [(begin + "Hello", "Hello"), (" there", " there"), ("!", "!")]:
        assert [event.text for event in parser.feed(piece) if hasattr(event, "text")] == [seen]


MALFORMED = {
    "hermes": [
        "<tool_call>{'name': 'f'}</tool_call>",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>",
        "<tool_call>" + '{"a":' * 5000 + "1" + "}" * 5000 + "</tool_call>",
        "<tool_call>[]</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>get_weather</tool_call>",
    ],
    "llama3_json": [
        '{"name": "unknown", "parameters": {}}',
        '{"answer": 42}',
        '<|python_tag|>brave_search.call(query="x")',
    ],
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS]f[ARGS]x", "[TOOL_CALLS][1, 2]", "[TOOL_CALLS]f[ARGS][1]"],
    "deepseek_v3": [
        "<｜tool▁calls▁begin｜>x",  # noqa: RUF001
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n[]\n```<｜tool▁call▁end｜>",  # noqa: RUF001
    ],
    "qwen3_coder": [
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\nx\n</function>\n</tool_call>",
        "<function=f",
    ],
    "openai": [
        "<|channel|>commentary to=functions.f<|message|>[1]",
        "<|channel|>commentary to=functions.f<|message|>",
        "<|channel|>commentary to=functions.f<|message|>{",
    ],
}


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name, texts in MALFORMED.items() for text in texts],
    ids=lambda v: v[:60],
)
def test_a_malformed_call_is_text(name: str, text: str) -> None:
    assert read(name, text) == [("content", text)]


@every_format
def test_without_tools_calls_are_text(name: str) -> None:
    text = FORMATS[name].write("Why", "So", CALLS[:1])
    kinds = {kind for kind, _ in parse(CHATS[name].open("", None), [text])}
    assert kinds == {"reasoning", "content"}


@every_format
def test_calls_beyond_the_limit_are_left_out(name: str) -> None:
    assert read(name, FORMATS[name].write("", "", CALLS), max_calls=1) == meaning("", "", CALLS[:1])


THINKERS = [name for name in FORMATS if name != "openai"]


@pytest.mark.parametrize("name", THINKERS)
@pytest.mark.parametrize("again", [False, True], ids=["", "again"])
def test_a_prompt_may_begin_the_reasoning(name: str, again: bool) -> None:
    known: Format = FORMATS[name]
    text = known.write("Why", "So", CALLS)
    prompt = f"user\nHi\nassistant\n{known.marks[0]}\n"
    assert read(name, text if again else text.removeprefix(known.marks[0]), prompt=prompt) == meaning(
        "Why", "So", CALLS
    )


@pytest.mark.parametrize("prompt", ["", "<think>\n\n</think>\n\n", "What is <think>? assistant"])
def test_other_prompts_do_not(prompt: str) -> None:
    assert read("hermes", "Just text </think>", prompt=prompt) == [("content", "Just text </think>")]


def test_reasoning_that_does_not_end_is_reasoning() -> None:
    assert read("hermes", "<think>On and <tool_call>\n") == [("reasoning", "On and <tool_call>")]


def test_only_the_beginning_of_an_answer_is_reasoning() -> None:
    text = "Write <think>so</think>."
    assert read("hermes", text) == [("content", text)]


def test_plain_text_stays_as_it_is() -> None:
    text = " \n Hello,\n\n world! \n\n"
    assert read("hermes", text) == [("content", text)]


def test_a_line_break_in_an_argument_needs_no_escape() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "b\nc"}}</tool_call>'
    assert read("hermes", text) == [("call", ("f", {"a": "b\nc"}))]


def test_arguments_may_be_missing_or_a_text() -> None:
    for arguments in ("", ', "arguments": {}', ', "arguments": "{}"'):
        assert read("hermes", f'<tool_call>{{"name": "f"{arguments}}}</tool_call>') == [("call", ("f", {}))]


def test_llama_calls_without_a_mark_are_calls_of_the_tools() -> None:
    call = json.dumps({"name": "get_weather", "parameters": {"city": "Bern"}})
    expected = ("call", ("get_weather", {"city": "Bern"}))
    assert read("llama3_json", f" {call}; {call}\n") == [expected, expected]
    assert read("llama3_json", f"Here: {call}") == [("content", f"Here: {call}")]


def test_a_harmony_answer_to_nobody_or_to_a_builtin_tool_is_read_by_its_channel() -> None:
    text = (
        "<|channel|>analysis to=python<|message|>1 + 1<|call|><|start|>assistant<|channel|>final<|message|>2"
    )
    assert read("openai", text) == [("reasoning", "1 + 1"), ("content", "2")]
    assert read("openai", "<|channel|>analy") == []
    role = "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}"
    assert read("openai", " to=functions.f<|channel|>commentary<|message|>{}<|call|>" + role) == [
        ("call", ("f", {})),
        ("call", ("f", {})),
    ]


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "7", "7"),
        ({"type": "integer"}, "7", 7),
        ({"type": "boolean"}, "True", True),
        ({"type": ["integer", "null"]}, "null", None),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, "2.5", 2.5),
        ({"type": "number"}, "-1e999", -sys.float_info.max),
        ({"$ref": "#/$defs/One"}, '{"b": 1}', {"b": 1}),
        ({"$ref": "#/$defs/Loop"}, "null", None),
        ({"$ref": "#/$defs/None"}, "7", "7"),
        ({"enum": [1, 2]}, "2", 2),
        ({"const": "2"}, "2", "2"),
        ({"type": "array"}, '["a"]', ["a"]),
        ({"type": "object"}, "no JSON", "no JSON"),
        ({}, "7", "7"),
        ("odd", "7", "7"),
        ({"type": 3, "anyOf": 3, "oneOf": [3]}, "7", "7"),
    ],
    ids=str,
)
def test_the_schema_says_what_a_parameter_is(schema: Any, text: str, value: Any) -> None:
    definitions = {"One": {"type": "object"}, "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "null"}]}}
    parameters = {"type": "object", "properties": {"a": schema}, "$defs": definitions}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    answer = f"<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>"
    assert parse(CHATS["qwen3_coder"].open("", tools), [answer]) == [("call", ("f", {"a": value}))]


def test_a_long_answer_takes_linear_time() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "x{" * 50_000
    started = time.perf_counter()
    parser = CHATS["hermes"].open("", TOOLS)
    for start in range(0, len(text), 4):
        parser.feed(text[start : start + 4])
    assert parse(parser, ['"}}</tool_call>'])[0][0] == "call"
    assert time.perf_counter() - started < 2
