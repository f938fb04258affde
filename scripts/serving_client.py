"""Asks an OpenAI-compatible server for a streamed answer and notes when what arrived.

Knows the protocol as ours, vLLM, SGLang, llama.cpp and Ollama speak it, and not how many ask at once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx
from stream_transport import StreamTransport

ENDPOINTS = {"completions": "completions", "chat": "chat/completions"}
TEXT_FIELDS = ("text", "content", "reasoning_content", "reasoning")
ORIGIN_FIELDS = ("model", "system_fingerprint")
CONNECT_SECONDS = 30
LONGEST_MESSAGE = 300  # some servers answer an error with a web page


class ServerError(Exception):
    """Why a request got no answer, in one line."""


@dataclass
class Answer:
    """A streamed answer, in seconds of one clock.

    Attributes:
        asked_tokens: How many the answer was to have.
        sent: When the request was.
        text_times: When each chunk with text came. A chunk may hold several tokens.
        ended: When the last text or the notice of the end came, whichever is later: a last token without text
            comes with that notice.
        finish_reason: The server's; None while the answer has no end.
        usage: The server's; empty if it tells none.
        origin: What the server calls its model, and the build that answered, where it tells.
    """

    asked_tokens: int
    sent: float
    text_times: list[float] = field(default_factory=list)
    ended: float = 0.0
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def first_token_time(self) -> float:
        return self.text_times[0] if self.text_times else self.ended

    @property
    def prompt_tokens(self) -> int | None:
        return self.usage.get("prompt_tokens")

    @property
    def cached_tokens(self) -> int | None:
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens")

    @property
    def told_tokens(self) -> int | None:
        """How many tokens the answer has, by the server's count."""
        return self.usage.get("completion_tokens")

    @property
    def output_tokens(self) -> int:
        """By the server's count, else by that of the chunks."""
        return len(self.text_times) if self.told_tokens is None else self.told_tokens

    @property
    def is_short(self) -> bool:
        """Whether it has fewer tokens than asked; chunks, which may hold several, cannot tell."""
        if self.told_tokens is None:
            return self.finish_reason != "length"
        return self.told_tokens < self.asked_tokens

    def add(self, event: dict[str, Any], now: float) -> None:
        """Add what an event says.

        Raises:
            ServerError: It tells an error.
        """
        if event.get("error") or event.get("object") == "error":
            raise ServerError(f"error in the stream: {_message(event)}")
        self.usage = event.get("usage") or self.usage
        self.origin = self.origin or {name: event[name] for name in ORIGIN_FIELDS if event.get(name)}
        for choice in event.get("choices") or ():
            content = choice.get("delta") or choice
            if any(content.get(name) for name in TEXT_FIELDS):
                self.text_times.append(now)
                self.ended = now
            if choice.get("finish_reason"):
                self.finish_reason = choice["finish_reason"]
                self.ended = now


Ask = Callable[[str, int], Awaitable[Answer]]
"""Returns the answer to a prompt, of at most so many tokens."""


class ServerClient:
    """One server's URL, over connections that are kept open between requests.

    Each connection is an `httpx.AsyncClient` of its own, with a `StreamTransport`.

    Args:
        base_url: Up to and with ``/v1``.
        api_key: Sent as a bearer token, if any.

    Attributes:
        takes_ignore_eos: Whether requests say ``ignore_eos``; no longer once the server has refused it.
    """

    def __init__(self, base_url: str, api_key: str | None) -> None:
        self._base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._ssl_context = httpx.create_ssl_context()  # slow to make
        self._idle: list[httpx.AsyncClient] = []
        self._users: set[asyncio.Task[object]] = set()  # tasks that have one of the others
        self.takes_ignore_eos = True

    async def __aenter__(self) -> ServerClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        users = self._users - {asyncio.current_task()}  # after an error there may be some
        for user in users:
            user.cancel()
        await asyncio.gather(*users, return_exceptions=True)
        for http in self._idle:
            await http.aclose()

    @contextmanager
    def _connection(self) -> Iterator[httpx.AsyncClient]:
        http = self._idle.pop() if self._idle else self._open()
        user = asyncio.current_task()
        assert user is not None
        self._users.add(user)
        try:
            yield http
        finally:
            self._users.discard(user)
            self._idle.append(http)

    def _open(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # an answer may wait its turn for long
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=timeout,
            transport=StreamTransport(self._ssl_context),
            verify=self._ssl_context,  # for proxies, which are httpx's own
        )

    async def first_model(self) -> str:
        """Return the first of the server's models.

        Raises:
            ServerError: It does not tell one.
        """
        url = f"{self._base_url}/models"
        try:
            with self._connection() as http:
                response = await http.get(url)
            if response.status_code != httpx.codes.OK:
                raise ServerError(await _refusal(response))
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _no_answer(url, error) from error
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(f"{url} lists no models; is there a server of OpenAI's API?") from error

    async def version(self) -> str | None:
        """Return the server's version if it tells one as vLLM does, beside its ``/v1``."""
        with suppress(httpx.HTTPError, ValueError, LookupError, TypeError), self._connection() as http:
            response = await http.get(f"{self._base_url.removesuffix('/v1')}/version")
            return str(response.json()["version"])
        return None

    async def ask(self, endpoint: str, prompt: str, max_tokens: int, **fields: Any) -> Answer:
        """Return the answer to a prompt, complete.

        Args:
            endpoint: One of `ENDPOINTS`.
            prompt: The text, of the only message in a chat.
            max_tokens: What the answer is to have; servers that can do so ignore the model's own end.
            fields: More of the request's body.

        Raises:
            ServerError: There is none, or only a part.
        """
        try:
            return await self._ask(endpoint, prompt, max_tokens, fields)
        except ServerError as error:
            if not self.takes_ignore_eos or "ignore_eos" not in str(error):
                raise
        self.takes_ignore_eos = False
        return await self._ask(endpoint, prompt, max_tokens, fields)

    async def _ask(self, endpoint: str, prompt: str, max_tokens: int, fields: dict[str, Any]) -> Answer:
        url = f"{self._base_url}/{ENDPOINTS[endpoint]}"
        body = fields | {
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.takes_ignore_eos:
            body["ignore_eos"] = True
        if endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        try:
            with self._connection() as http:
                request = http.build_request("POST", url, json=body)
                answer = Answer(max_tokens, sent=time.perf_counter())
                async with aclosing(await http.send(request, stream=True)) as response:
                    if response.status_code != httpx.codes.OK:
                        raise ServerError(await _refusal(response))
                    # To the end, also after [DONE]: a connection with something unread is not used again.
                    async for data in read_events(response):
                        if data != b"[DONE]":
                            answer.add(json.loads(data), time.perf_counter())
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _no_answer(url, error) from error
        except (ValueError, AttributeError) as error:
            raise ServerError(f"{url} sends events that are not OpenAI's") from error
        if answer.finish_reason is None:
            raise ServerError("the stream ended before the answer did")
        return answer


async def read_events(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the data of each server-sent event.

    httpx's lines would also end at U+2028 and its like, which JSON holds as they are.
    """
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[len(b"data:") :].strip()


async def _refusal(response: httpx.Response) -> str:
    """Return what a response other than 200 says."""
    text = (await response.aread()).decode(errors="replace")
    with suppress(ValueError):
        text = _message(json.loads(text))
    hint = "; does the URL end in /v1?" if response.status_code == httpx.codes.NOT_FOUND else ""
    text = " ".join(text.split())[:LONGEST_MESSAGE] or response.reason_phrase
    return f"HTTP {response.status_code} from {response.url}: {text}{hint}"


def _message(body: Any) -> str:
    """Return the message in any of the forms that servers give it."""
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if body.get(key)), str(body))
    return str(body)


def _no_answer(url: str, error: Exception) -> ServerError:
    return ServerError(f"{url} does not answer: {str(error) or type(error).__name__}")
