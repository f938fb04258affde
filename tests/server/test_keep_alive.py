"""A stream that waits for its first token tells proxies that it lives, and clients nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from held_steps import held_steps
from openai import OpenAI

if TYPE_CHECKING:
    from conftest import RunningServer

INTERVAL = 0.1
COMMENT = b": keep-alive\n\n"
SUBJECTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
}
FIELDS = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(
    running_server: Callable[..., AbstractContextManager[RunningServer]], tiny_model_dir: Path
) -> Iterator[RunningServer]:
    options = {"served_model_name": ("tiny",), "max_num_seqs": 1}
    with running_server(tiny_model_dir, sse_keep_alive_interval=INTERVAL, **options) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as http:
        yield http


@pytest.mark.parametrize("path", SUBJECTS)
def test_a_silent_stream_has_comments_from_the_first_interval_on(
    server: RunningServer, http: httpx.Client, path: str
) -> None:
    body = {**SUBJECTS[path], **FIELDS, "stream": True}
    started = time.monotonic()
    with held_steps(server.model_manager) as held, http.stream("POST", path, json=body) as response:
        pieces = response.iter_raw()
        content = b""
        while content.count(COMMENT) < 3:
            content += next(pieces)
        assert time.monotonic() - started >= 3 * INTERVAL
        held.let_go()
        content += b"".join(pieces)
    events = content.replace(COMMENT, b"").removesuffix(b"\n\n").split(b"\n\n")
    assert all(event.startswith(b"data: ") for event in events)
    assert events[-1] == b"data: [DONE]"


@pytest.mark.parametrize("path", SUBJECTS)
def test_the_sdk_does_not_see_them(server: RunningServer, path: str) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        create: Any = client.chat.completions.create if "chat" in path else client.completions.create
        fields = {**SUBJECTS[path], "model": "tiny", "temperature": 0, "max_tokens": 4}
        expected = text_of(create(**fields).choices[0])
        with held_steps(server.model_manager) as held:
            stream = create(**fields, stream=True)
            time.sleep(3 * INTERVAL)
            held.let_go()
            chunks = list(stream)
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert "".join(text_of(chunk.choices[0]) for chunk in chunks) == expected != ""


def test_one_that_waits_in_the_queue_has_them_too(server: RunningServer, http: httpx.Client) -> None:
    path = "/v1/completions"
    body = {**SUBJECTS[path], **FIELDS, "stream": True}
    with (
        held_steps(server.model_manager) as held,
        http.stream("POST", path, json=body) as first,
        http.stream("POST", path, json=body) as second,
    ):
        held.wait_for_step()
        pieces = second.iter_raw()
        assert next(pieces) == COMMENT
        held.let_go()
        first.read()
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


def test_zero_turns_them_off(
    running_server: Callable[..., AbstractContextManager[RunningServer]], tiny_model_dir: Path
) -> None:
    body = {**SUBJECTS["/v1/completions"], **FIELDS, "stream": True}
    with (
        running_server(tiny_model_dir, sse_keep_alive_interval=0) as server,
        held_steps(server.model_manager) as held,
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as response,
    ):
        time.sleep(3 * INTERVAL)
        held.let_go()
        assert COMMENT not in response.read()


def text_of(choice: Any) -> str:
    """Return the text of an answer, or of a piece of one."""
    if hasattr(choice, "text"):
        return str(choice.text)
    return str((choice.delta if hasattr(choice, "delta") else choice.message).content or "")
