"""What comes over the wire and is no request as a library sends it, or one that would take too much."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from turboquant_server.app import MAX_BODY_BYTES

if TYPE_CHECKING:
    from conftest import RunningServer

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
BODY = json.dumps({"messages": MESSAGES, "max_tokens": 2, "ignore_eos": True}).encode()
JSON = {"Content-Type": "application/json"}
TIMEOUT = 20


def as_chunks(body: bytes, size: int) -> bytes:
    """Return a body as HTTP/1.1 sends one whose length is not known."""
    chunks = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def request(
    body: bytes = b"", method: str = "POST", path: str = CHAT, version: str = "1.1", **headers: str
) -> bytes:
    lines = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    if "Transfer-Encoding" in headers:
        del lines["Content-Length"]
    head = [f"{method} {path} HTTP/{version}", *(f"{name}: {value}" for name, value in lines.items())]
    return "\r\n".join([*head, "Connection: close", "", ""]).encode() + body


def send(server: RunningServer, data: bytes) -> httpx.Response:
    """Send these bytes and return what comes until the server closes the connection."""
    url = httpx.URL(server.url)
    answer = b""
    with socket.create_connection((url.host, url.port or 0), TIMEOUT) as connection:
        connection.sendall(data)
        while piece := connection.recv(2**16):
            answer += piece
    head, _, content = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return httpx.Response(int(status.split()[1]), headers=headers, content=content)


@pytest.mark.parametrize(
    "data",
    [
        request(BODY),
        request(BODY, version="1.0"),
        request(as_chunks(BODY, 7), **{"Transfer-Encoding": "chunked"}),
        request(BODY, **{"Content-Type": "Application/JSON;charset=UTF-8"}),
        request(BODY, **{f"X-Header-{index}": "x" * 100 for index in range(100)}),
        request(b"\xef\xbb\xbf" + BODY),
    ],
    ids=["HTTP/1.1", "HTTP/1.0", "chunks", "charset", "many headers", "byte order mark"],
)
def test_unusual_requests_are_answered(server: RunningServer, data: bytes) -> None:
    response = send(server, data)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_of_a_hundred_megabytes_is_refused(server: RunningServer, is_announced: bool) -> None:
    megabyte = b"x" * 10**6
    body = megabyte * 100 if is_announced else (megabyte for _ in range(100))
    response = httpx.post(server.url + CHAT, content=body, headers=JSON, timeout=TIMEOUT)
    assert response.status_code == 413
    assert str(MAX_BODY_BYTES) in response.json()["error"]["message"]


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "GET", "PUT", "PATCH", "DELETE", "TRACE"])
def test_other_methods_are_told_which_one_is_right(server: RunningServer, method: str) -> None:
    response = send(server, request(method=method))
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    if method != "HEAD":
        assert response.json()["error"]["message"] == f"{method} is not allowed on {CHAT}"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        request(BODY, **{"Content-Length": "-5"}),
        request(BODY, **{"Content-Length": "9" * 30}),
        request(b"zz\r\nabc\r\n", **{"Transfer-Encoding": "chunked"}),
        request(BODY, **{"Content Type": "x"}),
        request(path="/" + "a" * 70_000),
    ],
    ids=["TLS", "HTTP/2", "negative length", "huge length", "no chunks", "header", "path"],
)
def test_what_is_no_http_is_a_bad_request(server: RunningServer, data: bytes) -> None:
    assert send(server, data).status_code == 400
    assert send(server, request(BODY)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1//models", "//v1/models", "/v1/chat"])
def test_an_unknown_path_is_named(server: RunningServer, path: str) -> None:
    response = send(server, request(method="GET", path=path))
    assert response.status_code == 404
    assert response.json()["error"]["message"] == f"Unknown URL: GET {path}"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x" * 10**6}]}, "messages"),
        ("/v1/completions", {"prompt": "x" * 10**6}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "é" * 10**6]}, "prompt"),
        ("/tokenize", {"prompt": "x" * 10**6}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 10**6}]}, "messages"),
    ],
)
def test_a_text_that_no_tokenization_makes_short_enough_is_not_tokenized(
    server: RunningServer, path: str, body: dict[str, Any], param: str
) -> None:
    response = httpx.post(server.url + path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert "maximum context length is 2048 tokens" in error["message"]
    assert "characters" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_is_too_complex_is_the_clients_fault(server: RunningServer, stream: bool) -> None:
    fields = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    response = httpx.post(server.url + CHAT, json={**fields, "guided_regex": "a" * 10**6}, timeout=TIMEOUT)
    if stream:
        *_, event, done = response.text.removesuffix("\n\n").split("\n\n")
        assert (response.status_code, done) == (200, "data: [DONE]")
        error = json.loads(event.removeprefix("data: "))["error"]
    else:
        assert response.status_code == 400
        error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "grammar_too_complex")
    assert "too many expressions" in error["message"]


def test_reasons_for_a_grammar_are_sentences(server: RunningServer) -> None:
    schema = {"guided_json": {"$ref": "#"}}
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hi", **schema})
    assert response.json()["error"]["message"] == "Invalid 'guided_json': no answer can begin as it wants"
