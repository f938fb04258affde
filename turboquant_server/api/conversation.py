"""Messages as chat templates take them, and the rules between a call and its result. Knows no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from turboquant_server.api.chat_request import ChatMessage
from turboquant_server.api.errors import invalid_request

# What templates call the reasoning of an earlier answer.
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
# Mistral's refuse ids of another length, with these words.
ID_LENGTH = 9
ID_LENGTH_SIGN = f"length != {ID_LENGTH}"


def check_conversation(messages: Sequence[ChatMessage]) -> None:
    """Check that results of tools follow the calls that they belong to, one for each.

    Raises:
        ApiError: One does not, or is missing (400).
    """
    waiting: dict[str, str] = {}  # the ids of calls without result, and where they stand
    known: set[str] = set()
    for index, message in enumerate(messages):
        if message.role == "tool":
            if message.tool_call_id not in known:
                param = f"messages[{index}].tool_call_id"
                raise invalid_request(
                    f"Invalid '{param}': no call right before has this id.",
                    param,
                    "invalid_value",
                )
            waiting.pop(message.tool_call_id or "", None)
            continue
        _check_answered(waiting)
        places = {
            call.id: f"messages[{index}].tool_calls[{place}]"
            for place, call in enumerate(message.tool_calls or ())
        }
        waiting, known = places, set(places)
    _check_answered(waiting)


def _check_answered(waiting: dict[str, str]) -> None:
    if waiting:
        call_id, param = next(iter(waiting.items()))
        raise invalid_request(
            f"Invalid '{param}': its result must follow, a 'tool message' with the 'tool_call_id' "
            f"{call_id!r}.",
            param,
            "invalid_value",
        )


def to_template(
    messages: Sequence[ChatMessage], template: str, has_text_arguments: bool
) -> list[dict[str, Any]]:
    """Return messages as a chat template expects them: content as one string.

    Args:
        messages: The conversation.
        template: The text of the chat template.
        has_text_arguments: The arguments of calls are to be JSON; else they are objects.
    """
    names = {call.id: call.function.name for message in messages for call in message.tool_calls or ()}
    return [_to_template(message, template, names, has_text_arguments) for message in messages]


def _to_template(
    message: ChatMessage, template: str, names: dict[str, str], has_text_arguments: bool
) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    # "developer" is OpenAI's newer word for "system"; most templates would drop such a message.
    role = "system" if message.role == "developer" and "developer" not in template else message.role
    fields: dict[str, Any] = {"name": message.name}
    if message.tool_call_id is not None:
        fields["name"] = message.name or names.get(message.tool_call_id)
        fields["tool_call_id"] = _shorten(message.tool_call_id, template)
    if message.tool_calls:
        texts = [call.function.arguments or "{}" for call in message.tool_calls]
        all_arguments = texts if has_text_arguments else [json.loads(text) for text in texts]
        fields["tool_calls"] = [
            {
                "id": _shorten(call.id, template),
                "type": "function",
                "function": {"name": call.function.name, "arguments": arguments},
            }
            for call, arguments in zip(message.tool_calls, all_arguments, strict=True)
        ]
    if reasoning := message.reasoning_content or message.reasoning:
        keys = [key for key in REASONING_NAMES if key in template]
        if keys != ["thinking"] or not content:  # gpt-oss takes only one of the two beside calls
            fields |= dict.fromkeys(keys, reasoning)
    return {
        "role": role,
        "content": content,
        **{key: value for key, value in fields.items() if value is not None},
    }


def _shorten(call_id: str, template: str) -> str:
    return call_id[-ID_LENGTH:] if ID_LENGTH_SIGN in template else call_id
