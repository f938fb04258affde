"""The real application on a loopback port, for tests that talk HTTP to it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import architectures
import httpx
import pytest
import uvicorn
from anthropic import Anthropic
from life_server import LifeServer, life_server
from openai import OpenAI
from scripted_engine import ScriptedEngine, install

from turboquant_server import cache_plan
from turboquant_server.app import build_app
from turboquant_server.config import ServerConfig
from turboquant_server.engine import token_drawer
from turboquant_server.model_manager import ModelManager

if TYPE_CHECKING:
    from fastapi import FastAPI
    from transformers import PreTrainedTokenizerFast

TIMEOUT = 20
SLOW_STEP, SOON = 0.02, 3.0
MODEL_NAME = "tiny"


@dataclass(frozen=True)
class RunningServer:
    """An application that answers at ``url``, and the model manager behind it."""

    url: str
    model_manager: ModelManager

    def wait_until_idle(self) -> float:
        """Wait until the engine holds no request and no block; return the seconds that it took."""
        started = time.monotonic()
        engine = self.model_manager.engine
        while engine.num_running or engine.num_waiting:
            assert time.monotonic() - started < TIMEOUT, "the engine still holds requests"
            time.sleep(0.005)
        seconds = time.monotonic() - started
        time.sleep(0.05)  # for the step that ended the last one
        self.model_manager.check_integrity()
        assert self.num_free_blocks == list(self.model_manager._cache_size.num_blocks)
        return seconds

    @property
    def num_free_blocks(self) -> list[int]:
        """How many blocks no request holds, of each group of layers."""
        return self.model_manager._cache_manager.num_free_blocks


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


@contextlib.contextmanager
def _loaded(model_dir: Path, **options: Any) -> Iterator[ModelManager]:
    """Serve a model on the CPU, planned on little text, with a small cache unless another is asked for."""
    manager = ModelManager(
        ServerConfig(**{"model": str(model_dir), "device": "cpu", "kv_cache_memory": 16 * 2**20, **options})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_plan, "LARGE_FOR_A_CPU", 0)
        manager.load()
    try:
        yield manager
    finally:
        manager.unload()


@pytest.fixture(scope="session")
def loaded() -> Callable[..., contextlib.AbstractContextManager[ModelManager]]:
    """Load the model of a directory, with these options, for the length of a ``with`` block."""
    return _loaded


@contextlib.contextmanager
def _running_server(model_dir: Path, **options: Any) -> Iterator[RunningServer]:
    with _loaded(model_dir, **options) as manager, _serve(build_app(manager)) as url:
        yield RunningServer(url, manager)


@pytest.fixture(scope="session")
def running_server() -> Callable[..., contextlib.AbstractContextManager[RunningServer]]:
    """Serve the model of a directory, with these options, for the length of a ``with`` block."""
    return _running_server


@pytest.fixture(scope="session")
def save_model(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """Save a model of the table with the tiny model's tokenizer and a longer context."""

    def save(name: str, **options: Any) -> Path:
        path = tmp_path_factory.mktemp(name)
        more = {"vocab_size": 300, "max_position_embeddings": 4096, **options}
        with pytest.MonkeyPatch.context() as patch:
            original = architectures.ARCHITECTURES[name]
            changed = architectures.Architecture({**original.options, **more}, original.serving)
            patch.setitem(architectures.ARCHITECTURES, name, changed)
            architectures.build(name).save_pretrained(path)
        tiny_tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def two_models(tiny_model_dir: Path, save_model: Callable[..., Path]) -> list[dict[str, Any]]:
    """Name two models, one with twice the context of the other."""
    return [{"name": "a", "model": str(tiny_model_dir)}, {"name": "b", "model": str(save_model("llama"))}]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for requests that wait."""
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture(scope="module")
def one_at_a_time(two_models: list[dict[str, Any]]) -> Iterator[LifeServer]:
    """Serve two models, of which one is in memory."""
    with life_server(models=two_models, sse_keep_alive_interval=0.05) as server:
        yield server


@pytest.fixture
def switching(one_at_a_time: LifeServer) -> LifeServer:
    """The same with the first one in memory."""
    assert one_at_a_time.change("load", "a").status_code == 200
    return one_at_a_time


@pytest.fixture(scope="session")
def server(tiny_model_dir: Path) -> Iterator[RunningServer]:
    """Serve the tiny model, as ``turboquant-server`` would."""
    config = ServerConfig(
        model=str(tiny_model_dir),
        device="cpu",
        dtype="float32",
        served_model_name=(MODEL_NAME, "alias"),
        kv_cache_memory=32 * 2**20,  # 20 requests at a time
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
def anthropic_client(server: RunningServer) -> Iterator[Anthropic]:
    """Anthropic's SDK, talking to the server."""
    with Anthropic(base_url=server.url, api_key="unused", max_retries=0, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """A plain HTTP client of the server."""
    with httpx.Client(base_url=server.url, timeout=TIMEOUT) as http:
        yield http


@pytest.fixture
def engine(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    """Let a scripted engine answer the server's requests."""
    return install(monkeypatch, server.model_manager)


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each token take SLOW_STEP seconds."""
    sample = token_drawer.sample

    def slow_sample(*arguments: Any, **options: Any) -> Any:
        time.sleep(SLOW_STEP)
        return sample(*arguments, **options)

    monkeypatch.setattr(token_drawer, "sample", slow_sample)


@pytest.fixture
def idle_afterwards(server: RunningServer) -> Iterator[None]:
    """Check that the engine soon has nothing left to do."""
    yield
    assert server.wait_until_idle() < SOON
