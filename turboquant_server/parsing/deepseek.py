"""DeepSeek's calls, parts between marks: function, name and fenced JSON (V3, R1), or name and JSON (V3.1)."""

from __future__ import annotations

from turboquant_server.parsing.calls import Tools, read_text_and_calls
from turboquant_server.parsing.layout import CallForm
from turboquant_server.parsing.source import Source, Steps
from turboquant_server.parsing.tool_call import take_arguments

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001
SEPARATOR = "<｜tool▁sep｜>"  # noqa: RUF001
FENCE = "```"
MARKS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
V3_FORM = CallForm(
    start=f"{CALL_BEGIN}function{SEPARATOR}{{name}}\n{FENCE}json\n",
    end=f"\n{FENCE}{CALL_END}",
    before=CALLS_BEGIN,
    between="\n",
    after=CALLS_END,
)
V31_FORM = CallForm(
    start=f"{CALL_BEGIN}{{name}}{SEPARATOR}", end=CALL_END, before=CALLS_BEGIN, after=CALLS_END
)


def read_answer(source: Source, tools: Tools) -> Steps[None]:
    """Read text and calls."""
    yield from read_text_and_calls(source, (CALLS_BEGIN, CALL_BEGIN), _read_calls)


def _read_calls(source: Source) -> Steps[None]:
    yield from source.take_one_of(CALLS_BEGIN)
    yield from source.take_space()
    while True:
        yield from source.take(CALL_BEGIN)
        name = yield from source.take_until(SEPARATOR)
        yield from source.take_space()
        if (yield from source.peek("{")) is None:  # V3: what came before says that it is a function
            name = yield from source.take_until(f"{FENCE}json")
            yield from source.take_space()
        call = yield from take_arguments(source, name.strip())
        yield from source.take_space()
        yield from source.take_one_of(FENCE)
        yield from source.take_space()
        yield from source.take_or_end(CALL_END)
        source.commit()
        yield call
        yield from source.take_space()
        if (yield from source.peek(CALL_BEGIN)) is None:
            yield from source.take_or_end(CALLS_END)
            return
