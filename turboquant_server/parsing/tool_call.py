"""JSON that a model has written, to tool calls. Takes nothing that is not valid JSON and an object."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from turboquant_server.parsing.event import ToolCall
from turboquant_server.parsing.source import Source, Wait


def take_calls(source: Source) -> Wait[list[ToolCall]]:
    """Pass the JSON object of a call, or a list of them.

    Raises:
        MalformedError: It is something else.
    """
    text = yield from source.take_json()
    try:
        value = load_json(text)
        calls = [read_call(item) for item in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        calls = []
    if not calls:
        raise source.malformed()
    return calls


def take_arguments(source: Source, name: str) -> Wait[ToolCall]:
    """Pass the JSON object of the arguments of a call.

    Raises:
        MalformedError: It is something else.
    """
    text = yield from source.take_json()
    try:
        return make_call(name, load_json(text))
    except (ValueError, RecursionError) as error:
        raise source.malformed() from error


def read_call(item: object) -> ToolCall:
    """Return the call that an object with a name and arguments, or parameters, stands for.

    Raises:
        ValueError: It stands for none.
    """
    if not isinstance(item, dict):
        raise ValueError("no object")
    arguments = item["parameters"] if "parameters" in item else item.get("arguments", {})
    # Some models write the arguments as OpenAI does: as text.
    return make_call(item.get("name"), load_json(arguments) if isinstance(arguments, str) else arguments)


def make_call(name: object, arguments: object) -> ToolCall:
    """Return the call of a function.

    Raises:
        ValueError: The name is no text, or the arguments are no JSON object.
    """
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("no call")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not (name + text).isascii():
        (name + text).encode()  # a lone surrogate, which JSON's escapes can make, is in no text
    return ToolCall(name, text)


def load_json(text: str) -> Any:
    """Return the value that JSON stands for.

    Raises:
        ValueError: It is no JSON.
    """
    # Not strict: models write line breaks in texts as they are.
    return json.loads(text, strict=False, parse_constant=_refuse, parse_float=_read_float)


def _read_float(text: str) -> float:
    """Return a number, or of one beyond all the largest, as JSON cannot tell of infinity."""
    number = float(text)
    return number if math.isfinite(number) else math.copysign(sys.float_info.max, number)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
