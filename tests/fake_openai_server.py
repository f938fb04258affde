"""A server of OpenAI's API whose delays, counts and faults a test decides, for what talks to such servers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

TOKENS_PER_WORD, EXTRA_TOKENS = 3, 7  # of a prompt
STOP_SECONDS = 20


@dataclass
class FakeServer:
    """What the server does, and what it was asked.

    Attributes:
        url: Its own, with ``/v1``.
        first_delay: Seconds before the first token. An answer of one token has none.
        delay: Seconds before any other.
        word: The text of every token.
        most_tokens: Where an answer stops if it is not to stop before.
        tells_usage: Whether it counts tokens.
        cached_tokens: Of every prompt; None if it does not tell.
        model: What it calls its model in answers; None if it does not.
        version: What it tells at ``/version``; None if there is no such thing.
        refuses_ignore_eos: Whether it refuses requests that have this field.
        faults: What goes wrong with a request, by how many came before it: ``refused``, ``no json``,
            ``error event``, ``cut``, or ``interrupt``: somebody presses Ctrl-C then.
        bodies: What was asked.
        keys: What the requests had for authorization.
        ports: Of the connections that they came by.
        most_at_once: How many requests were under way at most.
    """

    url: str = ""
    first_delay: float = 0.0
    delay: float = 0.0
    word: str = " a"
    most_tokens: int = 1000
    tells_usage: bool = True
    cached_tokens: int | None = None
    model: str | None = None
    version: str | None = None
    refuses_ignore_eos: bool = False
    faults: dict[int, str] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    ports: set[int] = field(default_factory=set)
    at_once: int = 0
    most_at_once: int = 0

    def prepare(self, **behaviour: Any) -> None:
        """Forget everything but the URL, and behave so from now on."""
        vars(self).update(vars(FakeServer(self.url, **behaviour)))

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "first"}, {"id": "second"}]}

    async def tell_version(self) -> Response:
        return JSONResponse({"version": self.version}) if self.version else Response(status_code=404)

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        fault = self.faults.get(len(self.bodies))
        self.bodies.append(body)
        self.keys.add(request.headers.get("authorization"))
        assert request.client
        self.ports.add(request.client.port)
        if fault == "refused":
            return JSONResponse({"error": {"message": "too long,\n says the server"}}, 400)
        if self.refuses_ignore_eos and "ignore_eos" in body:
            return JSONResponse(
                {"error": {"message": "Unrecognized request argument supplied: ignore_eos"}}, 400
            )
        if fault == "no json":
            return Response("<b>bad gateway</b>", 502)
        if fault == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        return StreamingResponse(self._stream(body, fault), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], fault: str | None) -> AsyncIterator[str]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            async for event in self._events(body, fault):
                if self.model:
                    event["model"] = self.model
                yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.at_once -= 1

    async def _events(self, body: dict[str, Any], fault: str | None) -> AsyncIterator[dict[str, Any]]:
        is_chat = "messages" in body
        prompt = body["messages"][0]["content"] if is_chat else body["prompt"]
        num_tokens = min(body["max_tokens"], self.most_tokens)
        if is_chat:
            yield {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
        for token in range(num_tokens):
            if num_tokens > 1:
                await asyncio.sleep(self.delay if token else self.first_delay)
            text = {"delta": {"content": self.word}} if is_chat else {"text": self.word}
            yield {"choices": [text | {"finish_reason": None}]}
            if fault == "error event":
                yield {"error": {"message": "out of memory"}}
                return
            if fault == "cut":
                return
        reason = "length" if num_tokens == body["max_tokens"] else "stop"
        yield {"choices": [{"delta": {}, "text": "", "finish_reason": reason}]}
        if self.tells_usage:
            usage: dict[str, Any] = {
                "prompt_tokens": TOKENS_PER_WORD * len(prompt.split()) + EXTRA_TOKENS,
                "completion_tokens": num_tokens,
            }
            if self.cached_tokens is not None:
                usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
            yield {"choices": [], "usage": usage}


@contextmanager
def fake_openai_server() -> Iterator[FakeServer]:
    """Run one on a free port."""
    app = FastAPI()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fake = FakeServer(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        app.get("/v1/models")(fake.models)
        app.get("/version")(fake.tell_version)
        app.post("/v1/completions")(fake.answer)
        app.post("/v1/chat/completions")(fake.answer)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield fake
        finally:
            server.should_exit = True
            thread.join(STOP_SECONDS)
            assert not thread.is_alive()
