"""Chromium without a window, for tests that look at pages as people do, over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

TIMEOUT = 30
EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}
SHIFT = 8


class Page:
    """One page of a browser.

    Args:
        connection: To the page, over which commands go and events come.

    Attributes:
        urls: Of all requests that the page has made.
        errors: What the console has told that is wrong, exceptions and violations of its policy included.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._num_commands = 0
        self.urls: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Run a command of the protocol and return its result; events that come meanwhile are taken in."""
        self._num_commands += 1
        self._connection.send(json.dumps({"id": self._num_commands, "method": method, "params": params}))
        while True:
            message = json.loads(self._connection.recv(TIMEOUT))
            if message.get("id") == self._num_commands:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._take(message)

    def open(self, url: str) -> None:
        """Go to an address and wait until the page is there."""
        self.command("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, of which promises are awaited."""
        answer = self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is truthy."""
        deadline = time.monotonic() + TIMEOUT
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, (expression, self.errors, self.text())
            time.sleep(0.02)

    def text(self, selector: str = "body") -> str:
        """Return the text that is seen of an element."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def type(self, text: str) -> None:
        """Write a text where the cursor is."""
        self.command("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key and let it go."""
        details = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        text = {"text": "\r"} if key == "Enter" else {}
        self.command("Input.dispatchKeyEvent", type="keyDown", **details, **text)
        self.command("Input.dispatchKeyEvent", type="keyUp", **details)

    def click(self, selector: str) -> None:
        """Click on an element."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def resize(self, width: int, height: int) -> None:
        """Give the page a size in CSS pixels."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def screenshot(self, path: Path) -> None:
        """Write what is seen to a PNG file."""
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))

    def _take(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.urls.append(params["request"]["url"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(json.dumps(params["args"]))


@contextmanager
def open_browser(directory: Path) -> Iterator[Page]:
    """Run a browser for the length of a ``with`` block and yield its page.

    Args:
        directory: Empty; the browser's own.
    """
    assert EXECUTABLE is not None
    options = [
        *("--headless", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--remote-debugging-port=0", f"--user-data-dir={directory}"),
        *(["--no-sandbox"] if os.geteuid() == 0 else []),  # which root may not have
    ]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen([EXECUTABLE, *options, "about:blank"], stdout=log, stderr=log)
    try:
        port = _wait_for_port(directory / "DevToolsActivePort")
        with connect(_find_page(port), max_size=None, max_queue=None, ping_interval=None) as connection:
            yield Page(connection)
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def _wait_for_port(file: Path) -> int:
    deadline = time.monotonic() + TIMEOUT
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline, "the browser did not start"
        time.sleep(0.05)
    return int(file.read_text().splitlines()[0])


def _find_page(port: int) -> str:
    targets = httpx.get(f"http://127.0.0.1:{port}/json", timeout=TIMEOUT).json()
    return next(str(target["webSocketDebuggerUrl"]) for target in targets if target["type"] == "page")
