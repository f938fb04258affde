"""Server-sent events: chunks, an error if one comes up, ``[DONE]``; comments keep an idle connection open."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json
from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus
from starlette.types import Message, Send

from turboquant_server.api.errors import ApiError, to_api_error
from turboquant_server.engine.request import EngineDeadError, RequestFailedError

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def finish_streams_on_shutdown() -> None:
    """Let open streams finish when the server is asked to stop, which sse-starlette would cut off."""
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]


def stream_events(chunks: AsyncGenerator[str, None], keep_alive_interval: float) -> EventSourceResponse:
    """Return a response that sends each chunk as it comes.

    When the client leaves, the response cancels the task that reads ``chunks``; so their ``finally`` runs.

    Args:
        chunks: JSON texts.
        keep_alive_interval: Seconds from one comment to the next, which keep proxies from cutting a stream
            that waits for its first token; 0 sends none.
    """
    return send_events(_read_events(chunks), keep_alive_interval, KEEP_ALIVE)


def send_events(
    events: AsyncGenerator[bytes, None],
    keep_alive_interval: float,
    keep_alive: bytes,
) -> EventSourceResponse:
    """Return a response of events that are complete: nothing is added at their end, or where they fail."""
    return _EventResponse(
        events,
        ping=keep_alive_interval,
        # Bytes are sent as they are, here, too.
        ping_message_factory=lambda: keep_alive,  # type: ignore[arg-type, return-value]
        headers={"Cache-Control": "no-cache"},
    )


def data_event(data: str) -> bytes:
    """Return an event of one line of data, as JSON is: it has no line breaks."""
    return f"data: {data}\n\n".encode()


def name_event(event: Mapping[str, Any]) -> bytes:
    """Return an event that has its type for a name, too, as streams with events of several types do."""
    return f"event: {event['type']}\n".encode() + data_event(to_json(event).decode())


def end_with_error(error: Exception) -> ApiError:
    """Return what a client may know of an error that ends a stream, and log it unless the engine has.

    The status has been sent; the error can only be an event.
    """
    if not isinstance(error, EngineDeadError | RequestFailedError):
        logger.exception("a stream ended with an error")
    return to_api_error(error)


def format_chunk(template: BaseModel, include_usage: bool, **fields: object) -> str:
    """Return ``template`` with these fields as JSON, without ``usage`` unless it was asked for."""
    chunk = template.model_copy(update=fields)
    return chunk.model_dump_json(exclude=None if include_usage else {"usage"})


class _EventResponse(EventSourceResponse):
    """Send events without a time limit, which sse-starlette would set up for each, be there one or not.

    That takes a quarter of the time that an event takes.
    """

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        await send(message)


async def _read_events(chunks: AsyncGenerator[str, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield data_event(chunk)
        except Exception as error:
            yield data_event(end_with_error(error).body.model_dump_json())
    yield DONE
