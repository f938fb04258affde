"""Messages and texts to token ids, and back."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from turboquant_server.api.chat_request import ChatMessage
from turboquant_server.api.conversation import to_template
from turboquant_server.api.errors import invalid_request
from turboquant_server.api.spelling import Spelling, spell_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from turboquant_server.model_manager import ModelManager

Result = TypeVar("Result")


class ChatPrompt(NamedTuple):
    """A conversation in the model's own format, as text and as tokens."""

    text: str
    token_ids: list[int]


class PromptTokenizer:
    """Tokenize prompts on a thread of its own.

    A long prompt takes seconds, in which the event loop must go on; and it is one thread, because fast
    tokenizers must not be shared between threads.

    Args:
        model_manager: Its tokenizer is used by this object only.
    """

    def __init__(self, model_manager: ModelManager) -> None:
        self._model_manager = model_manager
        self._spellings: dict[int, Spelling] = {}
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def tokenize_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of ``text``, with those that the model wants at its start.

        Raises:
            ApiError: The text is far too long for the model (400).
        """
        return await self._run(self._tokenize, text, add_special_tokens, "prompt")

    async def tokenize_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
    ) -> ChatPrompt:
        """Return a conversation in the model's own format.

        Args:
            messages: The conversation.
            tools: What the model may call, as OpenAI describes it.
            template_kwargs: More variables of the chat template.
            add_generation_prompt: Go on to where the answer starts.
            continue_final_message: Leave the last message open, so that the answer goes on with it.
            add_special_tokens: Add those that the model wants at the start of a text, which a template
                writes itself.

        Raises:
            ApiError: The model has no chat template, or it refuses this conversation, or this is far too
                long for the model (400).
        """
        has_text_arguments = self._model_manager.chat_format.has_text_arguments
        options = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }

        def tokenize(tokenizer: PreTrainedTokenizerBase) -> ChatPrompt:
            text = _render_chat(tokenizer, messages, has_text_arguments, options, template_kwargs or {})
            return ChatPrompt(text, self._tokenize(tokenizer, text, add_special_tokens, "messages"))

        return await self._run(tokenize)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return await self._run(_decode, token_ids)

    async def name_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        """Return what the tokenizer calls each token; None where it has no name."""
        return await self._run(_name_tokens, token_ids)

    async def spell(self, token_ids: Iterable[int]) -> Mapping[int, Spelling]:
        """Return what these tokens stand for; others may be among them."""
        if unknown := set(token_ids) - self._spellings.keys():
            self._spellings |= await self._run(spell_tokens, sorted(unknown))
        return self._spellings

    def _tokenize(
        self, tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool, param: str
    ) -> list[int]:
        # A text of 60 MB would take minutes, in which nobody else's is tokenized.
        max_model_len = self._model_manager.max_model_len
        if len(text) > max_model_len * self._max_token_length:
            message = (
                f"This model's maximum context length is {max_model_len} tokens. However, your prompt has "
                f"{len(text)} characters, more than so many tokens can stand for. Please shorten the prompt."
            )
            raise invalid_request(message, param, "context_length_exceeded")
        # verbose=False: no warning about long texts, which are refused with an error of their own.
        return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    @cached_property
    def _max_token_length(self) -> int:
        """The characters of the longest token's name, which has at least as many as its text."""
        return max(map(len, self._model_manager.tokenizer.get_vocab()))

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


def _render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[ChatMessage],
    has_text_arguments: bool,
    options: Mapping[str, Any],
    template_kwargs: Mapping[str, Any],
) -> str:
    if not tokenizer.chat_template:
        raise invalid_request("This model has no chat template; use /v1/completions instead.")
    taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() | {"messages"}
    for name in taken & template_kwargs.keys():
        param = f"chat_template_kwargs.{name}"
        raise invalid_request(f"Invalid '{param}': it is no variable of templates.", param, "invalid_value")
    conversation = to_template(messages, str(tokenizer.chat_template), has_text_arguments)
    try:
        text = _render(tokenizer, conversation, {**options, **template_kwargs})
        text.encode()  # JSON in JSON, such as a call's arguments, can make a lone surrogate, too
    except Exception as error:  # templates fail in many ways, and clients choose their variables
        message = f"The model's chat template does not take these messages: {error}"
        raise invalid_request(message, "messages") from error
    return text


def _render(
    tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]], options: Mapping[str, Any]
) -> str:
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, **options))
    except Exception:
        if all(message["content"] is not None for message in conversation):
            raise
    # Calls without text: some templates look whether there is a content, others add to it.
    conversation = [{**message, "content": message["content"] or ""} for message in conversation]
    return str(tokenizer.apply_chat_template(conversation, tokenize=False, **options))
