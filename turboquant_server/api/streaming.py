"""Server-sent events: chunks, an error if one comes up, ``[DONE]``; comments keep an idle connection open."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus

from turboquant_server.api.errors import to_api_error
from turboquant_server.engine.async_engine import EngineDeadError
from turboquant_server.engine.request import RequestFailedError

logger = logging.getLogger(__name__)

PING_SECONDS = 15
LINE_END = "\n"


def finish_streams_on_shutdown() -> None:
    """Let open streams finish when the server is asked to stop, which sse-starlette would cut off."""
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]


def stream_events(chunks: AsyncGenerator[str, None]) -> EventSourceResponse:
    """Return a response that sends each chunk as it comes.

    When the client leaves, the response cancels the task that reads ``chunks``; so their ``finally`` runs.

    Args:
        chunks: JSON texts.
    """
    return EventSourceResponse(
        _read_events(chunks),
        sep=LINE_END,
        ping=PING_SECONDS,
        ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep=LINE_END),
        headers={"Cache-Control": "no-cache"},
    )


def format_chunk(template: BaseModel, include_usage: bool, **fields: object) -> str:
    """Return ``template`` with these fields as JSON, without ``usage`` unless it was asked for."""
    chunk = template.model_copy(update=fields)
    return chunk.model_dump_json(exclude=None if include_usage else {"usage"})


async def _read_events(chunks: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            # The status has been sent; the error can only be an event. The engine has logged its own.
            if not isinstance(error, EngineDeadError | RequestFailedError):
                logger.exception("a stream ended with an error")
            yield to_api_error(error).body.model_dump_json()
    yield "[DONE]"
