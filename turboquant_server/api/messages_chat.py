"""Anthropic's messages as a chat: blocks to texts, calls and results, one message for each turn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from turboquant_server.api.chat_request import ChatCompletionRequest
from turboquant_server.api.errors import ApiError, invalid_request
from turboquant_server.api.messages_request import (
    ContentBlock,
    CountTokensRequest,
    InputMessage,
    MessagesRequest,
    TextBlock,
)

# Claude Code's system prompt begins with it. It is another one in each request, so no prompt would ever be
# found in the cache.
BILLING_HEADER = re.compile(r"\Ax-anthropic-billing-header:.*\n?")

# Blocks by the ids of calls, each with the path of where its id stands.
_Blocks: TypeAlias = dict[str, tuple[str, ContentBlock]]

ROLES_OF_BLOCKS = {
    "text": ("user", "assistant", "system"),
    "thinking": ("assistant",),
    "redacted_thinking": ("assistant",),
    "tool_use": ("assistant",),
    "tool_result": ("user",),
}


def to_chat(body: CountTokensRequest) -> ChatCompletionRequest:
    """Return the chat completion that a message stands for.

    Raises:
        ApiError: The blocks of the messages do not fit together (400).
    """
    turns = _read_turns(body.messages)
    system = _system_texts(body.system) + (turns.pop(0).texts if turns[0].role == "system" else [])
    if not turns:
        raise _wrong("messages", "there is none of the role user or assistant")
    chat = _system_messages(system) + list(_to_messages(turns))
    last = turns[-1]
    if last.role == "assistant" and not "".join(last.texts):
        raise _wrong(last.path, "the last message has no text that the answer could go on with")
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": chat,
        "continue_final_message": last.role == "assistant",
        **_tools(body),
        **_reasoning(body),
    }
    if (schema := body.schema_format) is not None:
        json_schema = {"name": "answer", "schema": schema.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "temperature": body.temperature,
            "top_k": body.top_k,
            "top_p": body.top_p,
        }
    return ChatCompletionRequest.model_validate(fields)


@dataclass
class _Turn:
    """Neighbouring messages of one side.

    Attributes:
        role: user, assistant, or system for what comes before the first of them.
        path: Of the first message.
        texts: For the other side.
        notes: System messages that came with the user's.
        thoughts: The model's reasoning.
        calls: Of tools.
        results: Of the calls in the turn before.
    """

    role: str
    path: str
    texts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: _Blocks = field(default_factory=dict)
    results: _Blocks = field(default_factory=dict)


def _read_turns(messages: Sequence[InputMessage]) -> list[_Turn]:
    """Join neighbouring messages of one side, as Anthropic does.

    A system message that comes later is taken as a part of the user's turn: most chat templates know one
    system message, at the start.
    """
    turns: list[_Turn] = []
    for index, message in enumerate(messages):
        is_start = not turns or turns[-1].role == "system"
        side = "user" if message.role == "system" and not is_start else message.role
        if not turns or turns[-1].role != side:
            turns.append(_Turn(side, f"messages[{index}]"))
        _add_message(turns[-1], f"messages[{index}].content", message)
    return turns


def _add_message(turn: _Turn, path: str, message: InputMessage) -> None:
    texts = turn.notes if message.role == "system" and turn.role == "user" else turn.texts
    if isinstance(message.content, str):
        texts.append(message.content)
        return
    for index, block in enumerate(message.content):
        place = f"{path}[{index}]"
        if message.role not in ROLES_OF_BLOCKS[block.type]:
            raise _wrong(f"{place}.type", f"a message of the role {message.role} has no {block.type} blocks")
        if block.type == "text":
            texts.append(block.text or "")
        elif block.type == "thinking":
            turn.thoughts.append(block.thinking or "")
        elif block.type == "tool_use":
            _put(turn.calls, block.id or "", f"{place}.id", block)
        elif block.type == "tool_result":
            _put(turn.results, block.tool_use_id or "", f"{place}.tool_use_id", block)
        # What is redacted nobody but Anthropic can read.


def _put(blocks: _Blocks, call_id: str, path: str, block: ContentBlock) -> None:
    if call_id in blocks:
        raise _wrong(path, "another block of this turn has the same")
    blocks[call_id] = path, block


def _to_messages(turns: Iterable[_Turn]) -> Iterator[dict[str, Any]]:
    calls: _Blocks = {}
    for turn in turns:
        for call_id, (path, _) in turn.results.items():
            if call_id not in calls:
                raise _wrong(path, "the message before has no tool_use block of this id")
        _check_answered(calls, turn.results)
        if turn.role == "assistant":
            yield _assistant_message(turn)
        else:
            yield from _user_messages(turn, calls)
        calls = turn.calls
    _check_answered(calls, {})


def _check_answered(calls: _Blocks, results: _Blocks) -> None:
    for call_id, (path, _) in calls.items():
        if call_id not in results:
            raise _wrong(path, f"a tool_result block with the tool_use_id {call_id!r} must follow")


def _assistant_message(turn: _Turn) -> dict[str, Any]:
    calls = [
        {
            "id": call_id,
            "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)},
        }
        for call_id, (_, block) in turn.calls.items()
    ]
    return {
        "role": "assistant",
        "content": "\n".join(turn.texts) or (None if calls else ""),
        "reasoning": "\n".join(turn.thoughts) or None,
        "tool_calls": calls or None,
    }


def _user_messages(turn: _Turn, calls: _Blocks) -> Iterator[dict[str, Any]]:
    # In the order of the calls: many templates tell results by nothing else.
    results = [
        {"role": "tool", "tool_call_id": call_id, "content": _result_text(turn.results[call_id][1])}
        for call_id in calls
    ]
    if results and not turn.texts:
        # No turn of the user's begins here; many templates leave out the reasoning before one.
        results[-1]["content"] = "\n".join([results[-1]["content"], *turn.notes])
        yield from results
        return
    yield from results
    yield {"role": "user", "content": "\n".join([*turn.texts, *turn.notes])}


def _result_text(block: ContentBlock) -> str:
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    return f"Error: {text}" if block.is_error else text


def _system_texts(system: str | list[TextBlock] | None) -> list[str]:
    return [system] if isinstance(system, str) else [block.text for block in system or ()]


def _system_messages(texts: list[str]) -> list[dict[str, Any]]:
    told = [text for text in (BILLING_HEADER.sub("", text) for text in texts) if text]
    return [{"role": "system", "content": "\n".join(told)}] if told else []


def _tools(body: CountTokensRequest) -> dict[str, Any]:
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
                "strict": tool.strict,
            },
        }
        for tool in body.tools or ()
    ]
    choice = body.tool_choice
    if choice is None:
        return {"tools": tools}
    named = {"type": "function", "function": {"name": choice.name}}
    return {
        "tools": tools,
        "tool_choice": {"auto": "auto", "none": "none", "any": "required", "tool": named}[choice.type],
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
    }


def _reasoning(body: CountTokensRequest) -> dict[str, Any]:
    if body.thinking is not None and body.thinking.type == "disabled":
        return {"reasoning_effort": "none", "include_reasoning": False}
    return {
        "reasoning_effort": body.output_config and body.output_config.effort,
        "chat_template_kwargs": body.thinking and {"enable_thinking": True},
    }


def _wrong(param: str, reason: str) -> ApiError:
    return invalid_request(f"Invalid '{param}': {reason}.", param, "invalid_value")
