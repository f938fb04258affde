"""POST /tokenize and /detokenize, with vLLM's fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from turboquant_server.api.chat_request import ChatMessage
from turboquant_server.api.errors import invalid_request
from turboquant_server.api.prompts import check_token_ids
from turboquant_server.api.request_model import RequestModel, Text, only

if TYPE_CHECKING:
    from turboquant_server.api.prompts import PromptTokenizer
    from turboquant_server.model_manager import ModelManager


class TokenizeRequest(RequestModel):
    """The body of POST /tokenize: a text, or the messages of a conversation."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "The harbour"}]})

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    # Chat templates write the special tokens themselves.
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    chat_template: Annotated[Any, only()] = None
    chat_template_kwargs: Annotated[Any, only({})] = None
    continue_final_message: Annotated[Any, only(False)] = None
    mm_processor_kwargs: Annotated[Any, only({})] = None
    tools: Annotated[Any, only([])] = None


class Tokens(BaseModel):
    """The response: tokens, their number, and how many a request may have."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = None


class DetokenizeRequest(RequestModel):
    """The body of POST /detokenize."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [70, 71, 72]}]})

    model: Text | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]


class Detokenized(BaseModel):
    """The response: the text of the tokens, special ones included."""

    prompt: str


async def tokenize(
    model_manager: ModelManager, prompt_tokenizer: PromptTokenizer, body: TokenizeRequest
) -> Tokens:
    """Return the tokens of a text, or of a conversation up to where the answer starts.

    Raises:
        ApiError: Neither or both are given, or the chat template refuses the messages (400).
    """
    if (body.prompt is None) is (body.messages is None):
        raise invalid_request("Give either 'prompt' or 'messages'.", "prompt")
    if body.messages is not None:
        chat = await prompt_tokenizer.tokenize_chat(
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            add_special_tokens=bool(body.add_special_tokens),
        )
        token_ids = chat.token_ids
    else:
        add_special_tokens = body.add_special_tokens is not False
        token_ids = await prompt_tokenizer.tokenize_text(body.prompt or "", add_special_tokens)
    return Tokens(
        count=len(token_ids),
        max_model_len=model_manager.max_model_len,
        tokens=token_ids,
        token_strs=await prompt_tokenizer.name_tokens(token_ids) if body.return_token_strs else None,
    )


async def detokenize(
    model_manager: ModelManager, prompt_tokenizer: PromptTokenizer, body: DetokenizeRequest
) -> Detokenized:
    """Return the text of tokens.

    Raises:
        ApiError: A token id is not in the vocabulary (400).
    """
    check_token_ids(body.tokens, model_manager.engine.vocab_size, "tokens")
    return Detokenized(prompt=await prompt_tokenizer.decode(body.tokens))
