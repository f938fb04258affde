"""Refuse request bodies above a size, before they are read whole."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimitMiddleware:
    """Answer 413 to a request whose body is larger than ``max_bytes``.

    Starlette has such a middleware, but its response is plain text.

    Args:
        app: The application that reads the body.
        max_bytes: The largest body that is let through.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI applications do."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        num_received = 0
        announced = Headers(scope=scope).get("content-length", "")
        num_announced = int(announced) if announced.isdecimal() else 0

        async def limited_receive() -> Message:
            nonlocal num_received
            self._check(num_announced)
            message = await receive()
            num_received += len(message.get("body", b""))
            self._check(num_received)
            return message

        await self._app(scope, limited_receive, send)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise HTTPException(413, f"The body of a request may have at most {self._max_bytes} bytes.")
