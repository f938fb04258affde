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
from turboquant_server.api.chat_request import ChatCompletionRequest
from turboquant_server.api.conversation import check_conversation
from turboquant_server.api.errors import invalid_request
from turboquant_server.api.generation import (
    Outputs,
    check_vocabulary,
    chunk_writer,
    collect,
    count_usage,
    generate,
    make_prompt,
)
from turboquant_server.api.models import resolve_model
from turboquant_server.api.response_models import (
    ChatCompletion,
    ChatCompletionChoice,
    ChatCompletionChunk,
    ChunkChoice,
)
from turboquant_server.api.streaming import stream_events
from turboquant_server.api.structured_output import find_grammar
from turboquant_server.api.token_report import ChatTokenReport

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
    chat_format, tools = model_manager.chat_format, body.offered_tools
    check_conversation(body.messages)
    if tools and not chat_format.has_tools:
        message = "Invalid 'tools': this model's chat template takes no tools."
        raise invalid_request(message, "tools", "unsupported_parameter")
    check_vocabulary(body, model_manager.engine.vocab_size)
    chat = await prompt_tokenizer.tokenize_chat(
        body.messages,
        tools=tools,
        template_kwargs=body.template_kwargs,
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
    )
    grammar = await find_grammar(model_manager, body, chat_format.find_reasoning(chat.text))
    prompt = make_prompt(
        body,
        chat.token_ids,
        body.max_completion_tokens or body.max_tokens,
        model_manager.max_model_len,
        param="messages",
        skipped_token_ids=chat_format.skipped_token_ids(with_tools=tools is not None),
        grammar=grammar,
    )
    num_choices = body.n or 1
    max_calls = 1 if body.parallel_tool_calls is False else None
    if grammar is not None:
        tools = None  # what looks like a call is part of the answer that was asked for
    answers = [
        ChatAnswer(chat_format.open(chat.text, tools, max_calls), len(chat.token_ids))
        for _ in range(num_choices)
    ]
    choices = [(answer, ChatTokenReport(body, prompt_tokenizer)) for answer in answers]
    prompt_token_ids = chat.token_ids if body.return_token_ids else None
    response_id = f"chatcmpl-{uuid.uuid4().hex}"
    created = int(time.time())
    outputs = generate(model_manager, [prompt], response_id)
    if body.stream:
        template = ChatCompletionChunk(id=response_id, created=created, model=model, choices=[])
        return stream_events(_stream_chunks(outputs, template, body, choices, prompt_token_ids))
    await collect(outputs, answers, http_request)
    return ChatCompletion(
        id=response_id,
        created=created,
        model=model,
        choices=[
            ChatCompletionChoice(
                index=index,
                message=join_deltas(answer.take_deltas()),
                finish_reason=answer.chat_finish_reason,
                **await report.take(answer),
            )
            for index, (answer, report) in enumerate(choices)
        ],
        prompt_token_ids=prompt_token_ids,
        usage=count_usage(answers, num_choices),
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
            answer, report = choices[index]
            answer.add(output)
            for delta in answer.take_deltas():
                told = await report.take(answer)
                yield chunk(choices=[ChunkChoice(index=index, delta=delta, **told)])
            if answer.chat_finish_reason is not None:
                told = await report.take(answer)
                end = ChunkChoice(index=index, delta={}, finish_reason=answer.chat_finish_reason, **told)
                yield chunk(choices=[end])
    if body.include_usage:
        yield chunk(usage=count_usage(answers, len(answers)))
