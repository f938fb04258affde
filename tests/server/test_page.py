"""The pages are there, need nobody else, read what the server gives, and are gone with --no-ui."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import turboquant_server
from turboquant_server.app import build_app
from turboquant_server.config import ServerConfig
from turboquant_server.metrics import PREFIX
from turboquant_server.model_manager import ModelManager

Serve = Callable[[FastAPI], AbstractContextManager[str]]

pytestmark = pytest.mark.usefixtures("no_variables")

FILES = Path(turboquant_server.__file__).parent / "page"
PAGES = {"/": FILES / "index.html", "/docs": FILES / "docs.html"}
both_pages = pytest.mark.parametrize("path", PAGES)
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


class Elements(HTMLParser):
    """The elements of a page, and what stands in its scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None:
            self.texts[self.cdata_elem].append(data)


def script(path: str) -> str:
    return "".join(Elements(PAGES[path].read_text("utf-8")).texts["script"])


def policy(response: httpx.Response) -> dict[str, str]:
    directives = response.headers["content-security-policy"].split("; ")
    return {name: value for name, _, value in (directive.partition(" ") for directive in directives)}


@both_pages
def test_a_page_is_its_file_and_lets_nothing_else_in(serve: Serve, path: str) -> None:
    with serve(build_app(ModelManager(ServerConfig()))) as url:
        response = httpx.get(f"{url}{path}")
        head = httpx.head(f"{url}{path}")
    assert response.status_code == 200 and response.content == PAGES[path].read_bytes()
    assert (head.status_code, head.content) == (200, b"")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    directives = policy(response)
    assert directives["default-src"] == directives["frame-ancestors"] == directives["base-uri"] == "'none'"
    assert directives["connect-src"] == "'self'"
    elements = Elements(response.text)
    for tag in ("script", "style"):
        [text] = elements.texts[tag]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert directives[f"{tag}-src"] == f"'sha256-{digest}'"
    # A policy of hashes would not let these do anything.
    assert not [name for name, _ in elements.attributes if name == "style" or name.startswith("on")]


@both_pages
def test_a_page_names_no_other_server(path: str) -> None:
    html = PAGES[path].read_text("utf-8")
    assert not re.search(r"//\w|@import|url\(", html.replace(SVG_NAMESPACE, ""))
    elements = Elements(html)
    links = [value or "" for name, value in elements.attributes if name in ("href", "src", "action")]
    assert links and all(link in ("docs", "openapi.json", "./") or link[:5] == "data:" for link in links)


def test_a_page_needs_no_key_but_its_data_does(serve: Serve) -> None:
    with serve(build_app(ModelManager(ServerConfig(api_key="k")))) as url:
        for path in PAGES:
            assert httpx.get(f"{url}{path}").status_code == 200
        for path in ("/metrics", "/openapi.json", "/v1/chat/completions", "/index.html", "//"):
            assert httpx.get(f"{url}{path}").status_code == 401


def test_without_the_ui_there_is_no_chat(serve: Serve) -> None:
    with serve(build_app(ModelManager(ServerConfig(ui=False)))) as url:
        response = httpx.get(f"{url}/")
        assert response.status_code == 404 and response.json()["error"]["message"]
        assert httpx.get(f"{url}/docs").status_code == 200
    with serve(build_app(ModelManager(ServerConfig(ui=False, api_key="k")))) as url:
        assert httpx.get(f"{url}/").status_code == 401


def test_the_server_gives_every_metric_that_the_page_reads(http: httpx.Client) -> None:
    [names] = re.findall(r"const NAMES = \[(.+?)\]", script("/"), re.DOTALL)
    read = set(re.findall(r'"(\w+)"', names))
    assert read == set(re.findall(r"\b(?:kv|num)_\w+|\b\w+_total\b", script("/")))
    text = http.get("/metrics").text
    given = set(re.findall(rf"^# TYPE {PREFIX}(\w+) (?:gauge|counter)$", text, re.MULTILINE))
    assert read <= given


def test_the_pages_ask_for_paths_that_exist(http: httpx.Client) -> None:
    paths = {path for page in PAGES for path in re.findall(r'(?:call|fetch)\("(.+?)"', script(page))}
    assert paths == {"metrics", "health", "v1/chat/completions", "openapi.json"}
    assert all(http.get(f"/{path}").status_code in (200, 405) for path in paths)


def luminance(colour: str) -> float:
    """Return the relative luminance of ``#rrggbb`` as WCAG defines it."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@both_pages
def test_texts_stand_out_in_both_themes(path: str) -> None:
    [style] = Elements(PAGES[path].read_text("utf-8")).texts["style"]
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\);", style)
    colours: dict[str, Any] = {name: pair for name, *pair in found}
    texts = [
        (text, ground) for text in ("text", "muted", "accent", "error") for ground in ("ground", "raised")
    ]
    texts += [("on-accent", "accent")] if "on-accent" in colours else []
    for theme in (0, 1):
        for text, ground in texts:
            dark, light = sorted(luminance(colours[name][theme]) for name in (text, ground))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (theme, text, ground)
