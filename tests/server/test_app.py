"""The application says when it cannot serve, and takes no body that is too large."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from turboquant_server import app
from turboquant_server.config import ServerConfig
from turboquant_server.model_manager import ModelManager

Serve = Callable[[FastAPI], AbstractContextManager[str]]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON = {"Content-Type": "application/json"}
CHAT_BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def error_of(response: httpx.Response, status: int) -> dict[str, str | None]:
    assert response.status_code == status, response.text
    error: dict[str, str | None] = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error


def test_a_body_that_is_too_large_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_BODY_BYTES", 1000)
    with serve(app.build_app(ModelManager(ServerConfig()))) as url, httpx.Client(base_url=url) as http:
        for content in (b" " * 1001, iter([b" " * 600, b" " * 600])):
            error = error_of(http.post(CHAT, content=content, headers=JSON), 413)
            assert "at most 1000 bytes" in str(error["message"])
        error_of(http.post(CHAT, content=b" " * 1000, headers=JSON), 400)


def test_nothing_is_served_while_the_model_loads(serve: Serve) -> None:
    with serve(app.build_app(ModelManager(ServerConfig()))) as url, httpx.Client(base_url=url) as http:
        for response in (
            http.post(CHAT, json=CHAT_BODY),
            http.post(COMPLETIONS, json={"prompt": "Hi"}),
            http.post(CHAT, json={"temperature": "a wrong value"}),
            http.get("/v1/models"),
            http.get("/v1/models/tiny"),
            http.get("/health"),
        ):
            assert error_of(response, 503)["code"] == "model_loading"
            assert int(response.headers["retry-after"]) > 0
        error_of(http.get("/v1/nothing"), 404)


def test_nothing_is_served_by_a_dead_engine(serve: Serve, tiny_model_dir: Path) -> None:
    model_manager = ModelManager(ServerConfig(model=str(tiny_model_dir), device="cpu"))
    model_manager.load()
    with serve(app.build_app(model_manager)) as url, httpx.Client(base_url=url) as http:
        assert http.post(CHAT, json=CHAT_BODY).status_code == 200
        model_manager.engine.shutdown()
        for response in (
            http.post(CHAT, json=CHAT_BODY),
            http.post(COMPLETIONS, json={"prompt": "Hi", "stream": True}),
            http.get("/health"),
        ):
            assert error_of(response, 503)["code"] == "engine_dead"
            assert "retry-after" in response.headers
    model_manager.unload()
