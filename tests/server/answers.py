"""Answers in the formats that models write, made from what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from turboquant_server.parsing.answer_parser import AnswerParser
from turboquant_server.parsing.chat_format import ChatFormat
from turboquant_server.parsing.event import Content, Event, Reasoning, ToolCall

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tell the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add-note.v2",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "tags": {"type": "array"},
                    "meta": {"type": "object"},
                },
            },
        },
    },
]

# A call as a test means it.
Call = tuple[str, dict[str, Any]]
CALLS: list[Call] = [
    ("get_weather", {"city": "Zürich 🌦", "days": 3}),
    (
        "add-note.v2",
        {
            "text": 'a "quoted" {brace} [and] \\ a </tag> \n {"name": "x"} ]}',
            "tags": ["ä", 1, None, True, 2.5],
            "meta": {"deep": [{"er": {}}], "}": "{", "日本": "語"},
        },
    ),
]


def hermes(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        for name, arguments in calls
    )


def llama(calls: Sequence[Call]) -> str:
    return "; ".join(
        "<|python_tag|>" + json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)
        for name, arguments in calls
    )


def mistral_list(calls: Sequence[Call]) -> str:
    texts = [
        json.dumps({"name": name, "arguments": arguments, "id": "a1b2c3d4e"}) for name, arguments in calls
    ]
    return f"[TOOL_CALLS] [{', '.join(texts)}]" if texts else ""


def mistral(calls: Sequence[Call]) -> str:
    return "".join(
        f"[TOOL_CALLS]{name}[CALL_ID]a1b2c3d4e[ARGS]{json.dumps(arguments, ensure_ascii=False)}"
        for name, arguments in calls
    )


def mistral_short(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}{json.dumps(arguments)}" for name, arguments in calls)


def deepseek_v3(calls: Sequence[Call]) -> str:
    texts = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n"  # noqa: RUF001
        f"```json\n{json.dumps(arguments)}\n```<｜tool▁call▁end｜>"  # noqa: RUF001
        for name, arguments in calls
    ]
    lines = "\n".join(texts)
    return f"<｜tool▁calls▁begin｜>{lines}<｜tool▁calls▁end｜>" if texts else ""  # noqa: RUF001


def deepseek_v31(calls: Sequence[Call]) -> str:
    texts = [
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(arguments)}<｜tool▁call▁end｜>"  # noqa: RUF001
        for name, arguments in calls
    ]
    return f"<｜tool▁calls▁begin｜>{''.join(texts)}<｜tool▁calls▁end｜>" if texts else ""  # noqa: RUF001


def qwen_coder(calls: Sequence[Call]) -> str:
    texts = []
    for name, arguments in calls:
        values = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()
        }
        parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        texts.append(f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
    return "\n".join(texts)


@dataclass(frozen=True)
class Format:
    """A format of answers.

    Attributes:
        template: A chat template that gives it away.
        write_calls: Writes calls.
        marks: What stands around reasoning.
    """

    template: str
    write_calls: Callable[[Sequence[Call]], str]
    marks: tuple[str, str] = ("<think>", "</think>")

    def write(
        self, reasoning: str = "", content: str = "", calls: Sequence[Call] = (), after: str = ""
    ) -> str:
        """Return the text of an answer."""
        opening, closing = self.marks
        thought = f"{opening}\n{reasoning}\n{closing}\n\n" if reasoning else ""
        return f"{thought}{content}{self.write_calls(calls)}{after}"


@dataclass(frozen=True)
class Harmony(Format):
    """The format of gpt-oss."""

    def write(
        self, reasoning: str = "", content: str = "", calls: Sequence[Call] = (), after: str = ""
    ) -> str:
        """Return the text of an answer; what ends it has no text."""
        messages = [f"<|channel|>analysis<|message|>{reasoning}"] if reasoning else []
        messages += (
            [f"<|channel|>{'commentary' if calls else 'final'}<|message|>{content}"] if content else []
        )
        messages += [
            f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{json.dumps(arguments)}"
            for name, arguments in calls
        ]
        messages += [f"<|channel|>final<|message|>{after}"] if after else []
        return "<|end|><|start|>assistant".join(messages)


THINKING = "{{ tools }}<think></think>"
FORMATS: dict[str, Format] = {
    "hermes": Format(THINKING + "<tool_call>", hermes),
    "qwen3_coder": Format(THINKING + "<tool_call><function=", qwen_coder),
    "llama3_json": Format(THINKING + "<|python_tag|>", llama),
    "mistral list": Format("{{ tools }}[TOOL_CALLS][THINK][/THINK]", mistral_list, ("[THINK]", "[/THINK]")),
    "mistral": Format("{{ tools }}[TOOL_CALLS][THINK][/THINK]", mistral, ("[THINK]", "[/THINK]")),
    "mistral short": Format("{{ tools }}[TOOL_CALLS][THINK][/THINK]", mistral_short, ("[THINK]", "[/THINK]")),
    "deepseek_v3": Format(THINKING + "<｜tool▁sep｜>```json", deepseek_v3),  # noqa: RUF001
    "deepseek_v31": Format(THINKING + "<｜tool▁sep｜>", deepseek_v31),  # noqa: RUF001
    "openai": Harmony("{{ tools }}<|start|><|channel|>", hermes),
}


def chat_format(
    tokenizer: PreTrainedTokenizerFast, template: str, response_template: Any = None, **parsers: str
) -> ChatFormat:
    """Return the format of a model with this template."""
    before = tokenizer.chat_template
    tokenizer.chat_template, tokenizer.response_template = template, response_template
    try:
        return ChatFormat(tokenizer, **parsers)
    finally:
        tokenizer.chat_template, tokenizer.response_template = before, None


def join(events: Sequence[Event]) -> list[tuple[str, Any]]:
    """Return the events with texts in one piece and arguments as objects."""
    joined: list[tuple[str, Any]] = []
    for event in events:
        if isinstance(event, ToolCall):
            joined.append(("call", (event.name, json.loads(event.arguments))))
            continue
        assert isinstance(event, Content | Reasoning) and event.text
        kind = "content" if isinstance(event, Content) else "reasoning"
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + event.text)
        else:
            joined.append((kind, event.text))
    return joined


def parse(parser: AnswerParser, pieces: Sequence[str]) -> list[tuple[str, Any]]:
    """Return all events of an answer that comes in these pieces."""
    events = [event for piece in pieces for event in parser.feed(piece)]
    return join([*events, *parser.finish()])
