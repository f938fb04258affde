"""One visit to a server: the request is sent, the answer read to its end or left, and judged.

Knows the four APIs' answers, streamed or not; not what is asked, nor how often.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from serving_client import read_events
from soak_requests import MESSAGES, RESPONSES, Visit

HANG_SECONDS = 120  # longer than any answer may take
LIMITS = (429, 504)  # of the queue and of a request's time
# Where the status has been sent; for the Responses API such an end is a "server_error".
LIMIT_WORDS = ("request_timeout", "timeout_error", "not finished within the")
LAST_EVENTS = ("response.completed", "response.incomplete", "message_stop")
JSON_HEADERS = {"Content-Type": "application/json"}


@dataclass
class Answer:
    """What has come.

    Attributes:
        status: Of HTTP; 0 if nothing came.
        texts: By choice; of calls, their names and arguments.
        has_ended: It is complete.
        error: What an error says, in the body or in the stream.
    """

    status: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    has_ended: bool = False
    error: str = ""

    def add(self, event: dict[str, Any]) -> None:
        """Take in an event of a stream, or a body that is not streamed."""
        kind = event.get("type", "")
        response = event.get("response") or (event if event.get("object") == "response" else {})
        failure = event.get("error") or response.get("error")
        if failure:
            self.error = json.dumps(failure)
        self.has_ended |= kind in LAST_EVENTS
        for choice in event.get("choices") or ():
            part = choice.get("delta") or choice.get("message") or choice
            self._write(choice["index"], part.get("text") or part.get("content") or "")
            for call in part.get("tool_calls") or ():
                function = call["function"]
                self._write(choice["index"], function.get("name") or "", function.get("arguments") or "")
        for item in response.get("output") or () if kind in LAST_EVENTS or response is event else ():
            self._write(0, item.get("name") or "", item.get("arguments") or "")
            for part in item.get("content") or ():
                self._write(0, part.get("text") or "")
        blocks = (
            event.get("content") if kind == "message" else [event.get("content_block"), event.get("delta")]
        )
        for block in (
            blocks or () if kind in ("message", "content_block_start", "content_block_delta") else ()
        ):
            self._write(0, (block or {}).get("text") or "")

    def _write(self, choice: int, *texts: str) -> None:
        self.texts[choice] = self.texts.get(choice, "") + "".join(texts)


@dataclass(frozen=True)
class Outcome:
    """What came of a visit.

    Attributes:
        kind: "answered", "left", "refused", "limited" or "wrong".
        problem: What is wrong.
        texts: The answer, if it is complete.
    """

    kind: str
    problem: str = ""
    texts: tuple[str, ...] = ()


async def pay(visit: Visit, http: httpx.AsyncClient) -> Outcome:
    """Pay a visit and tell what came of it; whatever the server does, nothing is raised."""
    answer = Answer()
    patience = HANG_SECONDS if visit.patience is None else visit.patience
    try:
        await asyncio.wait_for(_ask(visit, http, answer), patience)
    except asyncio.TimeoutError:
        if visit.patience is None:
            return Outcome("wrong", f"no end within {HANG_SECONDS} s of {_describe(visit)}")
        return Outcome("left")
    except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
        return Outcome("wrong", f"{type(error).__name__} {error} for {_describe(visit)}")
    return judge(visit, answer)


def judge(visit: Visit, answer: Answer) -> Outcome:
    """Tell what came of a visit that was not left."""
    is_limit = answer.status in LIMITS or any(word in answer.error for word in LIMIT_WORDS)
    if visit.is_bad and 400 <= answer.status < 500:
        return Outcome("refused")
    if is_limit and not visit.is_bad:
        return Outcome("limited")
    if visit.is_bad or answer.status != 200 or answer.error or not answer.has_ended:
        end = "" if answer.has_ended else ", no end"
        return Outcome("wrong", f"HTTP {answer.status}{end} {answer.error} for {_describe(visit)}")
    return Outcome("answered", texts=tuple(text for _, text in sorted(answer.texts.items())))


def _describe(visit: Visit) -> str:
    return f"{visit.path} {visit.body[:2000].decode(errors='replace')}"


async def _ask(visit: Visit, http: httpx.AsyncClient, answer: Answer) -> None:
    headers, content = {}, None
    if visit.body:
        headers = {**JSON_HEADERS, "Content-Length": str(len(visit.body))}
        content = visit.body if visit.sent_share == 1 else _begun(visit)
    method = "POST" if visit.body else "GET"
    request = http.build_request(method, visit.path, content=content, headers=headers)
    async with aclosing(await http.send(request, stream=True)) as response:
        answer.status = response.status_code
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            await _read_stream(visit, response, answer)
            return
        body = await response.aread()
        answer.has_ended = True
        with suppress(ValueError):
            answer.add(json.loads(body))


async def _read_stream(visit: Visit, response: httpx.Response, answer: Answer) -> None:
    async for data in read_events(response):
        if data == b"[DONE]":
            answer.has_ended = visit.path not in (RESPONSES, MESSAGES)
        else:
            answer.add(json.loads(data))


async def _begun(visit: Visit) -> AsyncIterator[bytes]:
    """Yield a part of the body; the rest never comes."""
    yield visit.body[: int(visit.sent_share * len(visit.body))]
    await asyncio.Event().wait()
