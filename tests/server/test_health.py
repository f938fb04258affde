"""/health says what a load balancer must know: loading, ready, stuck, dead."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from held_steps import held_steps

from turboquant_server import __version__
from turboquant_server.app import build_app, check_health
from turboquant_server.config import ServerConfig
from turboquant_server.engine.engine import Engine
from turboquant_server.model_manager import ModelLoadError, ModelManager

Serve = Callable[[FastAPI], AbstractContextManager[str]]
TIMEOUT = 20

pytestmark = pytest.mark.usefixtures("no_variables")


def health(url: str) -> tuple[int, str | None]:
    response = httpx.get(f"{url}/health", timeout=TIMEOUT)
    if response.status_code == 200:
        assert response.json() == {"status": "ok"}
        return 200, None
    assert "retry-after" in response.headers
    return response.status_code, response.json()["error"]["code"]


def test_a_server_is_loading_then_healthy_then_dead(serve: Serve, tiny_model_dir: Path) -> None:
    manager = ModelManager(ServerConfig(model=str(tiny_model_dir), device="cpu", kv_cache_memory="16MiB"))
    manager.created -= 700  # as if that long ago
    with serve(build_app(manager)) as url:
        assert health(url) == (503, "model_loading")
        assert re.search(r"for 70\d s so far", httpx.get(f"{url}/health").text)  # a busy machine takes some
        assert httpx.get(f"{url}/version").json() == {"version": __version__}
        assert httpx.get(f"{url}/metrics").status_code == 200
        manager.load()
        assert health(url) == (200, None)
        manager.engine.shutdown()
        assert health(url) == (503, "engine_dead")
    manager.unload()


def test_a_model_that_is_told_to_go_while_it_is_looked_at_goes_later(
    serve: Serve, loaded: Any, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unloads: list[threading.Thread] = []

    def check_slowly(manager: ModelManager) -> None:
        unloads.append(threading.Thread(target=manager.unload))
        unloads[0].start()
        unloads[0].join(0.2)
        check_health(manager)

    monkeypatch.setattr("turboquant_server.app.check_health", check_slowly)
    with loaded(tiny_model_dir) as manager, serve(build_app(manager)) as url:
        assert health(url) == (200, None)
        unloads[0].join(TIMEOUT)
        assert httpx.get(f"{url}/health").json() == {"status": "unloaded"}


def test_work_without_a_step_is_told_and_rest_is_not(running_server: Any, tiny_model_dir: Path) -> None:
    with running_server(tiny_model_dir, step_timeout=100) as server:
        engine = server.model_manager.engine
        engine._step_began -= 1000  # a long rest
        assert health(server.url) == (200, None)
        with held_steps(server.model_manager) as held:
            thread = threading.Thread(
                target=httpx.post,
                args=(f"{server.url}/v1/completions",),
                kwargs={"json": {"prompt": "a", "max_tokens": 2, "ignore_eos": True}, "timeout": TIMEOUT},
            )
            thread.start()
            held.wait_for_step()
            assert health(server.url) == (200, None)
            engine._step_began -= 99
            assert health(server.url) == (200, None)
            engine._step_began -= 1
            assert health(server.url) == (503, "engine_stalled")
            assert httpx.get(f"{server.url}/v1/models").status_code == 200
            held.let_go(1)
            held.wait_for_step()
            assert health(server.url) == (200, None)
        thread.join(TIMEOUT)
        server.wait_until_idle()
        assert engine.seconds_in_step == 0


def test_a_request_after_a_rest_is_no_long_step(running_server: Any, tiny_model_dir: Path) -> None:
    with running_server(tiny_model_dir) as server:
        engine = server.model_manager.engine
        longest = 0.0
        for _ in range(3):
            engine._step_began -= 1000
            body = {"prompt": "a", "max_tokens": 20, "ignore_eos": True}
            thread = threading.Thread(
                target=httpx.post, args=(f"{server.url}/v1/completions",), kwargs={"json": body}
            )
            thread.start()
            while thread.is_alive():
                longest = max(longest, engine.seconds_in_step)
                time.sleep(0.0005)
            thread.join()
        assert 0 < longest < 100


def test_an_engine_that_dies_of_its_first_step_is_a_failure_to_load(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "step", lambda engine: 1 / 0)
    manager = ModelManager(ServerConfig(model=str(tiny_model_dir), device="cpu", kv_cache_memory="16MiB"))
    with pytest.raises(ModelLoadError, match=r"the first step of .* failed; the log above has the details"):
        manager.load()
    assert not manager.is_ready and not hasattr(manager, "engine")
