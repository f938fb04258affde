"""The ASGI application in front of replicas: passes requests on, and says so when a replica is lost.

Knows nothing of Ray, and of the API only what an error looks like where.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from turboquant_server.api.door import HEALTH, METRICS
from turboquant_server.api.errors import ApiError, unavailable
from turboquant_server.api.messages_error import is_messages_path, to_messages_error
from turboquant_server.api.request_id import HEADER, choose_request_id, current_request_id
from turboquant_server.api.responses_error import RESPONSES, to_error_event
from turboquant_server.app import MAX_BODY_BYTES
from turboquant_server.metrics_text import merge_metrics

logger = logging.getLogger(__name__)


class ReplicaLostError(RuntimeError):
    """A replica has ended before its answer, or there is none."""


class Relay:
    """Pass requests on to replicas, and their answers back.

    Args:
        answer: Sends a request, of this scope and body, to one replica and yields its ASGI messages, some at
            a time. Closing it early means that the client has left.
        ask_all: Sends a request without a body to all replicas; their messages by their names.
    """

    def __init__(
        self,
        answer: Callable[[Scope, bytes], AsyncGenerator[list[Message], None]],
        ask_all: Callable[[Scope], Awaitable[Mapping[str, list[Message]]]],
    ) -> None:
        self._answer = answer
        self._ask_all = ask_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI applications do."""
        if scope["type"] == "lifespan":
            for _ in ("startup", "shutdown"):
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
            return
        current_request_id.set(choose_request_id(Headers(scope=scope).get(HEADER)))
        response = _Response(scope["path"], send)
        try:
            if scope["path"] in (HEALTH, METRICS):
                for message in _merge(scope["path"], await self._ask_all(scope)):
                    await response.send(message)
                return
            async with aclosing(self._answer(scope, await _read_body(receive))) as answer:
                async for messages in answer:
                    for message in messages:
                        await response.send(message)
        except ReplicaLostError as error:
            logger.warning("a request has lost its replica: %s", error)
            await response.fail(error)


class _Response:
    """A response on its way to the client.

    Args:
        path: Of the request.
        send: ASGI's.
    """

    def __init__(self, path: str, send: Send) -> None:
        self._path = path
        self._send = send
        self._start: Message | None = None
        self._num_events = 0

    async def send(self, message: Message) -> None:
        """Send a message of the replica's."""
        if message["type"] == "http.response.start":
            self._start = message
            del MutableHeaders(scope=message)[HEADER]  # Serve's proxy adds it
        # A server sends each event as a message of its own; those of responses have names.
        self._num_events += message.get("body", b"").startswith(b"event: ")
        await self._send(message)

    async def fail(self, error: ReplicaLostError) -> None:
        """End the response with an error, or break it off where it has begun and is no stream of events."""
        text = "No replica could finish this request. Please send it again."
        api_error = unavailable(text, "replica_lost")
        if self._start is None:
            await api_error.response(self._path)({"type": "http"}, _nothing, self._send)
        elif not Headers(raw=self._start["headers"]).get("content-type", "").startswith("text/event-stream"):
            raise error
        else:
            event = _error_event(api_error, self._path, self._num_events)
            await self._send({"type": "http.response.body", "body": event.encode()})


def _error_event(error: ApiError, path: str, num_events: int) -> str:
    """Return what ends a stream of the API of this path after so many events."""
    if is_messages_path(path):
        return f"event: error\ndata: {to_messages_error(error).model_dump_json()}\n\n"
    if path == RESPONSES:
        return f"event: error\ndata: {json.dumps(to_error_event(error, num_events))}\n\n"
    return f"data: {error.body.model_dump_json()}\n\ndata: [DONE]\n\n"


async def _read_body(receive: Receive) -> bytes:
    """Return the body of a request, or as much of it as shows that it is too large."""
    body = bytearray()
    while len(body) <= MAX_BODY_BYTES:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return bytes(body)


async def _nothing() -> Message:
    """Receive for a response that asks for nothing."""
    raise NotImplementedError


def _merge(path: str, answers: Mapping[str, list[Message]]) -> list[Message]:
    """Return one answer for those of all replicas: a good one if there is any, of metrics all good ones."""
    good = {name: messages for name, messages in answers.items() if messages[0]["status"] == 200}
    if path == HEALTH or not good:
        return next(iter((good or answers).values()))
    texts = {
        name: b"".join(message.get("body", b"") for message in messages).decode()
        for name, messages in good.items()
    }
    start = next(iter(good.values()))[0]
    del MutableHeaders(scope=start)["content-length"]
    return [start, {"type": "http.response.body", "body": merge_metrics(texts)}]
