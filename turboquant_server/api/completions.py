"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, cast

from fastapi import Request
from fastapi.responses import Response

from turboquant_server.api.generation import Answer, Outputs, collect, count_usage, generate, make_prompt
from turboquant_server.api.models import resolve_model
from turboquant_server.api.prompts import check_token_ids
from turboquant_server.api.protocol import Completion, CompletionChoice, CompletionRequest
from turboquant_server.api.streaming import format_chunk, stream_events

if TYPE_CHECKING:
    from turboquant_server.api.prompts import PromptTokenizer
    from turboquant_server.model_manager import ModelManager

DEFAULT_MAX_TOKENS = 16


async def create_completion(
    model_manager: ModelManager,
    prompt_tokenizer: PromptTokenizer,
    body: CompletionRequest,
    http_request: Request,
) -> Completion | Response:
    """Continue one text or several, at once or as a stream.

    Raises:
        ApiError: The request cannot be served as it is.
        ClientDisconnect: The client has left before the answers were complete.
    """
    model = resolve_model(model_manager, body.model)
    max_tokens = body.max_tokens or DEFAULT_MAX_TOKENS
    prompts = [
        make_prompt(body, token_ids, max_tokens, model_manager.max_model_len, param)
        for param, token_ids in await _tokenize(body, prompt_tokenizer, model_manager.engine.vocab_size)
    ]
    response_id = f"cmpl-{uuid.uuid4().hex}"
    template = Completion(id=response_id, created=int(time.time()), model=model, choices=[])
    outputs = generate(model_manager, prompts, response_id)
    num_choices = body.n or 1
    if body.stream:
        return stream_events(_stream_chunks(outputs, template, len(prompts), num_choices, body.include_usage))
    answers = await collect(outputs, len(prompts) * num_choices, http_request)
    choices = [
        CompletionChoice(index=index, text=answer.text, finish_reason=answer.finish_reason)
        for index, answer in enumerate(answers)
    ]
    return template.model_copy(update={"choices": choices, "usage": count_usage(answers, num_choices)})


async def _tokenize(
    body: CompletionRequest, prompt_tokenizer: PromptTokenizer, vocab_size: int
) -> list[tuple[str, list[int]]]:
    """Return each prompt's place in the body and its tokens.

    Raises:
        ApiError: A token id is not in the vocabulary (400).
    """
    prompts: list[tuple[str, str | list[int]]]
    match body.prompt:
        case str() as text:
            prompts = [("prompt", text)]
        case [int(), *_] as token_ids:
            prompts = [("prompt", cast(list[int], token_ids))]
        case several:
            prompts = [
                (f"prompt[{index}]", prompt)
                for index, prompt in enumerate(cast(list[str | list[int]], several))
            ]
    tokenized = []
    for param, prompt in prompts:
        if isinstance(prompt, str):
            tokenized.append((param, await prompt_tokenizer.tokenize_text(prompt)))
            continue
        check_token_ids(prompt, vocab_size, param)
        tokenized.append((param, prompt))
    return tokenized


async def _stream_chunks(
    outputs: Outputs, template: Completion, num_prompts: int, num_choices: int, include_usage: bool
) -> AsyncGenerator[str, None]:
    """Yield what each step adds, as JSON, the last of each answer with its end; then the usage, if wanted."""
    answers = [Answer() for _ in range(num_prompts * num_choices)]

    chunk = partial(format_chunk, template, include_usage)
    async with aclosing(outputs):
        async for index, output in outputs:
            answers[index].add(output)
            if output.text or output.finish_reason is not None:
                choice = CompletionChoice(index=index, text=output.text, finish_reason=output.finish_reason)
                yield chunk(choices=[choice])
    if include_usage:
        yield chunk(usage=count_usage(answers, num_choices))
