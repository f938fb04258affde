"""POST /v1/responses, OpenAI's newer way to ask for an answer. Keeps nothing of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import Response

from turboquant_server.api.chat_generation import prepare_chat, write_chat
from turboquant_server.api.errors import ApiError, renaming
from turboquant_server.api.generation import Outputs, generate, while_client_waits
from turboquant_server.api.responses_calls import client_calls
from turboquant_server.api.responses_chat import to_chat
from turboquant_server.api.responses_models import InputTokenCount, ModelResponse
from turboquant_server.api.responses_request import ResponsesRequest
from turboquant_server.api.responses_stream import Event, ResponseWriter
from turboquant_server.api.responses_tools import HostedTool
from turboquant_server.api.streaming import KEEP_ALIVE, end_with_error, name_event, send_events
from turboquant_server.api.token_report import ChatTokenReport

if TYPE_CHECKING:
    from turboquant_server.api.prompts import PromptTokenizer
    from turboquant_server.model_manager import ModelManager


async def create_response(
    model_manager: ModelManager,
    prompt_tokenizer: PromptTokenizer,
    body: ResponsesRequest,
    http_request: Request,
) -> ModelResponse | Response:
    """Answer the items of a conversation, at once or as a stream of events.

    Raises:
        ApiError: The request cannot be served as it is.
        ClientDisconnect: The client has left before the answer was complete.
    """
    calls = client_calls(body.tools)
    chat_body, names = to_chat(body)
    with renaming(names):
        chat = await prepare_chat(model_manager, prompt_tokenizer, chat_body)
    response = _begin(chat.model, body)
    [answer] = chat.answers
    writer = ResponseWriter(response, answer, ChatTokenReport(chat_body, prompt_tokenizer), calls)
    outputs = generate(model_manager, [chat.prompt], response.id)
    if body.stream:
        interval = model_manager.config.sse_keep_alive_interval
        return send_events(_read_events(outputs, writer), interval, KEEP_ALIVE)

    async def write() -> None:
        async for _ in _write_events(outputs, writer):
            pass

    await while_client_waits(write(), http_request)
    return writer.response


async def count_input_tokens(
    model_manager: ModelManager, prompt_tokenizer: PromptTokenizer, body: ResponsesRequest
) -> InputTokenCount:
    """Count the tokens of an input, as the usage of a response would; it may be longer than the context.

    Raises:
        ApiError: The model does not take this input (400).
    """
    client_calls(body.tools)
    chat_body, names = to_chat(body)
    with renaming(names):
        chat = await write_chat(model_manager, prompt_tokenizer, chat_body)
    return InputTokenCount(input_tokens=len(chat.token_ids))


def refuse_compaction() -> None:
    """Tell that there is nothing that makes conversations shorter.

    Raises:
        ApiError: Always (404).
    """
    raise ApiError(404, "This server does not compact conversations; the client has to shorten its 'input'.")


def refuse_stored(response_id: str) -> None:
    """Tell that there is no response of this id, whatever it is.

    Raises:
        ApiError: Always (404).
    """
    message = f"Response '{response_id[:100]}' not found: this server keeps no responses."
    raise ApiError(404, message, param="response_id")


def _begin(model: str, body: ResponsesRequest) -> ModelResponse:
    reasoning, text = body.reasoning, body.text
    text_format = {"type": "text"}
    if text and text.format:
        text_format = text.format.model_dump(by_alias=True, exclude_none=True)
    return ModelResponse(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        model=model,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning={"effort": reasoning.effort if reasoning else None, "summary": None},
        temperature=1.0 if body.temperature is None else body.temperature,
        text={"format": text_format},
        tool_choice=body.tool_choice or "auto",
        tools=[tool for tool in body.tools or () if not isinstance(tool, HostedTool)],
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        prompt_cache_key=body.prompt_cache_key,
        safety_identifier=body.safety_identifier,
        user=body.user,
    )


async def _read_events(outputs: Outputs, writer: ResponseWriter) -> AsyncGenerator[bytes, None]:
    async with aclosing(_write_events(outputs, writer)) as events:
        try:
            async for event in events:
                yield name_event(event)
        except Exception as error:
            for event in writer.fail(end_with_error(error)):
                yield name_event(event)


async def _write_events(outputs: Outputs, writer: ResponseWriter) -> AsyncGenerator[Event, None]:
    for event in writer.begin():
        yield event
    async with aclosing(outputs):
        async for _, output in outputs:
            for event in await writer.add(output):
                yield event
    for event in writer.end():
        yield event
