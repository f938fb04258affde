"""``[TOOL_CALLS][{"name": ..., "arguments": {...}}]`` and the later ``[TOOL_CALLS]name[ARGS]{...}``."""

from __future__ import annotations

from turboquant_server.parsing.calls import Tools, read_text_and_calls
from turboquant_server.parsing.layout import CallForm
from turboquant_server.parsing.source import Source, Steps
from turboquant_server.parsing.tool_call import take_arguments, take_calls

OPENING, CALL_ID, ARGUMENTS = MARKS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
FORM = CallForm(start=OPENING + "{name}" + ARGUMENTS, end="")
LIST_FORM = CallForm(
    start='{"name": "{name}", "arguments": ', end="}", before=OPENING + " [", between=", ", after="]"
)


def read_answer(source: Source, tools: Tools) -> Steps[None]:
    """Read text and calls."""
    yield from read_text_and_calls(source, (OPENING,), _read_calls)


def _read_calls(source: Source) -> Steps[None]:
    yield from source.take(OPENING)
    yield from source.take_space()
    if (yield from source.peek("[", "{")):
        calls = yield from take_calls(source)
    else:
        name = yield from source.take_name()
        if (yield from source.take_one_of(CALL_ID)):
            yield from source.take_name()
        yield from source.take_one_of(ARGUMENTS)
        yield from source.take_space()
        calls = [(yield from take_arguments(source, name))]
    source.commit()
    yield from calls
