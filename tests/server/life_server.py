"""A server whose models come and go, on a loopback port, and loads that a test holds back."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI

from turboquant_server import cache_plan, model_life
from turboquant_server.app import build_app
from turboquant_server.config import ServerConfig
from turboquant_server.draining_server import DrainingServer
from turboquant_server.model_life import Models
from turboquant_server.model_manager import ModelManager

TIMEOUT = 20
ADMIN = {"Authorization": "Bearer boss"}


@dataclass(frozen=True)
class LifeServer:
    """A running server and its clients."""

    models: Models
    server: DrainingServer
    http: httpx.Client
    openai: OpenAI

    def states(self) -> dict[str, str]:
        """What /v1/models tells, by name."""
        return {card["id"]: card["state"] for card in self.http.get("/v1/models").json()["data"]}

    def change(self, verb: str, model: str, headers: dict[str, str] = ADMIN) -> httpx.Response:
        """Load or unload a model."""
        return self.http.post(f"/v1/models/{verb}", json={"model": model}, headers=headers)

    def ask(self, model: str | None, **fields: Any) -> httpx.Response:
        """Ask for an answer of four tokens."""
        body = {
            "model": model,
            "prompt": "The harbour",
            "temperature": 0,
            "ignore_eos": True,
            "max_tokens": 4,
        }
        return self.http.post("/v1/completions", json={**body, **fields})

    def num_tasks(self) -> int:
        """How many tasks the event loop has while this is asked."""
        return len(asyncio.all_tasks(self.server.servers[0].get_loop()))

    def num_waiting(self, model: str) -> int:
        """How many requests wait for a model."""
        return len(self.models.find(model).waiting)


@contextmanager
def life_server(**settings: Any) -> Iterator[LifeServer]:
    """Serve on the CPU, with small caches, for the length of a ``with`` block."""
    config = ServerConfig(
        **{
            "device": "cpu",
            "kv_cache_memory": 8 * 2**20,
            "admin_key": "boss",
            "shutdown_timeout": 5,
            **settings,
        }
    )
    app = build_app(*(ModelManager(one) for one in config.of_models()))
    models: Models = app.state.models
    uvicorn_config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=5)
    server = DrainingServer(uvicorn_config, app.state.door, models, config.shutdown_timeout)
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        patch.setattr(cache_plan, "LARGE_FOR_A_CPU", 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that a client can keep it waiting
        assert models.load_first() is None
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with (
                httpx.Client(base_url=url, timeout=TIMEOUT) as http,
                OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as openai,
            ):
                yield LifeServer(models, server, http, openai)
        finally:
            server.should_exit = True
            thread.join(TIMEOUT)
            for manager in models.managers:
                if manager.is_ready:
                    manager.unload()


class HeldLoads:
    """Loads that wait for the test; ``names`` has those that have begun."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._go = threading.Semaphore(0)

    def let_go(self, count: int = 1) -> None:
        """Let so many loads go on."""
        self._go.release(count)

    def load(self, try_to_load: Callable[[ModelManager], str | None], manager: ModelManager) -> str | None:
        self.names.append(manager.model_names[0])
        assert self._go.acquire(timeout=TIMEOUT)
        return try_to_load(manager)


@contextmanager
def held_loads() -> Iterator[HeldLoads]:
    """Hold back what is loaded until the end of the ``with`` block."""
    held, try_to_load = HeldLoads(), model_life.try_to_load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_life, "try_to_load", lambda manager: held.load(try_to_load, manager))
        try:
            yield held
        finally:
            held.let_go(1000)


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def text_of(response: httpx.Response) -> str:
    """Return the text of an answer."""
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of a response that is one."""
    assert response.status_code == status, response.text
    return dict(response.json()["error"])
