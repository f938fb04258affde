"""The real application on a loopback port, for tests that talk HTTP to it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import uvicorn
from openai import OpenAI

from turboquant_server.app import build_app
from turboquant_server.config import ServerConfig
from turboquant_server.model_manager import ModelManager

if TYPE_CHECKING:
    from fastapi import FastAPI

TIMEOUT = 20
MODEL_NAME = "tiny"


@dataclass(frozen=True)
class RunningServer:
    """An application that answers at ``url``, and the model manager behind it."""

    url: str
    model_manager: ModelManager

    def wait_until_idle(self) -> float:
        """Wait until the engine holds no request; return the seconds that it took."""
        started = time.monotonic()
        engine = self.model_manager.engine
        while engine.num_running or engine.num_waiting:
            assert time.monotonic() - started < TIMEOUT, "the engine still holds requests"
            time.sleep(0.005)
        return time.monotonic() - started


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the TURBOQUANT_* variables of whoever runs the tests."""
    for name in os.environ:
        if name.upper().startswith("TURBOQUANT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def kept_signal_handler() -> Iterator[None]:
    """Leave the process's own handler of SIGTERM in place, which the command replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _serve(app: FastAPI) -> Iterator[str]:
    """Run ``app`` under uvicorn on a thread and yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=TIMEOUT)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(TIMEOUT)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve() -> Callable[[FastAPI], contextlib.AbstractContextManager[str]]:
    """Serve an application of the test's own for the length of a ``with`` block, which gets its URL."""
    return _serve


@pytest.fixture(scope="session")
def server(tiny_model_dir: Path) -> Iterator[RunningServer]:
    """Serve the tiny model, as ``turboquant-server`` would."""
    config = ServerConfig(
        model=str(tiny_model_dir), device="cpu", dtype="float32", served_model_name=(MODEL_NAME, "alias")
    )
    model_manager = ModelManager(config)
    model_manager.load()
    try:
        with _serve(build_app(model_manager)) as url:
            yield RunningServer(url, model_manager)
    finally:
        model_manager.unload()


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[OpenAI]:
    """OpenAI's SDK, talking to the server."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """A plain HTTP client of the server."""
    with httpx.Client(base_url=server.url, timeout=TIMEOUT) as http:
        yield http
