"""Nobody comes in without a key, pages of strangers stay outside, and every response has an id."""

from __future__ import annotations

import logging
import re
import string
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI

from turboquant_server import cli
from turboquant_server.api.api_keys import ApiKeys
from turboquant_server.api.request_id import choose_request_id
from turboquant_server.app import build_app
from turboquant_server.config import ServerConfig
from turboquant_server.model_manager import ModelManager

Serve = Callable[[FastAPI], AbstractContextManager[str]]

pytestmark = pytest.mark.usefixtures("no_variables")

KEYS = ("first-key", "schlüssel-ключ")
CHAT = "/v1/chat/completions"
CHAT_BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
PATHS = (
    *("/v1/models", "/v1/models/tiny", "/version", "/metrics", "/openapi.json", "/nothing"),
    *(CHAT, "/v1/completions", "/tokenize", "/detokenize"),
)


def bearer(key: str) -> dict[str, bytes]:
    return {"Authorization": b"Bearer " + key.encode()}


@pytest.fixture(scope="module")
def locked(running_server: Any, tiny_model_dir: Path) -> Iterator[Any]:
    with running_server(tiny_model_dir, api_key=KEYS, served_model_name=("tiny",)) as server:
        yield server


@pytest.fixture(scope="module")
def http(locked: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=locked.url) as http:
        yield http


def test_the_sdk_comes_in_with_any_of_the_keys_and_with_no_other(locked: Any) -> None:
    with OpenAI(base_url=f"{locked.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        assert client.chat.completions.create(model="tiny", **CHAT_BODY).usage is not None
        assert list(client.completions.create(model="tiny", prompt="a", max_tokens=2, stream=True))
    with (
        OpenAI(base_url=f"{locked.url}/v1", api_key="first-keys", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="Incorrect API key") as caught,
    ):
        client.models.list()
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "didn't provide an API key"),
        ({"Authorization": "Bearer"}, "didn't provide"),
        ({"Authorization": "Basic first-key"}, "didn't provide"),
        ({"Authorization": "first-key"}, "didn't provide"),
        ({"Authorization": "Bearer first-ke"}, "Incorrect"),
        ({"Authorization": "Bearer FIRST-KEY"}, "Incorrect"),
        ({"Authorization": "Bearer first-key,schlüssel-ключ".encode()}, "Incorrect"),
        ({"Authorization": "Bearer schlüssel".encode("latin-1")}, "Incorrect"),
        ({"Authorization": b"Bearer \xff\xfe\x80"}, "Incorrect"),
        ({"x-api-key": "second"}, "Incorrect"),
    ],
    ids=str,
)
def test_every_path_asks_for_a_key(
    http: httpx.Client, path: str, headers: dict[str, Any], words: str
) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        response = http.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-should-retry"] == "false"
        error = response.json()["error"]
        assert words in error["message"]
        assert (error["type"], error["param"], error["code"]) == (
            "invalid_request_error",
            None,
            "invalid_api_key",
        )
        assert "key," not in response.text and "schl" not in response.text


@pytest.mark.parametrize("key", KEYS)
def test_a_key_opens_every_path_in_either_header(http: httpx.Client, key: str) -> None:
    for headers in (bearer(key), {"authorization": b"bearer   " + key.encode()}, {"x-api-key": key.encode()}):
        assert http.get("/version", headers=headers).status_code == 200
        assert http.get("/metrics", headers=headers).status_code == 200
        assert http.get("/nothing", headers=headers).status_code == 404
        assert http.post(CHAT, json=CHAT_BODY, headers=headers).status_code == 200


def test_health_is_public_and_metrics_can_be(http: httpx.Client, serve: Serve) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    app = build_app(ModelManager(ServerConfig(api_key="k", public_metrics=True)))
    with serve(app) as url:
        assert httpx.get(f"{url}/metrics").status_code == 200
        assert httpx.get(f"{url}/version").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 503  # no model, but no question for a key


def test_without_keys_any_is_welcome(serve: Serve) -> None:
    with serve(build_app(ModelManager(ServerConfig()))) as url:
        assert httpx.get(f"{url}/version", headers=bearer("whatever")).status_code == 200


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4), st.binary())
def test_bytes_are_a_key_if_and_only_if_they_are_one_of_them(keys: list[str], sent: bytes) -> None:
    encoded = [key.encode() for key in keys]
    check = ApiKeys(keys).check
    for candidate in (sent, *encoded):
        is_let_in = check([(b"x-api-key", candidate)]) is None
        assert is_let_in == (candidate in encoded)


def test_pages_of_other_origins_may_not_call(http: httpx.Client) -> None:
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert http.options(CHAT, headers=headers).status_code == 401
    response = http.get("/health", headers=headers)
    assert not any(name.startswith("access-control") for name in response.headers)


def test_pages_of_allowed_origins_may_call_and_read_errors(serve: Serve) -> None:
    config = ServerConfig(api_key="k", allowed_origins="https://a.example, http://localhost:3000")
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with serve(build_app(ModelManager(config))) as url, httpx.Client(base_url=url) as http:
        for origin in config.allowed_origins:
            allowed = http.options(CHAT, headers={"Origin": origin, **preflight})
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == origin
            assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
            refused = http.post(CHAT, json=CHAT_BODY, headers={"Origin": origin})
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == origin
        other = {"Origin": "https://b.example", **preflight}
        assert http.options(CHAT, headers=other).status_code == 400
        assert "access-control-allow-origin" not in http.get("/health", headers=other).headers


def test_a_response_has_the_id_of_its_request(http: httpx.Client) -> None:
    wanted = {"X-Request-Id": "trace/7=Root;1:a"}
    for response in (
        http.get("/health", headers=wanted),
        http.get("/version", headers=wanted),  # 401
        http.get("/nothing", headers={**wanted, **bearer(KEYS[0])}),
        http.post(CHAT, json=CHAT_BODY, headers={**wanted, **bearer(KEYS[0])}),
        http.post(CHAT, json={**CHAT_BODY, "stream": True}, headers={**wanted, **bearer(KEYS[0])}),
    ):
        assert response.headers.get_list("x-request-id") == ["trace/7=Root;1:a"]
    made = {http.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3 and all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in made)


def test_the_sdk_gives_the_id(locked: Any) -> None:
    with OpenAI(base_url=f"{locked.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        completion = client.completions.create(
            model="tiny", prompt="a", max_tokens=1, extra_headers={"X-Request-Id": "mine"}
        )
        assert completion._request_id == "mine"
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="other", prompt="a", extra_headers={"X-Request-Id": "mine-2"})
        assert caught.value.request_id == "mine-2"


@given(st.text(st.characters(max_codepoint=255)) | st.text(string.printable, min_size=120, max_size=140))
def test_only_a_short_visible_id_is_taken_over(wanted: str) -> None:
    is_decent = 0 < len(wanted) <= 128 and all("!" <= character <= "~" for character in wanted)
    assert (choose_request_id(wanted) == wanted) is is_decent


def test_the_log_names_the_request_whose_failure_it_tells_and_no_key(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("in /some/path")

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    for name in ("uvicorn.error", "huggingface_hub", "httpx", "httpx2", "uvicorn"):
        for attribute in ("filters", "propagate", "level"):
            monkeypatch.setattr(
                logging.getLogger(name), attribute, getattr(logging.getLogger(name), attribute)
            )
    cli.configure_logging()
    monkeypatch.setattr("turboquant_server.api.tokens.check_token_ids", fail)
    response = http.post(
        "/detokenize", json={"tokens": [1]}, headers={"X-Request-Id": "mine", **bearer(KEYS[0])}
    )
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["error"]["type"] == "server_error"
    assert "path" not in response.text and "Zero" not in response.text
    log, deadline = "", time.monotonic() + 10
    while "ZeroDivisionError: in" not in log:  # uvicorn logs after the response
        assert time.monotonic() < deadline
        log += capfd.readouterr().err
    assert "uvicorn.error [mine]: Exception in ASGI application" in log
    assert KEYS[0] not in log
