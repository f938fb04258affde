"""The load generator's transport, on servers that write what a test says."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Sequence

import httpx
import pytest
from stream_transport import StreamTransport

HEAD = b"HTTP/1.1 200 OK\r\n"
COMPLETE = HEAD + b"Content-Length: 2\r\n\r\nhi"
BEGUN = HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n"


async def get(url: str) -> httpx.Response:
    """Return what a transport of its own gets."""
    transport = StreamTransport(ssl.create_default_context())
    async with httpx.AsyncClient(transport=transport) as client:
        return await client.get(url)


def url_of(server: asyncio.Server) -> str:
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


async def ask(answers: Sequence[bytes], *, closes: bool) -> tuple[list[str], int]:
    """Return what a request for each answer gets, and how many connections they take."""
    written = iter(answers)
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.readuntil(b"\r\n\r\n"):
            for byte in next(written):  # as slowly as it may come
                writer.write(bytes([byte]))
                await writer.drain()
            if closes:
                break
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        transport = StreamTransport(ssl.create_default_context())
        async with httpx.AsyncClient(transport=transport) as client:
            return [(await client.get(url_of(server))).text for _ in answers], connections


def test_requests_share_a_connection() -> None:
    assert asyncio.run(ask([COMPLETE, BEGUN + b"0\r\n\r\n", COMPLETE], closes=False)) == (["hi"] * 3, 1)


def test_a_connection_that_the_server_has_closed_is_opened_again() -> None:
    closing = COMPLETE.replace(b"Content", b"Connection: close\r\nContent")
    assert asyncio.run(ask([closing, closing], closes=True)) == (["hi"] * 2, 2)


def test_what_was_not_read_of_a_response_is_no_part_of_the_next() -> None:
    async def get_twice() -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for text in (b"no", b"hi"):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(COMPLETE.replace(b"hi", text))
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            transport = StreamTransport(ssl.create_default_context())
            async with httpx.AsyncClient(transport=transport) as client:
                async with client.stream("GET", url_of(server)):
                    pass
                return (await client.get(url_of(server))).text

    assert asyncio.run(get_twice()) == "hi"


def test_a_body_may_end_with_its_connection() -> None:
    assert asyncio.run(ask([HEAD + b"\r\nhi"], closes=True)) == (["hi"], 1)


@pytest.mark.parametrize("answer", [b"", HEAD, BEGUN, b"220 mail.example ESMTP\r\n"])
def test_what_is_no_whole_response_is_an_error(answer: bytes) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        asyncio.run(ask([answer], closes=True))


def test_a_body_that_a_reset_connection_cuts_is_an_error() -> None:
    async def get_cut() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HEAD + b"\r\nh")
            await asyncio.sleep(0.1)  # or the reset overtakes it
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            await get(url_of(server))

    with pytest.raises(httpx.RemoteProtocolError):
        asyncio.run(get_cut())


def test_a_server_that_speaks_first_does_not_speak_http() -> None:
    async def get_greeted() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example ESMTP\r\n")
            await reader.read()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            await get(url_of(server))

    with pytest.raises(httpx.RemoteProtocolError, match="HTTP"):
        asyncio.run(get_greeted())


def test_a_port_where_nobody_listens_is_an_error() -> None:
    with pytest.raises(httpx.ConnectError):
        asyncio.run(get("http://127.0.0.1:1/v1"))
