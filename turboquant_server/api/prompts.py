"""Messages and texts to token ids, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import jinja2

from turboquant_server.api.errors import invalid_request
from turboquant_server.api.protocol import ChatMessage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from turboquant_server.model_manager import ModelManager

Result = TypeVar("Result")


class PromptTokenizer:
    """Tokenize prompts on a thread of its own.

    A long prompt takes seconds, in which the event loop must go on; and it is one thread, because fast
    tokenizers must not be shared between threads.

    Args:
        model_manager: Its tokenizer is used by this object only.
    """

    def __init__(self, model_manager: ModelManager) -> None:
        self._model_manager = model_manager
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def tokenize_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of ``text``, with those that the model wants at its start."""
        return await self._run(_tokenize, text, add_special_tokens)

    async def tokenize_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Return the tokens of a conversation in the model's own format.

        Args:
            messages: The conversation.
            add_generation_prompt: Go on to where the answer starts.
            add_special_tokens: Add those that the model wants at the start of a text, which a template
                writes itself.

        Raises:
            ApiError: The model has no chat template, or it refuses this conversation (400).
        """
        return await self._run(_tokenize_chat, messages, add_generation_prompt, add_special_tokens)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return await self._run(_decode, token_ids)

    async def name_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        """Return what the tokenizer calls each token; None where it has no name."""
        return await self._run(_name_tokens, token_ids)

    async def _run(self, function: Callable[..., Result], *args: object) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, function, self._model_manager.tokenizer, *args)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Check that the model takes these tokens.

    Raises:
        ApiError: One is not in the vocabulary (400).
    """
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            message = f"Invalid '{param}': token {token_id} is not in the vocabulary of {vocab_size}."
            raise invalid_request(message, param, "invalid_value")


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(token_ids)))


def _name_tokens(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str | None]:
    return list(tokenizer.convert_ids_to_tokens(list(token_ids)))


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    # verbose=False: no warning about long texts, which are refused with an error of their own.
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _tokenize_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool,
    add_special_tokens: bool,
) -> list[int]:
    if not tokenizer.chat_template:
        raise invalid_request("This model has no chat template; use /v1/completions instead.")
    knows_developer = "developer" in str(tokenizer.chat_template)
    conversation = [_to_template(message, knows_developer) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        message = f"The model's chat template does not take these messages: {error}"
        raise invalid_request(message, "messages") from error
    return _tokenize(tokenizer, str(text), add_special_tokens)


def _to_template(message: ChatMessage, knows_developer: bool) -> dict[str, Any]:
    """Return a message as chat templates expect it: content as one string."""
    parts = [message.content] if isinstance(message.content, str) else [part.text for part in message.content]
    # "developer" is OpenAI's newer word for "system"; most templates would drop such a message.
    role = "system" if message.role == "developer" and not knows_developer else message.role
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    return {
        "role": role,
        "content": "\n".join(parts),
        **{key: value for key, value in optional.items() if value is not None},
    }
