"""The tools of a response as functions that a model calls, and its calls as the client knows them.

A function of a namespace has that before its name; a tool that takes plain text is a function with one
argument.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from turboquant_server.api.chat_request import MAX_NAME_LENGTH, FunctionDefinition
from turboquant_server.api.errors import invalid_request
from turboquant_server.api.responses_items import CUSTOM_INPUT
from turboquant_server.api.responses_tools import (
    CustomTool,
    FunctionTool,
    GrammarFormat,
    PlacedTool,
    ResponsesTool,
    callable_tools,
)

FUNCTION_FIELDS = set(FunctionDefinition.model_fields)
CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {CUSTOM_INPUT: {"type": "string", "description": "The whole input, as plain text."}},
    "required": [CUSTOM_INPUT],
    "additionalProperties": False,
}


class ClientCall(NamedTuple):
    """What a client calls a function that the model may call."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


def model_name(name: str, namespace: str | None) -> str:
    """Return the name that a function has for the model."""
    return f"{namespace}__{name}" if namespace else name


def client_calls(tools: Sequence[ResponsesTool] | None) -> dict[str, ClientCall]:
    """Return what a client calls each function, by the name that it has for the model.

    Raises:
        ApiError: Two have the same name there, or one has a name that is too long (400).
    """
    calls: dict[str, ClientCall] = {}
    for placed in callable_tools(tools):
        call = ClientCall(placed.tool.name, placed.namespace_name, isinstance(placed.tool, CustomTool))
        name, param = model_name(call.name, call.namespace), f"{placed.path}.name"
        if len(name) > MAX_NAME_LENGTH:
            message = f"Invalid '{param}': '{name}' is longer than {MAX_NAME_LENGTH} characters."
            raise invalid_request(message, param, "invalid_value")
        if calls.setdefault(name, call) != call:
            message = f"Invalid '{param}': another tool has the name '{name}', too."
            raise invalid_request(message, param, "invalid_value")
    return calls


def to_function(placed: PlacedTool) -> dict[str, Any]:
    """Return what the model is told of a tool."""
    tool, namespace = placed.tool, placed.namespace
    if isinstance(tool, FunctionTool):
        function = tool.model_dump(include=FUNCTION_FIELDS, exclude_unset=True)
    else:
        function = {"description": _describe_custom(tool), "parameters": CUSTOM_PARAMETERS}
    function["name"] = model_name(tool.name, placed.namespace_name)
    if namespace and namespace.description and tool is namespace.tools[0]:
        texts = (namespace.description, function.get("description"))
        function["description"] = "\n\n".join(text for text in texts if text)
    return function


def _describe_custom(tool: CustomTool) -> str | None:
    if not isinstance(tool.format, GrammarFormat):
        return tool.description
    grammar = f"The input follows this {tool.format.syntax} grammar:\n{tool.format.definition}"
    return f"{tool.description}\n\n{grammar}" if tool.description else grammar


def read_input(arguments: str) -> str:
    """Return the plain text that the model has called a tool with; what is something else as it is."""
    text = json.loads(arguments).get(CUSTOM_INPUT)
    return text if isinstance(text, str) else arguments
