"""What a chat template expects of the calls in earlier answers. Found out by trying."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARGUMENTS = {"some_key": "some value"}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}


def wants_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a model's template puts the arguments of calls into its text as they are.

    Most make JSON of an object; some, such as DeepSeek's, expect JSON.
    """
    try:
        # Where a template prints an object, there is Python in the prompt.
        return str(ARGUMENTS) in _render(tokenizer, ARGUMENTS)
    except Exception:  # templates fail in many ways
        pass
    try:
        return bool(_render(tokenizer, '{"some_key": "some value"}'))
    except Exception:
        return False


def _render(tokenizer: PreTrainedTokenizerBase, arguments: object) -> str:
    call_id = "abcdefghi"
    call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "tool_call_id": call_id, "content": "b"},
    ]
    return str(tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False))
