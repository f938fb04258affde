"""Calls with a mark for each parameter, as Qwen3-Coder and Qwen3.5 write them.

``<tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>``
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from turboquant_server.parsing.calls import Tools, read_text_and_calls
from turboquant_server.parsing.layout import CallForm
from turboquant_server.parsing.parameter import find_types
from turboquant_server.parsing.source import Source, Steps
from turboquant_server.parsing.tool_call import load_json, make_call

OPENING, CLOSING = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
MARKS = (OPENING, CLOSING, FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END)
FORM = CallForm(
    start=f"{OPENING}\n{FUNCTION}{{name}}>\n",
    end=f"{FUNCTION_END}\n{CLOSING}",
    between="\n",
    parameter=(f"{PARAMETER}{{key}}>\n", f"\n{PARAMETER_END}\n"),
)


def read_answer(source: Source, tools: Tools) -> Steps[None]:
    """Read text and calls.

    A value is text where the schema of the function's parameters allows text, and else JSON.
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    yield from read_text_and_calls(source, (OPENING, FUNCTION), partial(_read_call, schemas=schemas))


def _read_call(source: Source, schemas: Mapping[str, Any]) -> Steps[None]:
    # Some models leave it out.
    opening = yield from source.take_one_of(OPENING)
    yield from source.take_space()
    yield from source.take(FUNCTION)
    name = (yield from source.take_until(">")).strip()
    root = schemas.get(name) or {}
    properties = root.get("properties")
    arguments: dict[str, Any] = {}
    yield from source.take_space()
    while (yield from source.take_one_of(PARAMETER)):
        key = (yield from source.take_until(">")).strip()
        text = yield from source.take_until(PARAMETER_END)
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        arguments[key] = _read_value(text.removeprefix("\n").removesuffix("\n"), find_types(schema, root))
        yield from source.take_space()
    yield from source.take(FUNCTION_END)
    if opening:
        yield from source.take_space()
        yield from source.take_or_end(CLOSING)
    try:
        call = make_call(name, arguments)
    except ValueError as error:
        raise source.malformed() from error
    source.commit()
    yield call


def _read_value(text: str, types: Collection[str]) -> Any:
    if "null" in types and text.strip() in ("null", "None"):
        return None
    if not types or "string" in types:
        return text
    try:
        return load_json({"True": "true", "False": "false"}.get(text.strip(), text))
    except (ValueError, RecursionError):
        return text
