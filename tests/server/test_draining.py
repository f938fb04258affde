"""After a signal what is under way finishes and what comes is sent away; a second signal ends everything.

More than 300 lines: a certificate and its key are part of them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from dockerfile import parse_dockerfile
from held_steps import held_steps
from openai import DefaultHttpxClient, OpenAI

from turboquant_server import cli, draining_server
from turboquant_server.app import build_app
from turboquant_server.config import ServerConfig
from turboquant_server.draining_server import DrainingServer

pytestmark = pytest.mark.usefixtures("no_variables")

CHAT = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "What is the access code?"}]
TIMEOUT = 20
START_SECONDS = 60
REPOSITORY = Path(__file__).resolve().parents[2]
STEP_SECONDS = 0.01
STREAM = {"messages": MESSAGES, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}

# For 127.0.0.1 and a hundred years, by `openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1
# -nodes -days 36500 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1`.
TEST_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgR/593rmC51W/n9Jm
5ve8ST6HWsFifiUoe4DTMNQrgtahRANCAASw0DBTkUvtK/UmKfvKmDZBI3/tJHlZ
APWVDIiD3FqznlSvllosZD3dv7iN4crc8H09ZC+6gjKfAhjZR2/CJIVA
-----END PRIVATE KEY-----
"""
TEST_CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBkDCCATagAwIBAgIUCCwdbBjoXn0i2Z946gg/3AjZqaAwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJMTI3LjAuMC4xMCAXDTI2MTEyNjAyMjYxMVoYDzIxMjYxMTAy
MDIyNjExWjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAASw0DBTkUvtK/UmKfvKmDZBI3/tJHlZAPWVDIiD3FqznlSvllosZD3d
v7iN4crc8H09ZC+6gjKfAhjZR2/CJIVAo2QwYjAdBgNVHQ4EFgQUkFyLaldWrz1v
SvJSJpGSfVsCUmgwHwYDVR0jBBgwFoAUkFyLaldWrz1vSvJSJpGSfVsCUmgwDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0gAMEUC
ICSugOVOvksTLnC9lT26toWHa6gE2ZDHBX7KmXGJy1OhAiEAoU3sqBdyEvnFQlJo
mt1gvtBtvJ8VZcbTd5OIBag/n30=
-----END CERTIFICATE-----
"""


class Draining:
    """A DrainingServer on a thread, and a client that keeps its connections."""

    def __init__(
        self, url: str, server: DrainingServer, thread: threading.Thread, http: httpx.Client
    ) -> None:
        self.url = url
        self.server = server
        self.http = http
        self._thread = thread

    def signal(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)

    def seconds_to_end(self) -> float:
        started = time.monotonic()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        return time.monotonic() - started

    @contextmanager
    def stream(self, max_tokens: int) -> Iterator[Iterator[str]]:
        """Yield the events of an answer."""
        with self.http.stream("POST", CHAT, json={**STREAM, "max_tokens": max_tokens}) as response:
            yield (line.removeprefix("data: ") for line in response.iter_lines() if line)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Keep the process when a server would end it."""
    killed: list[bool] = []
    monkeypatch.setattr(draining_server, "_kill", lambda: killed.append(True))
    return killed


@pytest.fixture
def drain(
    loaded: Any, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, killed: list[bool]
) -> Iterator[Callable[..., Any]]:
    """Run a server with a timeout for the length of a ``with`` block."""

    @contextmanager
    def running(timeout: float) -> Iterator[Draining]:
        with (
            loaded(tiny_model_dir) as manager,
            socket.create_server(("127.0.0.1", 0)) as listener,
        ):
            step = manager.engine._engine.step

            def slow_step() -> Any:
                time.sleep(STEP_SECONDS)
                return step()

            monkeypatch.setattr(manager.engine._engine, "step", slow_step)
            app = build_app(manager)
            config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=5)
            server = DrainingServer(config, app.state.door, app.state.models, timeout)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=TIMEOUT) as http:
                yield Draining(url, server, thread, http)
            server.should_exit = True
            thread.join(TIMEOUT)

    yield running


def test_a_stream_finishes_and_new_requests_are_sent_away(drain: Callable[..., Any]) -> None:
    with drain(TIMEOUT) as draining:
        assert draining.http.get("/health").status_code == 200
        with draining.stream(60) as events:
            next(events)
            draining.signal()
            time.sleep(0.2)  # two ticks
            for client in (draining.http, httpx):  # on a connection that is open, and on a new one
                base = "" if client is draining.http else draining.url
                for response in (
                    client.post(base + CHAT, json={"messages": MESSAGES}),
                    client.get(f"{base}/health"),
                    client.get(f"{base}/v1/models"),
                ):
                    assert response.status_code == 503
                    assert int(response.headers["retry-after"]) > 0
                    assert response.headers["connection"] == "close"
                    assert response.json()["error"]["code"] == "shutting_down"
                assert client.get(f"{base}/metrics").status_code == 200
            *_, usage, done = events
        assert json.loads(usage)["usage"]["completion_tokens"] == 60
        assert done == "[DONE]"
        assert draining.seconds_to_end() < 2
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{draining.url}/health")


def test_a_server_at_rest_ends_at_once(drain: Callable[..., Any]) -> None:
    with drain(TIMEOUT) as draining:
        assert draining.http.get("/health").status_code == 200
        draining.signal()
        assert draining.seconds_to_end() < 2


@pytest.mark.parametrize("num_signals", [1, 2])
def test_what_does_not_finish_in_time_or_before_a_second_signal_ends_with_an_error(
    drain: Callable[..., Any], num_signals: int, killed: list[bool]
) -> None:
    with drain(0.5 if num_signals == 1 else TIMEOUT) as draining:
        with draining.stream(1500) as events:
            next(events)
            started = time.monotonic()
            for _ in range(num_signals):
                draining.signal()
            *_, error, done = events
        assert json.loads(error)["error"]["code"] == "engine_dead"
        assert done == "[DONE]"
        assert draining.seconds_to_end() < 2
        assert (time.monotonic() - started > 0.5) is (num_signals == 1)
    assert not killed


def test_a_step_that_hangs_keeps_neither_the_last_words_nor_the_process(
    drain: Callable[..., Any], killed: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining_server, "CUT_OFF_SECONDS", 0.5)
    with drain(0) as draining, held_steps(draining.server._models.managers[0]) as held:
        with draining.stream(100) as events:
            held.wait_for_step()
            draining.signal()
            *_, error, done = events
        assert json.loads(error)["error"]["code"] == "engine_dead"
        assert done == "[DONE]"
        deadline = time.monotonic() + TIMEOUT
        while not killed:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_engine_that_is_taken_away_meanwhile_is_cut_off(killed: list[bool]) -> None:
    class Manager:
        """Is unloaded as soon as somebody looks."""

        def __init__(self) -> None:
            self.leaving = threading.Lock()
            self.engine: Any = SimpleNamespace(shutdown=lambda timeout: cut_off.append(True))

        @property
        def is_ready(self) -> bool:
            unload = threading.Thread(target=self.unload)
            unload.start()
            unload.join(0.1)
            return True

        def unload(self) -> None:
            with self.leaving:
                del self.engine

    cut_off: list[bool] = []
    models: Any = SimpleNamespace(managers=[Manager(), Manager()])
    door: Any = None
    DrainingServer(uvicorn.Config("none"), door, models, TIMEOUT)._cut_off()
    assert cut_off == [True, True]


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    for file, text in zip(files, (TEST_CERTIFICATE, TEST_KEY), strict=True):
        file.write_text(text)
    return files


def check_container_health(url: str, certificate: Path) -> None:
    """Check the health of a server with a certificate as its container would."""
    instructions = parse_dockerfile((REPOSITORY / "docker/Dockerfile").read_text())
    [check] = [instruction.value for instruction in instructions if instruction.name == "HEALTHCHECK"]
    _, *arguments = json.loads(check.partition(" CMD ")[2])
    variables = {"TURBOQUANT_PORT": url.rpartition(":")[2], "TURBOQUANT_SSL_CERTFILE": str(certificate)}
    subprocess.run([sys.executable, *arguments], env={**os.environ, **variables}, check=True)


def test_a_command_with_key_file_and_certificate_serves_until_two_signals(
    tiny_model_dir: Path, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    """What a user with all of it has: settings in a file, the key in a variable, HTTPS on all addresses."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"model: {tiny_model_dir}\nserved-model-name: tiny\nport: 0\nhost: 0.0.0.0\ndevice: cpu\n"
        f"ssl-certfile: {certificate[0]}\nssl-keyfile: {certificate[1]}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "turboquant_server", "--config", str(settings), "--shutdown-timeout", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TURBOQUANT_API_KEY": "top-secret"},
    )
    try:
        assert process.stdout is not None
        output = ""
        while "curl" not in output:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            output += line
        found = re.search(r"^Serving on (https://127\.0\.0\.1:\d+)$", output, re.MULTILINE)
        assert found and "-H 'Authorization: Bearer KEY'" in output
        check_container_health(found[1], certificate[0])
        context = ssl.create_default_context(cafile=certificate[0])
        http = DefaultHttpxClient(verify=context)
        with OpenAI(
            base_url=f"{found[1]}/v1", api_key="top-secret", http_client=http, max_retries=0
        ) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="top-secre").models.list()
            stream = client.chat.completions.create(
                model="tiny",
                messages=MESSAGES,
                max_tokens=2000,
                stream=True,
                extra_body={"ignore_eos": True, "top_k": 5},
            )
            next(stream)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            next(stream)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="shut down"):
                list(stream)
        _, log = process.communicate(timeout=START_SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, log
    assert "top-secret" not in output + log
    assert "WARNING" not in log  # all addresses, but with a key


@pytest.mark.parametrize("broken", ["certificate.pem", "key.pem", "missing"])
def test_a_certificate_that_cannot_be_used_ends_with_one_sentence(
    certificate: tuple[Path, Path], broken: str, tmp_path: Path
) -> None:
    if broken != "missing":
        (tmp_path / broken).write_text("no PEM")
    config = ServerConfig(
        port=0,
        ssl_certfile=str(certificate[0]),
        ssl_keyfile=str(tmp_path / "nothing" if broken == "missing" else certificate[1]),
    )
    with pytest.raises(
        cli.StartError, match=r"--ssl-certfile .* and --ssl-keyfile .* cannot be used \(.+\); "
    ):
        cli.serve(config)
