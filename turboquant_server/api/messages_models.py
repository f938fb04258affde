"""The bodies of responses with Anthropic's names. Knows no tokenizer and no engine."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel


class TextContent(BaseModel):
    """Text for the user."""

    type: Literal["text"] = "text"
    text: str = ""


class ThinkingContent(BaseModel):
    """Text in which the model thinks. Nothing is signed."""

    type: Literal["thinking"] = "thinking"
    thinking: str = ""
    signature: str = ""


class ToolUseContent(BaseModel):
    """A call that the model wants to be made."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any] = {}


Content: TypeAlias = TextContent | ThinkingContent | ToolUseContent

StopReason: TypeAlias = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class MessageUsage(BaseModel):
    """How many tokens a request took; those of the prompt that were found in the cache count apart."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class Message(BaseModel):
    """The response to POST /v1/messages."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Content]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    """The response to POST /v1/messages/count_tokens."""

    input_tokens: int
