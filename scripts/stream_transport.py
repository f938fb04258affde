"""StreamTransport: httpx's requests over one connection, with the parser and the event loop that uvicorn has.

With its own and asyncio's an event of one of 128 streams takes 105 us of a core, with these 30, so that what
is measured of a fast server is not the client. Knows no event.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator
from typing import cast

import httptools
import httpx

DEFAULT_PORTS = {"http": 80, "https": 443}
# Without one of these, a body ends with its connection.
LENGTH_HEADERS = {b"content-length", b"transfer-encoding"}


class StreamTransport(httpx.AsyncBaseTransport):
    """Send one request after another over a connection that is kept open between them.

    Args:
        ssl_context: For servers of https.
    """

    def __init__(self, ssl_context: ssl.SSLContext) -> None:
        self._ssl_context = ssl_context
        self._connection: _Connection | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return the response once its head is there.

        Raises:
            httpx.ConnectError: Nobody listens, or no certificate fits.
            httpx.RemoteProtocolError: The server has closed the connection, or does not speak HTTP.
        """
        if self._connection is None or not self._connection.is_reusable:
            await self.aclose()
            self._connection = await self._connect(request)
        connection = self._connection
        await connection.send(_head(request) + await request.aread())
        return httpx.Response(connection.status, headers=connection.headers, stream=connection)

    async def aclose(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.transport.abort()
            await self._connection.closed
            self._connection = None

    async def _connect(self, request: httpx.Request) -> _Connection:
        url = request.url
        if url.scheme not in DEFAULT_PORTS:
            raise httpx.UnsupportedProtocol("Request URL is missing an 'http://' or 'https://' protocol.")
        seconds = request.extensions.get("timeout", {}).get("connect")
        connecting = asyncio.get_running_loop().create_connection(
            _Connection,
            url.host,
            url.port or DEFAULT_PORTS[url.scheme],
            ssl=self._ssl_context if url.scheme == "https" else None,
        )
        try:
            return (await asyncio.wait_for(connecting, seconds))[1]
        except (OSError, asyncio.TimeoutError) as error:
            raise httpx.ConnectError(str(error) or "timed out") from error


def _head(request: httpx.Request) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % header for header in request.headers.raw]
    return b"\r\n".join(lines) + b"\r\n\r\n"


class _Connection(asyncio.Protocol, httpx.AsyncByteStream):
    """A connection, and the body of the response that comes over it.

    Attributes:
        transport: Its socket.
        is_reusable: Whether it is open, and the newest response complete.
        closed: Done when the connection is.
        status: Of the newest response; 0 before its head is there.
        headers: Of that response.
    """

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.is_reusable = True
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._parser = httptools.HttpResponseParser(self)
        self._parts: deque[bytes] = deque()
        self._is_complete = False
        self._error: httpx.RemoteProtocolError | None = None
        self._news: asyncio.Future[None] | None = None

    async def send(self, request: bytes) -> None:
        """Send a request and wait for the head of the response."""
        self.is_reusable = self._is_complete = False
        self.status, self.headers = 0, []
        self._parts.clear()  # a response need not be read to its end
        self.transport.write(request)
        while not self.status:
            await self._wait()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        while True:
            while self._parts:
                yield self._parts.popleft()
            if self._is_complete:
                return
            await self._wait()

    async def aclose(self) -> None:
        """Close the connection, unless the response is complete."""
        if not self.is_reusable:
            self.transport.abort()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._news = asyncio.get_running_loop().create_future()
        await self._news

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._error = httpx.RemoteProtocolError(str(error))
            self.transport.abort()
        self._tell()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_reusable = False
        if error is None and self.status and not {name.lower() for name, _ in self.headers} & LENGTH_HEADERS:
            self._is_complete = True
        message = str(error or "Server disconnected without sending a complete response.")
        self._error = self._error or httpx.RemoteProtocolError(message)
        self.closed.set_result(None)
        self._tell()

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        self._parts.append(part)

    def on_message_complete(self) -> None:
        self._is_complete = True
        self.is_reusable = self._parser.should_keep_alive() and not self.transport.is_closing()
