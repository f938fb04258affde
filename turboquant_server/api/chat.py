"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import Response

from turboquant_server.api.generation import Answer, Outputs, collect, count_usage, generate, make_prompt
from turboquant_server.api.models import resolve_model
from turboquant_server.api.protocol import (
    ChatCompletion,
    ChatCompletionChoice,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionRequest,
    ChunkChoice,
)
from turboquant_server.api.streaming import format_chunk, stream_events

if TYPE_CHECKING:
    from turboquant_server.api.prompts import PromptTokenizer
    from turboquant_server.model_manager import ModelManager


async def create_chat_completion(
    model_manager: ModelManager,
    prompt_tokenizer: PromptTokenizer,
    body: ChatCompletionRequest,
    http_request: Request,
) -> ChatCompletion | Response:
    """Answer a conversation, at once or as a stream of chunks.

    Raises:
        ApiError: The request cannot be served as it is.
        ClientDisconnect: The client has left before the answer was complete.
    """
    model = resolve_model(model_manager, body.model)
    token_ids = await prompt_tokenizer.tokenize_chat(body.messages)
    max_tokens = body.max_completion_tokens or body.max_tokens
    prompt = make_prompt(body, token_ids, max_tokens, model_manager.max_model_len, param="messages")
    response_id = f"chatcmpl-{uuid.uuid4().hex}"
    created = int(time.time())
    outputs = generate(model_manager, [prompt], response_id)
    num_choices = body.n or 1
    if body.stream:
        template = ChatCompletionChunk(id=response_id, created=created, model=model, choices=[])
        return stream_events(_stream_chunks(outputs, template, num_choices, body.include_usage))
    answers = await collect(outputs, num_choices, http_request)
    return ChatCompletion(
        id=response_id,
        created=created,
        model=model,
        choices=[
            ChatCompletionChoice(
                index=index,
                message=ChatCompletionMessage(content=answer.text),
                finish_reason=answer.finish_reason,
            )
            for index, answer in enumerate(answers)
        ],
        usage=count_usage(answers, num_choices),
    )


async def _stream_chunks(
    outputs: Outputs, template: ChatCompletionChunk, num_choices: int, include_usage: bool
) -> AsyncGenerator[str, None]:
    """Yield the chunks of the answers as JSON: roles, texts, ends and, if asked for, the usage."""
    answers = [Answer() for _ in range(num_choices)]

    chunk = partial(format_chunk, template, include_usage)
    for index in range(num_choices):
        yield chunk(choices=[ChunkChoice(index=index, delta={"role": "assistant", "content": ""})])
    async with aclosing(outputs):
        async for index, output in outputs:
            answers[index].add(output)
            if output.text:
                yield chunk(choices=[ChunkChoice(index=index, delta={"content": output.text})])
            if output.finish_reason is not None:
                end = ChunkChoice(index=index, delta={}, finish_reason=output.finish_reason)
                yield chunk(choices=[end])
    if include_usage:
        yield chunk(usage=count_usage(answers, num_choices))
