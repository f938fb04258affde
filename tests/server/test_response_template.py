"""A tokenizer's own response_template reads its answers, by transformers; what it fails on is text."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from answers import CALLS, TOOLS, chat_format, hermes, parse, qwen_coder
from tiny_tokenizer import CHAT_TEMPLATE, build_tokenizer

from turboquant_server.parsing.chat_format import ChatFormat

TOKENIZER = build_tokenizer()
JSON_CALLS: dict[str, Any] = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<\|im_end\|>"},
    },
}
XML_CALLS: dict[str, Any] = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n(?P<value>.*?)\n</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {},
    },
}
CHATS: dict[str, ChatFormat] = {
    "JSON": chat_format(TOKENIZER, CHAT_TEMPLATE, JSON_CALLS),
    "XML": chat_format(TOKENIZER, CHAT_TEMPLATE, XML_CALLS),
}
ANSWERS = {
    name: f"<think>\nWhy\n</think>\n\nSo 😀\n{write(CALLS)}"
    for name, write in (("JSON", hermes), ("XML", qwen_coder))
}
MEANING = [("reasoning", "Why"), ("content", "So 😀"), *(("call", call) for call in CALLS)]
both = pytest.mark.parametrize("name", CHATS)


@both
def test_the_template_is_chosen_and_reads_an_answer(name: str) -> None:
    chat = CHATS[name]
    assert str(chat) == "tool calls as response_template, reasoning as response_template"
    assert parse(chat.open("", TOOLS), [ANSWERS[name]]) == MEANING
    assert parse(chat.open("", TOOLS), list(ANSWERS[name])) == MEANING


@both
def test_the_prompt_may_begin_the_reasoning(name: str) -> None:
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    answer = ANSWERS[name].removeprefix("<think>\n")
    assert parse(CHATS[name].open(prompt, TOOLS), [answer]) == MEANING


@both
def test_an_answer_that_is_cut_off_is_text_or_whole_calls(name: str) -> None:
    for length in range(0, len(ANSWERS[name]) + 1):
        text = ANSWERS[name][:length]
        events = parse(CHATS[name].open("", TOOLS), [text])
        calls = [value for kind, value in events if kind == "call"]
        assert calls == CALLS[: len(calls)]
        if "So" in text and not calls:
            assert text.endswith(events[-1][1])
    assert len(calls) == 2


@pytest.mark.parametrize(
    "call",
    ['<tool_call>{"name": "f", oops</tool_call>', '<tool_call>{"name": "f", "arguments": 3}</tool_call>'],
)
def test_what_fails_is_text_and_the_rest_goes_on(call: str) -> None:
    text = f"<think>a</think>So {call} and {hermes(CALLS[:1])}"
    assert parse(CHATS["JSON"].open("", TOOLS), [text]) == [
        ("reasoning", "a"),
        ("content", f"So {call} and"),
        ("call", CALLS[0]),
    ]


@both
def test_without_tools_calls_are_text(name: str) -> None:
    [(_, _), (kind, text)] = parse(CHATS[name].open("", None), [ANSWERS[name]])
    assert kind == "content" and text.count("<tool_call>") == 2


def test_marks_that_are_special_tokens_are_kept() -> None:
    end, other, _ = special = TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
    assert CHATS["JSON"].skipped_token_ids(with_tools=True) == {special[2]}
    assert CHATS["XML"].skipped_token_ids(with_tools=True) == {end, special[2]}
    assert other not in (CHATS["XML"].skipped_token_ids(with_tools=False) or ())


def test_a_parser_that_is_told_counts_more() -> None:
    chat = chat_format(TOKENIZER, CHAT_TEMPLATE, JSON_CALLS, tool_call_parser="hermes")
    assert str(chat) == "tool calls as hermes, reasoning left in the text"


def test_a_template_that_transformers_refuses_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        chat = chat_format(TOKENIZER, CHAT_TEMPLATE, {"fields": {"content": {"odd": 1}}})
    assert str(chat) == "tool calls left in the text, reasoning left in the text"
    assert "response_template is not used" in caplog.text
