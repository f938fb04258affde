"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fastapi import Request
from fastapi.responses import Response

from turboquant_server.api.completion_request import CompletionRequest
from turboquant_server.api.errors import invalid_request
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
from turboquant_server.api.prompt_report import report_prompt
from turboquant_server.api.prompts import check_token_ids
from turboquant_server.api.response_models import Completion, CompletionChoice, CompletionLogprobs
from turboquant_server.api.streaming import stream_events
from turboquant_server.api.structured_output import find_grammar
from turboquant_server.api.timings import measure_timings, prompt_progress
from turboquant_server.api.token_report import CompletionTokenReport
from turboquant_server.engine.request import FinishReason

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
    """An answer, the prompt that it continues and what is told of their tokens."""

    def __init__(self, prompt: _Prompt, report: CompletionTokenReport) -> None:
        super().__init__(num_prompt_tokens=len(prompt.token_ids))
        self.prompt = prompt
        self._report = report

    async def take(self) -> dict[str, Any]:
        """Return what is to be told of the tokens that are new, as fields of a choice."""
        return await self._report.take(self)

    async def echo(self, body: CompletionRequest, first: Answer) -> CompletionLogprobs | None:
        """Return what is told of the prompt as if it were a part of the answer; to be called before `take`.

        Args:
            body: Says whether it is.
            first: The first answer to this prompt.
        """
        if not body.echoes_logprobs:
            return None
        text, token_ids = self.prompt.text, self.prompt.token_ids
        return await self._report.take_prompt(text, token_ids, first.prompt_logprobs, body.logprobs or 0)


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
    model = body.model or model_manager.model_names[0]
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if not (max_tokens or body.echo):
        message = "Invalid 'max_tokens': 0 may be given only together with echo=true."
        raise invalid_request(message, "max_tokens", "invalid_value")
    vocab_size = model_manager.engine.vocab_size
    check_vocabulary(body, vocab_size)
    grammar = await find_grammar(model_manager, body)
    tokenized = await _tokenize(body, prompt_tokenizer, vocab_size)
    prompts = [
        make_prompt(body, token_ids, max_tokens or 1, model_manager.max_model_len, param, grammar=grammar)
        for param, _, token_ids in tokenized
    ]
    response_id = f"cmpl-{uuid.uuid4().hex}"
    template = Completion(id=response_id, created=int(time.time()), model=model, choices=[])
    outputs = generate(model_manager, prompts, response_id)
    if not max_tokens:
        outputs = _without_answers(outputs)
    num_choices = body.n or 1
    answers = [
        _Answer(prompt, CompletionTokenReport(body, prompt_tokenizer))
        for prompt in tokenized
        for _ in range(num_choices)
    ]
    if body.stream:
        chunks = _stream_chunks(outputs, template, body, answers)
        return stream_events(chunks, model_manager.config.sse_keep_alive_interval)
    await collect(outputs, answers, http_request)
    choices = []
    for index, answer in enumerate(answers):
        first = answers[index - index % num_choices]
        echoed, told = await answer.echo(body, first), await answer.take()
        if echoed is not None:
            told["logprobs"] = echoed.followed_by(told.get("logprobs"))
        choice = CompletionChoice(
            index=index,
            text=(answer.prompt.text if body.echo else "") + answer.text,
            finish_reason=answer.finish_reason,
            prompt_logprobs=await report_prompt(
                body, prompt_tokenizer, answer.prompt.token_ids, first.prompt_logprobs
            ),
            prompt_token_ids=answer.prompt.token_ids if body.return_token_ids else None,
            **told,
        )
        choices.append(choice)
    timings = measure_timings(answers, num_choices) if body.timings_per_token else None
    usage = count_usage(answers, num_choices)
    return template.model_copy(update={"choices": choices, "usage": usage, "timings": timings})


async def _without_answers(outputs: Outputs) -> Outputs:
    """Take back the token of each answer, because the engine generates at least one."""
    nothing: dict[str, Any] = {
        "text": "",
        "token_ids": [],
        "num_output_tokens": 0,
        "logprobs": (),
        "stop_string": None,
    }
    async with aclosing(outputs):
        async for index, output in outputs:
            if output.finish_reason is not None:
                output = replace(output, finish_reason=FinishReason.LENGTH, **nothing)
            yield index, output


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
    has_openings = body.echo or body.return_token_ids
    async with aclosing(outputs):
        async for index, output in outputs:
            if progress := prompt_progress(output):
                choice = CompletionChoice(index=index, text="", finish_reason=None)
                yield chunk(choices=[choice], prompt_progress=progress)
                continue
            answer = answers[index]
            answer.add(output)
            # The first token of a prompt's first choice comes before all others.
            if index % num_choices == 0 and output.num_output_tokens <= 1:
                for place in range(index, index + num_choices) if has_openings else ():
                    yield chunk(choices=[await _opening(place, answers[place], answer, body)])
            if output.text or output.finish_reason is not None:
                choice = CompletionChoice(
                    index=index,
                    text=output.text,
                    finish_reason=output.finish_reason,
                    **await answer.take(),
                )
                yield chunk(choices=[choice])
    if body.include_usage:
        yield chunk(usage=count_usage(answers, num_choices))


async def _opening(index: int, answer: _Answer, first: Answer, body: CompletionRequest) -> CompletionChoice:
    """Return what a stream tells of an answer's prompt, once the first answer to it has begun."""
    return CompletionChoice(
        index=index,
        text=answer.prompt.text if body.echo else "",
        logprobs=await answer.echo(body, first),
        finish_reason=None,
        prompt_token_ids=answer.prompt.token_ids if body.return_token_ids else None,
    )
