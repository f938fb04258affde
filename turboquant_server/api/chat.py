"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import Response

from turboquant_server.api.chat_answer import ChatAnswer, join_deltas
from turboquant_server.api.chat_generation import prepare_chat
from turboquant_server.api.chat_request import ChatCompletionRequest
from turboquant_server.api.generation import (
    Outputs,
    chunk_writer,
    collect,
    count_usage,
    generate,
)
from turboquant_server.api.prompt_report import report_prompt
from turboquant_server.api.response_models import (
    ChatCompletion,
    ChatCompletionChoice,
    ChatCompletionChunk,
    ChatFinishReason,
    ChunkChoice,
)
from turboquant_server.api.streaming import stream_events
from turboquant_server.api.timings import measure_timings, prompt_progress
from turboquant_server.api.token_report import ChatTokenReport
from turboquant_server.engine.request import FinishReason

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
    chat = await prepare_chat(model_manager, prompt_tokenizer, body)
    answers = chat.answers
    choices = [(answer, ChatTokenReport(body, prompt_tokenizer)) for answer in answers]
    prompt_token_ids = chat.prompt.token_ids if body.return_token_ids else None
    response_id = f"chatcmpl-{uuid.uuid4().hex}"
    created = int(time.time())
    outputs = generate(model_manager, [chat.prompt], response_id)
    if body.stream:
        template = ChatCompletionChunk(id=response_id, created=created, model=chat.model, choices=[])
        chunks = _stream_chunks(outputs, template, body, choices, prompt_token_ids)
        return stream_events(chunks, model_manager.config.sse_keep_alive_interval)
    await collect(outputs, answers, http_request)
    return ChatCompletion(
        id=response_id,
        created=created,
        model=chat.model,
        choices=[
            ChatCompletionChoice(
                index=index,
                message=join_deltas(answer.take_deltas()),
                finish_reason=_finish_reason(answer, body),
                **await report.take(answer),
            )
            for index, (answer, report) in enumerate(choices)
        ],
        prompt_logprobs=await report_prompt(
            body, prompt_tokenizer, chat.prompt.token_ids, answers[0].prompt_logprobs
        ),
        prompt_token_ids=prompt_token_ids,
        usage=count_usage(answers, len(answers)),
        timings=measure_timings(answers, len(answers)) if body.timings_per_token else None,
    )


async def _stream_chunks(
    outputs: Outputs,
    template: ChatCompletionChunk,
    body: ChatCompletionRequest,
    choices: Sequence[tuple[ChatAnswer, ChatTokenReport]],
    prompt_token_ids: list[int] | None,
) -> AsyncGenerator[str, None]:
    """Yield the chunks of the answers as JSON: roles, deltas, ends and, if asked for, the usage."""
    answers = [answer for answer, _ in choices]
    chunk = chunk_writer(template, body, answers, len(answers))
    for index in range(len(choices)):
        start = ChunkChoice(index=index, delta={"role": "assistant", "content": ""})
        yield chunk(choices=[start], prompt_token_ids=prompt_token_ids)
        prompt_token_ids = None
    async with aclosing(outputs):
        async for index, output in outputs:
            if progress := prompt_progress(output):
                yield chunk(choices=[ChunkChoice(index=index, delta={})], prompt_progress=progress)
                continue
            answer, report = choices[index]
            answer.add(output)
            for delta in answer.take_deltas():
                told = await report.take(answer)
                yield chunk(choices=[ChunkChoice(index=index, delta=delta, **told)])
            if (finish_reason := _finish_reason(answer, body)) is not None:
                told = await report.take(answer)
                end = ChunkChoice(index=index, delta={}, finish_reason=finish_reason, **told)
                yield chunk(choices=[end])
    if body.include_usage:
        yield chunk(usage=count_usage(answers, len(answers)))


def _finish_reason(answer: ChatAnswer, body: ChatCompletionRequest) -> ChatFinishReason | None:
    """Return why an answer ended. As with OpenAI, a call that the request has named is not told here."""
    reason = answer.chat_finish_reason
    return FinishReason.STOP if reason == "tool_calls" and body.named_tool is not None else reason
