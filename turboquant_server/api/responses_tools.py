"""The tools in the body of POST /v1/responses, and which must be called. Knows no chat message."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Literal, NamedTuple, TypeAlias

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from turboquant_server.api.chat_request import FunctionDefinition, ToolName
from turboquant_server.api.request_model import RequestModel, Text
from turboquant_server.api.responses_items import type_of

# Tools that only OpenAI's service runs, or whose calls and results have a form of their own.
HOSTED_TYPES = (
    "apply_patch",
    "code_interpreter",
    "computer",
    "computer_use",
    "computer_use_preview",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
    "programmatic_tool_calling",
    "shell",
    "tool_search",
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
)
CLIENT_TYPES = ("function", "custom", "namespace")
HARMLESS_FIELDS = frozenset({"allowed_callers", "async", "defer_loading", "output_schema"})

logger = logging.getLogger(__name__)


class _Function(RequestModel):
    """What says that something is a function."""

    type: Literal["function"]


# In this order, so that of several errors that of the type counts.
class FunctionTool(FunctionDefinition, _Function):
    """A function that the model may call."""

    harmless_fields = HARMLESS_FIELDS


class PlainFormat(RequestModel):
    """Any text."""

    type: Literal["text", "grammar"]


class GrammarFormat(RequestModel):
    """A grammar that a text is to follow: the model is told of it, and nothing makes it."""

    type: Literal["grammar"]
    syntax: Literal["lark", "regex"]
    definition: Text


class CustomTool(RequestModel):
    """Something that the model may call with plain text."""

    harmless_fields = HARMLESS_FIELDS

    type: Literal["custom"]
    name: ToolName
    description: Text | None = None
    format: (
        Annotated[
            Annotated[PlainFormat, Tag("plain")] | Annotated[GrammarFormat, Tag("grammar")],
            Discriminator(lambda value: "grammar" if type_of(value) == "grammar" else "plain"),
        ]
        | None
    ) = None


CallableTool: TypeAlias = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[CustomTool, Tag("custom")],
    Discriminator(lambda tool: "custom" if type_of(tool) == "custom" else "function"),
]


class NamespaceTool(RequestModel):
    """Tools that belong together, such as those of an MCP server."""

    type: Literal["namespace"]
    name: ToolName
    description: Text | None = None
    tools: Annotated[list[CallableTool], Field(fail_fast=True)]


@cache
def _log_left_out(tool_type: str) -> None:
    logger.warning("tools of the type %s are not there, so the model is not told of them", tool_type)


def _check_hosted_type(tool_type: str) -> str:
    if tool_type not in HOSTED_TYPES:
        types = ", ".join((*CLIENT_TYPES, *HOSTED_TYPES))
        raise PydanticCustomError("invalid_value", f"Input should be one of {types}")
    _log_left_out(tool_type)
    return tool_type


class HostedTool(BaseModel):
    """A tool that is not there, so that the model is not told of it."""

    type: Annotated[str, AfterValidator(_check_hosted_type), WithJsonSchema({"enum": list(HOSTED_TYPES)})]


ClientTool: TypeAlias = FunctionTool | CustomTool | NamespaceTool
ResponsesTool: TypeAlias = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[NamespaceTool, Tag("namespace")]
    | Annotated[HostedTool, Tag("hosted")],
    Discriminator(lambda tool: name if (name := type_of(tool)) in CLIENT_TYPES else "hosted"),
]


class PlacedTool(NamedTuple):
    """A tool that the model may call, and where it stands."""

    path: str
    tool: FunctionTool | CustomTool
    namespace: NamespaceTool | None = None

    @property
    def namespace_name(self) -> str | None:
        """The name of the namespace, if it stands in one."""
        return self.namespace.name if self.namespace else None


def callable_tools(tools: Sequence[ClientTool | HostedTool] | None) -> Iterator[PlacedTool]:
    """Yield the tools that the model may call, out of their namespaces."""
    for index, tool in enumerate(tools or ()):
        if isinstance(tool, NamespaceTool):
            for place, inner in enumerate(tool.tools):
                yield PlacedTool(f"tools[{index}].tools[{place}]", inner, tool)
        elif not isinstance(tool, HostedTool):
            yield PlacedTool(f"tools[{index}]", tool)


class NamedTool(RequestModel):
    """A tool that is to be called."""

    type: Literal["function", "custom"]
    name: Text


class AllowedTools(RequestModel):
    """Some of the tools, and whether one must be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, fail_fast=True)]


def _choice_kind(choice: object) -> str:
    if isinstance(choice, str):
        return "mode"
    return "some" if type_of(choice) == "allowed_tools" else "one"


ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[NamedTool, Tag("one")]
    | Annotated[AllowedTools, Tag("some")],
    Discriminator(_choice_kind),
]
