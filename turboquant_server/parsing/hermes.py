"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen and many others."""

from __future__ import annotations

from turboquant_server.parsing.calls import Tools, read_text_and_calls
from turboquant_server.parsing.layout import CallForm
from turboquant_server.parsing.source import Source, Steps
from turboquant_server.parsing.tool_call import take_calls

OPENING, CLOSING = MARKS = ("<tool_call>", "</tool_call>")
FORM = CallForm(start=OPENING + '\n{"name": "{name}", "arguments": ', end="}\n" + CLOSING, between="\n")


def read_answer(source: Source, tools: Tools) -> Steps[None]:
    """Read text and calls."""
    yield from read_text_and_calls(source, (OPENING,), _read_calls)


def _read_calls(source: Source) -> Steps[None]:
    yield from source.take(OPENING)
    yield from source.take_space()
    calls = yield from take_calls(source)
    yield from source.take_space()
    yield from source.take_or_end(CLOSING)
    source.commit()
    yield from calls
