"""MessagesRequest: the body of POST /v1/messages, with Anthropic's names. Knows no chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from turboquant_server.api.chat_request import TextPart, ToolName
from turboquant_server.api.generation_request import MAX_STOP_STRINGS
from turboquant_server.api.media import ReadableOnly, media_note
from turboquant_server.api.request_model import NonEmptyText, RequestModel, Text, only

NEEDED_FIELDS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "thinking": ("thinking",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}


class TextBlock(TextPart):
    """A piece of text."""

    harmless_fields = frozenset({"cache_control", "citations"})


class MediaBlock(RequestModel):
    """Something that a tool has returned and no model here can read."""

    harmless_fields = frozenset({"cache_control", "citations", "context", "source", "title"})

    type: Literal["image", "document"]

    @property
    def text(self) -> str:
        """What the model is told of it."""
        return media_note(self.type)


def _check_input(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("not_unicode", "Input should be valid Unicode text") from error
    except RecursionError as error:
        raise PydanticCustomError("too_deep", "Input should have fewer levels") from error
    return value


class ContentBlock(RequestModel):
    """One block of a message; which fields it must have depends on its type."""

    harmless_fields = frozenset(
        {"cache_control", "caller", "citations", "data", "signature", "toolset_name"}  # data is redacted
    )

    type: Annotated[Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"], ReadableOnly]
    text: Text | None = Field(None, validate_default=True)
    thinking: Text | None = Field(None, validate_default=True)
    id: NonEmptyText | None = Field(None, validate_default=True)
    name: NonEmptyText | None = Field(None, validate_default=True)
    input: Annotated[dict[str, Any], AfterValidator(_check_input)] | None = Field(None, validate_default=True)
    tool_use_id: Text | None = Field(None, validate_default=True)
    content: Text | Annotated[list[TextBlock | MediaBlock], Field(fail_fast=True)] | None = None
    is_error: bool | None = None

    @field_validator("text", "thinking", "id", "name", "input", "tool_use_id")
    @classmethod
    def _check_needed(cls, value: object, info: ValidationInfo) -> object:
        if value is None and info.field_name in NEEDED_FIELDS.get(info.data.get("type", ""), ()):
            raise PydanticCustomError("missing", "Field required")
        return value


class InputMessage(RequestModel):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[ContentBlock], Field(fail_fast=True)]


def _check_tool_type(kind: str) -> str:
    if kind != "custom":
        raise PydanticCustomError(
            "unsupported_parameter", "This server has no tools of its own; only those of the type custom"
        )
    return kind


class CustomTool(RequestModel):
    """A tool of the client's."""

    harmless_fields = frozenset(
        {"allowed_callers", "cache_control", "defer_loading", "eager_input_streaming", "input_examples"}
    )

    type: Annotated[str, AfterValidator(_check_tool_type)] | None = None
    name: ToolName
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(RequestModel):
    """Whether the model is to call a tool, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = Field(None, validate_default=True)
    disable_parallel_tool_use: bool | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: object, info: ValidationInfo) -> object:
        if name is None and info.data.get("type") == "tool":
            raise PydanticCustomError("missing", "Field required")
        return name


class Thinking(RequestModel):
    """Whether the model is to think. How much of it there is, nothing enforces."""

    harmless_fields = frozenset({"budget_tokens", "display"})

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]


class OutputFormat(RequestModel):
    """A schema that the answer must keep to."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestModel):
    """What is wanted of the answer."""

    harmless_fields = frozenset({"task_budget"})

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(RequestModel):
    """The body of POST /v1/messages/count_tokens: what a prompt is made of."""

    harmless_fields = frozenset(
        {
            *("billing_policy", "cache_control", "context_management", "diagnostics"),
            *("fallback_credit_token", "fallbacks", "inference_geo", "metadata", "service_tier", "speed"),
            *("user_profile_id", "workspace_id"),
        }
    )

    model: Text | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1, fail_fast=True)]
    system: Text | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    tools: Annotated[list[CustomTool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its older place

    compaction: Annotated[Any, only()] = None
    container: Annotated[Any, only()] = None
    mcp_servers: Annotated[Any, only([])] = None
    thread: Annotated[Any, only()] = None

    @property
    def schema_format(self) -> OutputFormat | None:
        """The schema, wherever it stands."""
        return (self.output_config and self.output_config.format) or self.output_format


class MessagesRequest(CountTokensRequest):
    """The body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[NonEmptyText], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
