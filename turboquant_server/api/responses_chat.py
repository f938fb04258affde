"""A ResponsesRequest as the chat completion that asks for the same, and its errors back in its own words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, takewhile
from typing import Any

from turboquant_server.api.chat_request import ChatCompletionRequest
from turboquant_server.api.generation_request import GenerationRequest
from turboquant_server.api.responses_calls import model_name, to_function
from turboquant_server.api.responses_items import (
    CallOutputItem,
    ContentPart,
    CustomToolCallItem,
    FunctionCallItem,
    Item,
    MediaPart,
    MessageItem,
    ReasoningItem,
    ReasoningPart,
)
from turboquant_server.api.responses_request import JsonSchemaFormat, ResponsesRequest
from turboquant_server.api.responses_tools import AllowedTools, NamedTool, ToolChoice, callable_tools

# What a chat completion's fields are called here.
FIELD_NAMES = {
    "messages": "input",
    "tool message": "function_call_output",
    "tool_call_id": "call_id",
    "response_format": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
}
SHARED_FIELDS = GenerationRequest.model_fields.keys() - {"stream", "stream_options"}


def to_chat(body: ResponsesRequest) -> tuple[ChatCompletionRequest, dict[str, str]]:
    """Return the chat completion that asks for the same, and what its fields are called in ``body``."""
    messages, names = _to_messages(body)
    text_format = body.text and body.text.format
    schema = text_format if isinstance(text_format, JsonSchemaFormat) else None
    tools = list(callable_tools(body.tools))
    fields: dict[str, Any] = {name: getattr(body, name) for name in SHARED_FIELDS & body.model_fields_set}
    fields |= {
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "tools": [{"type": "function", "function": to_function(tool)} for tool in tools],
        "tool_choice": _to_tool_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning and body.reasoning.effort,
        "chat_template_kwargs": body.chat_template_kwargs,
        "response_format": text_format and {"type": text_format.type, "json_schema": schema},
        "logprobs": body.num_logprobs is not None,
        "top_logprobs": body.num_logprobs,
    }
    names |= {
        f"tools[{index}].function.parameters": f"{tool.path}.parameters" for index, tool in enumerate(tools)
    }
    return ChatCompletionRequest.model_validate(fields), FIELD_NAMES | names


def _to_tool_choice(choice: ToolChoice | None) -> object:
    if isinstance(choice, NamedTool):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, AllowedTools):
        tools = [_to_tool_choice(tool) for tool in choice.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return choice


def _to_messages(body: ResponsesRequest) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the messages, and where in the input the parts are that an error of theirs may name."""
    items = [MessageItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    # Many templates know one system message, at the start.
    leading = list(takewhile(_is_instruction, items))
    instructions = [body.instructions] if body.instructions else []
    instructions += [_to_text(item.content) for item in leading if isinstance(item, MessageItem)]
    messages: list[dict[str, Any]] = (
        [{"role": "system", "content": "\n".join(instructions)}] if instructions else []
    )
    names: dict[str, str] = {}
    rest = enumerate(items[len(leading) :], len(leading))
    for is_answer, run in groupby(rest, lambda place: _is_answer(place[1])):
        places = list(run)
        if is_answer:
            calls = [
                place for place, item in places if isinstance(item, FunctionCallItem | CustomToolCallItem)
            ]
            names |= {
                f"messages[{len(messages)}].tool_calls[{index}]": f"input[{place}]"
                for index, place in enumerate(calls)
            }
            messages.append(_join_answer([item for _, item in places]))
            continue
        for place, item in places:
            names[f"messages[{len(messages)}].tool_call_id"] = f"input[{place}].call_id"
            messages.append(_to_message(item))
    return messages, names


def _is_instruction(item: Item) -> bool:
    return isinstance(item, MessageItem) and item.role in ("system", "developer")


def _is_answer(item: Item) -> bool:
    """Tell whether the model has written an item."""
    if isinstance(item, MessageItem):
        return item.role == "assistant"
    return not isinstance(item, CallOutputItem)


def _join_answer(items: Sequence[Item]) -> dict[str, Any]:
    """Return the one message that the items of an answer make."""
    texts = [_to_text(item.content) for item in items if isinstance(item, MessageItem)]
    thoughts = [_to_text(item.content or "") for item in items if isinstance(item, ReasoningItem)]
    calls = [
        {
            "id": item.call_id,
            "function": {"name": model_name(item.name, item.namespace), "arguments": item.arguments},
        }
        for item in items
        if isinstance(item, FunctionCallItem | CustomToolCallItem)
    ]
    return {
        "role": "assistant",
        "content": "\n".join(texts) if texts or not calls else None,
        "reasoning": "\n".join(thoughts) or None,
        "tool_calls": calls or None,
    }


def _to_message(item: Item) -> dict[str, Any]:
    if isinstance(item, CallOutputItem):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _to_text(item.output)}
    assert isinstance(item, MessageItem)
    return {"role": item.role, "content": _to_text(item.content)}


def _to_text(content: str | Sequence[ContentPart | MediaPart | ReasoningPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
