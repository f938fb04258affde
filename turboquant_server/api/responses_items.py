"""The items of a conversation in the body of POST /v1/responses. Knows no chat message."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from turboquant_server.api.chat_request import CalledFunction
from turboquant_server.api.media import ReadableOnly, media_note
from turboquant_server.api.request_model import NonEmptyText, RequestModel, Text, only

ITEM_TYPES = (
    "message",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "reasoning",
    "web_search_call",
)
# The one argument of the function as which the model sees a tool that takes plain text.
CUSTOM_INPUT = "input"

logger = logging.getLogger(__name__)


def type_of(value: object) -> object:
    """Return what a part of a body calls its type, whether it is validated or not."""
    return value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)


class ContentPart(RequestModel):
    """A text of a message or of what a function returned."""

    harmless_fields = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})

    type: Annotated[Literal["input_text", "output_text"], ReadableOnly]
    text: Text


class MediaPart(RequestModel):
    """Something that a function returned and no model here can read."""

    harmless_fields = frozenset(
        {"detail", "file_data", "file_id", "file_url", "filename", "image_url", "prompt_cache_breakpoint"}
    )

    type: Literal["input_image", "input_file"]

    @property
    def text(self) -> str:
        """What the model is told of it."""
        return media_note(self.type)


Content: TypeAlias = Text | Annotated[list[ContentPart], Field(fail_fast=True)]


def _check_item_type(name: str) -> str:
    # A type that is unknown is taken for a message, which has none or its own.
    if name != "message":
        raise PydanticCustomError("invalid_value", f"Input should be one of {', '.join(ITEM_TYPES)}")
    return name


class MessageItem(RequestModel):
    """What somebody said, in the short form or as the item of an earlier output."""

    harmless_fields = frozenset({"id", "phase", "status"})

    type: Annotated[str, AfterValidator(_check_item_type), WithJsonSchema({"const": "message"})] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class FunctionCallItem(CalledFunction):
    """A call in an earlier output."""

    harmless_fields = frozenset({"async", "caller", "id", "status"})

    type: Literal["function_call"]
    call_id: NonEmptyText
    namespace: Text | None = None


class CustomToolCallItem(RequestModel):
    """A call, in an earlier output, of a tool that takes plain text."""

    harmless_fields = frozenset({"async", "caller", "id", "status"})

    type: Literal["custom_tool_call"]
    call_id: NonEmptyText
    name: NonEmptyText
    input: Text
    namespace: Text | None = None

    @property
    def arguments(self) -> str:
        """What the model has called the function with."""
        return json.dumps({CUSTOM_INPUT: self.input}, ensure_ascii=False)


class CallOutputItem(RequestModel):
    """What a function or another tool returned."""

    harmless_fields = frozenset({"caller", "id", "name", "namespace", "status"})

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Text
    output: Text | Annotated[list[ContentPart | MediaPart], Field(fail_fast=True)]


class ReasoningPart(RequestModel):
    """A part of the text of a thought."""

    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(RequestModel):
    """What the model thought in an earlier output."""

    harmless_fields = frozenset({"id", "status", "summary"})

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningPart], Field(fail_fast=True)] | None = None
    encrypted_content: Annotated[
        Any, only(reason="Only the server that has encrypted a thought can read it; leave the item out")
    ] = None


@cache
def _log_left_out(item_type: str) -> None:
    logger.warning("leaving items of the type %s, which another server has written, out", item_type)


def _log_search(item_type: str) -> str:
    _log_left_out(item_type)
    return item_type


class WebSearchCallItem(BaseModel):
    """That another server has searched the web; it tells of no result, so the model is not told of it."""

    type: Annotated[Literal["web_search_call"], AfterValidator(_log_search)]


def _item_kind(name: object) -> str:
    if name == "custom_tool_call_output":
        return "function_call_output"
    return str(name) if name in ITEM_TYPES else "message"


Item: TypeAlias = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[CustomToolCallItem, Tag("custom_tool_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[WebSearchCallItem, Tag("web_search_call")],
    Discriminator(lambda item: _item_kind(type_of(item))),
]
