"""POST /v1/messages and /v1/messages/count_tokens, Anthropic's way to ask for an answer."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import Response

from turboquant_server.api.chat_answer import ChatAnswer
from turboquant_server.api.chat_generation import prepare_chat, write_chat
from turboquant_server.api.errors import renaming
from turboquant_server.api.generation import Outputs, collect, generate
from turboquant_server.api.message_blocks import Event, MessageBlocks
from turboquant_server.api.messages_chat import to_chat
from turboquant_server.api.messages_error import to_messages_error
from turboquant_server.api.messages_models import Message, MessageUsage, StopReason, TokenCount
from turboquant_server.api.messages_request import CountTokensRequest, MessagesRequest
from turboquant_server.api.streaming import end_with_error, name_event, send_events
from turboquant_server.engine.request import FinishReason

if TYPE_CHECKING:
    from turboquant_server.api.prompts import PromptTokenizer
    from turboquant_server.model_manager import ModelManager

PING: Event = {"type": "ping"}


async def create_message(
    model_manager: ModelManager,
    prompt_tokenizer: PromptTokenizer,
    body: MessagesRequest,
    http_request: Request,
) -> Message | Response:
    """Answer a conversation, at once or as a stream of events.

    Raises:
        ApiError: The request cannot be served as it is.
        ClientDisconnect: The client has left before the answer was complete.
    """
    with renaming(_field_names(body)):
        chat = await prepare_chat(model_manager, prompt_tokenizer, to_chat(body))
    [answer] = chat.answers
    message = _OpenMessage(chat.model, answer, body.max_tokens)
    outputs = generate(model_manager, [chat.prompt], message.id)
    if body.stream:
        interval = model_manager.config.sse_keep_alive_interval
        return send_events(_read_events(outputs, message), interval, name_event(PING))
    await collect(outputs, [answer], http_request)
    message.take_deltas()
    message.blocks.close()
    return message.body()


async def count_tokens(
    model_manager: ModelManager, prompt_tokenizer: PromptTokenizer, body: CountTokensRequest
) -> TokenCount:
    """Count the tokens of a prompt, as the usage of an answer would; it may be longer than the context.

    Raises:
        ApiError: The model does not take this conversation (400).
    """
    chat = await write_chat(model_manager, prompt_tokenizer, to_chat(body))
    return TokenCount(input_tokens=len(chat.token_ids))


def _field_names(body: MessagesRequest) -> dict[str, str]:
    """Return what a chat completion's fields are called here, where an error may be about their values."""
    names = {
        f"tools[{index}].function.parameters": f"tools[{index}].input_schema"
        for index in range(len(body.tools or ()))
    }
    place = "output_format" if body.schema_format is body.output_format else "output_config.format"
    return names | {"response_format.json_schema.schema": f"{place}.schema"}


class _OpenMessage:
    """A message that is being written.

    Args:
        model: Its name.
        answer: The chat answer that the message is made of.
        max_tokens: Most tokens that were asked for.
    """

    def __init__(self, model: str, answer: ChatAnswer, max_tokens: int) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self.blocks = MessageBlocks()
        self.answer = answer
        self._model = model
        self._max_tokens = max_tokens

    def take_deltas(self) -> list[Event]:
        """Add what is new of the answer to the blocks, and return what that changes."""
        return self.blocks.add(self.answer.take_deltas())

    def usage(self) -> MessageUsage:
        """Count the tokens so far."""
        answer = self.answer
        return MessageUsage(
            input_tokens=answer.num_prompt_tokens - answer.num_cached_tokens,
            cache_read_input_tokens=answer.num_cached_tokens,
            output_tokens=answer.num_output_tokens,
        )

    def body(self) -> Message:
        """Return the message as it is now."""
        stop_reason = self._stop_reason()
        return Message(
            id=self.id,
            model=self._model,
            content=self.blocks.content,
            stop_reason=stop_reason,
            stop_sequence=self.answer.stop_string if stop_reason == "stop_sequence" else None,
            usage=self.usage(),
        )

    def _stop_reason(self) -> StopReason | None:
        if self.answer.finish_reason is None:
            return None
        if self.answer.finish_reason is FinishReason.LENGTH:
            is_asked_for = self.answer.num_output_tokens >= self._max_tokens
            return "max_tokens" if is_asked_for else "model_context_window_exceeded"
        if self.blocks.has_calls:
            return "tool_use"
        return "end_turn" if self.answer.stop_string is None else "stop_sequence"


async def _read_events(outputs: Outputs, message: _OpenMessage) -> AsyncGenerator[bytes, None]:
    async with aclosing(outputs), aclosing(_write_events(outputs, message)) as events:
        try:
            async for event in events:
                yield name_event(event)
        except Exception as error:
            yield name_event(to_messages_error(end_with_error(error)).model_dump())


async def _write_events(outputs: Outputs, message: _OpenMessage) -> AsyncGenerator[Event, None]:
    is_first = True
    async for _, output in outputs:
        message.answer.add(output)
        if is_first:  # before, it is not known how much of the prompt was found in the cache
            start = {**message.body().model_dump(), "stop_reason": None, "stop_sequence": None}
            yield {"type": "message_start", "message": start}
            yield PING
            is_first = False
        for event in message.take_deltas():
            yield event
    for event in message.blocks.close():
        yield event
    end = message.body()
    delta = {"stop_reason": end.stop_reason, "stop_sequence": end.stop_sequence}
    yield {"type": "message_delta", "delta": delta, "usage": end.usage}
    yield {"type": "message_stop"}
