"""The web pages: a chat at /, and what the API takes at /docs. Each is one file and holds no secret.

A page asks this server for its data, with the key of whoever looks at it. The policy that comes with it lets
a browser run what stands in the file and nothing else, and talk to this server and nobody else.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

CHAT_PAGE = "/"
DOCS_PAGE = "/docs"
FILES = Path(__file__).parents[1] / "page"


def add_page(app: FastAPI, path: str, name: str) -> None:
    """Serve a file of the pages' directory.

    Args:
        app: The application.
        path: Where the page is found.
        name: The file's.
    """
    html = (FILES / name).read_text("utf-8")
    headers = {
        "Content-Security-Policy": content_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    # Claude Code asks for the head of / before its first request.
    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False, response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)


def content_policy(html: str) -> str:
    """Return the Content-Security-Policy of a page, with the hashes of its scripts and styles."""
    sources = {
        tag: " ".join(_hash(text) for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL))
        for tag in ("script", "style")
    }
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {sources['script']}",
            f"style-src {sources['style']}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # No text ever becomes HTML: browsers refuse innerHTML and its like.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
