"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, NamedTuple, cast

from fastapi import Request
from fastapi.responses import Response

from turboquant_server.api.completion_request import CompletionRequest
from turboquant_server.api.generation import (
    Answer,
    Outputs,
    check_vocabulary,
    chunk_writer,
    collect,
    count_usage,
    generate,
    make_prompt,
)
from turboquant_server.api.models import resolve_model
from turboquant_server.api.prompts import check_token_ids
from turboquant_server.api.response_models import Completion, CompletionChoice
from turboquant_server.api.streaming import stream_events
from turboquant_server.api.structured_output import find_grammar
from turboquant_server.api.token_report import CompletionTokenReport

if TYPE_CHECKING:
    from turboquant_server.api.prompts import PromptTokenizer
    from turboquant_server.model_manager import ModelManager

DEFAULT_MAX_TOKENS = 16


class _Prompt(NamedTuple):
    """A prompt.

    Attributes:
        param: Its place in the body.
        text: As it was given or, if that may be asked for, as its tokens have it.
        token_ids: Its tokens.
    """

    param: str
    text: str
    token_ids: list[int]


class _Answer(Answer):
    """An answer, the prompt that it continues and what is told of its tokens."""

    def __init__(self, prompt: _Prompt, report: CompletionTokenReport) -> None:
        super().__init__(num_prompt_tokens=len(prompt.token_ids))
        self.prompt = prompt
        self.report = report


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
    vocab_size = model_manager.engine.vocab_size
    check_vocabulary(body, vocab_size)
    grammar = await find_grammar(model_manager, body)
    tokenized = await _tokenize(body, prompt_tokenizer, vocab_size)
    prompts = [
        make_prompt(body, token_ids, max_tokens, model_manager.max_model_len, param, grammar=grammar)
        for param, _, token_ids in tokenized
    ]
    response_id = f"cmpl-{uuid.uuid4().hex}"
    template = Completion(id=response_id, created=int(time.time()), model=model, choices=[])
    outputs = generate(model_manager, prompts, response_id)
    num_choices = body.n or 1
    answers = [
        _Answer(prompt, CompletionTokenReport(body, prompt_tokenizer))
        for prompt in tokenized
        for _ in range(num_choices)
    ]
    if body.stream:
        return stream_events(_stream_chunks(outputs, template, body, answers))
    await collect(outputs, answers, http_request)
    choices = [
        CompletionChoice(
            index=index,
            text=(answer.prompt.text if body.echo else "") + answer.text,
            finish_reason=answer.finish_reason,
            prompt_token_ids=answer.prompt.token_ids if body.return_token_ids else None,
            **await answer.report.take(answer),
        )
        for index, answer in enumerate(answers)
    ]
    return template.model_copy(update={"choices": choices, "usage": count_usage(answers, num_choices)})


async def _tokenize(
    body: CompletionRequest, prompt_tokenizer: PromptTokenizer, vocab_size: int
) -> list[_Prompt]:
    """Return the prompts of a body.

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
            tokenized.append(_Prompt(param, prompt, await prompt_tokenizer.tokenize_text(prompt)))
            continue
        check_token_ids(prompt, vocab_size, param)
        text = await prompt_tokenizer.decode(prompt) if body.echo else ""
        tokenized.append(_Prompt(param, text, prompt))
    return tokenized


async def _stream_chunks(
    outputs: Outputs, template: Completion, body: CompletionRequest, answers: Sequence[_Answer]
) -> AsyncGenerator[str, None]:
    """Yield what each step adds, as JSON, the last of each answer with its end; then the usage, if wanted."""
    num_choices = body.n or 1
    chunk = chunk_writer(template, body, answers, num_choices)
    if body.echo or body.return_token_ids:
        for index, answer in enumerate(answers):
            yield chunk(choices=[_opening(index, answer.prompt, body)])
    async with aclosing(outputs):
        async for index, output in outputs:
            answer = answers[index]
            answer.add(output)
            if output.text or output.finish_reason is not None:
                choice = CompletionChoice(
                    index=index,
                    text=output.text,
                    finish_reason=output.finish_reason,
                    **await answer.report.take(answer),
                )
                yield chunk(choices=[choice])
    if body.include_usage:
        yield chunk(usage=count_usage(answers, num_choices))


def _opening(index: int, prompt: _Prompt, body: CompletionRequest) -> CompletionChoice:
    """Return what a stream tells of an answer's prompt."""
    return CompletionChoice(
        index=index,
        text=prompt.text if body.echo else "",
        finish_reason=None,
        prompt_token_ids=prompt.token_ids if body.return_token_ids else None,
    )
