"""The load generator's connections, on a server with known faults."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import pytest
from fake_openai_server import FakeServer, fake_openai_server
from serving_client import ServerClient, ServerError


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_openai_server() as fake:
        fake.prepare()
        yield fake


def test_no_more_connections_are_opened_than_are_used_at_once(server: FakeServer) -> None:
    async def ask() -> set[int]:
        server.prepare(faults={4: "refused"})
        async with ServerClient(server.url, None) as client:
            for _ in range(3):
                with suppress(ServerError):
                    await asyncio.gather(*(client.ask("chat", "hello", 1) for _ in range(2)))
        return server.ports

    assert len(asyncio.run(ask())) == 2


def test_connections_that_are_in_use_at_the_end_are_closed(server: FakeServer) -> None:
    async def leave(num_turns: int) -> asyncio.Task[object]:
        async with ServerClient(server.url, None) as client:
            asking: asyncio.Task[object] = asyncio.ensure_future(client.ask("chat", "hello", 1))
            for _ in range(num_turns):
                await asyncio.sleep(0)
        return asking

    # What is not closed warns, and warnings are errors.
    assert all(asyncio.run(leave(num_turns)).done() for num_turns in range(1, 40, 3))
