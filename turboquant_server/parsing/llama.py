"""``{"name": ..., "parameters": {...}}``: Llama 3, after ``<|python_tag|>`` or as the whole answer."""

from __future__ import annotations

from turboquant_server.parsing.calls import Tools, read_or_keep, read_text_and_calls
from turboquant_server.parsing.layout import CallForm
from turboquant_server.parsing.source import Source, Steps
from turboquant_server.parsing.tool_call import take_calls

PYTHON_TAG = "<|python_tag|>"
MARKS = (PYTHON_TAG,)
# Without the mark: models write it before calls of tools of their own.
FORM = CallForm(start='{"name": "{name}", "parameters": ', end="}", between="; ")


def read_answer(source: Source, tools: Tools) -> Steps[None]:
    """Read text and calls.

    An object without mark that names none of the tools is text: it may be what the user has asked for.
    """
    names = [tool["function"]["name"] for tool in tools]

    def read_calls(source: Source) -> Steps[None]:
        yield from source.take_space()
        while True:
            mark = yield from source.take_one_of(PYTHON_TAG)
            yield from source.take_space()
            calls = yield from take_calls(source)
            if mark is None and any(call.name not in names for call in calls):
                raise source.malformed()
            source.commit()
            yield from calls
            yield from source.take_space()
            yield from source.take_one_of(";")
            yield from source.take_space()
            if (yield from source.peek("{", PYTHON_TAG)) is None:
                source.rewind()
                return

    yield from source.take_space()
    begins = yield from source.peek("{")
    source.rewind()
    if begins:
        yield from read_or_keep(source, read_calls)
    yield from read_text_and_calls(source, (PYTHON_TAG,), read_calls)
