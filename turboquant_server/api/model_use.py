"""A request and its model: it waits while the model is loaded, as long as its client does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

from fastapi import Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse

from turboquant_server.api.errors import ApiError, unavailable
from turboquant_server.api.generation import while_client_waits
from turboquant_server.api.messages import PING
from turboquant_server.api.messages_error import to_messages_error
from turboquant_server.api.prompts import PromptTokenizer
from turboquant_server.api.responses_error import to_error_event
from turboquant_server.api.streaming import (
    DONE,
    KEEP_ALIVE,
    data_event,
    end_with_error,
    name_event,
    send_events,
)

if TYPE_CHECKING:
    from turboquant_server.model_life import Models
    from turboquant_server.model_manager import ModelManager
    from turboquant_server.served_model import ServedModel

Result = TypeVar("Result")


class _Body(Protocol):
    @property
    def model(self) -> str | None: ...


class _StreamBody(_Body, Protocol):
    @property
    def stream(self) -> bool | None: ...


Body = TypeVar("Body", bound=_Body)
StreamBody = TypeVar("StreamBody", bound=_StreamBody)


class StreamForm(NamedTuple):
    """How a stream looks before it begins: what keeps it open, and how an error ends it."""

    keep_alive: bytes
    write_error: Callable[[ApiError], Sequence[bytes]]


CHUNKS = StreamForm(KEEP_ALIVE, lambda error: [data_event(error.body.model_dump_json()), DONE])
MESSAGE_EVENTS = StreamForm(
    name_event(PING), lambda error: [name_event(to_messages_error(error).model_dump())]
)
RESPONSE_EVENTS = StreamForm(KEEP_ALIVE, lambda error: [name_event(to_error_event(error, num_events=0))])


def check_engine(model_manager: ModelManager) -> None:
    """Check that the engine of a loaded model takes requests.

    Raises:
        ApiError: It does not (503).
    """
    if not model_manager.engine.is_alive:
        raise unavailable("The engine has ended; the server must be started again.", "engine_dead")


async def with_model(
    models: Models,
    body: Body,
    http_request: Request,
    work: Callable[[ModelManager, PromptTokenizer, Body], Awaitable[Result]],
) -> Result:
    """Do something with the model that a request names, once it is loaded.

    Raises:
        ApiError: There is no such model (404), or it cannot be loaded (503).
        ClientDisconnect: The client has left while it was loaded.
    """
    model = models.find(body.model)
    entering = models.enter(model)
    await (entering if models.can_enter(model) else while_client_waits(entering, http_request))
    return await _do(models, model, body, work)


async def answer_with_model(
    models: Models,
    body: StreamBody,
    http_request: Request,
    create: Callable[[ModelManager, PromptTokenizer, StreamBody, Request], Awaitable[Result | Response]],
    form: StreamForm,
) -> Result | Response:
    """Answer a request with the model that it names, once it is loaded.

    If that takes longer than an interval of a stream's comments, the stream begins before it. From then on,
    what is wrong with the request can only be an event.
    """

    def work(
        manager: ModelManager, tokenizer: PromptTokenizer, body: StreamBody
    ) -> Awaitable[Result | Response]:
        return create(manager, tokenizer, body, http_request)

    model = models.find(body.model)
    if not body.stream or models.can_enter(model):
        return await with_model(models, body, http_request, work)

    async def make() -> Result | Response:
        await models.enter(model)
        return await _do(models, model, body, work)

    interval = model.manager.config.sse_keep_alive_interval
    making = asyncio.create_task(make())

    async def wait() -> None:
        await asyncio.wait([making], timeout=interval or None)

    try:
        await while_client_waits(wait(), http_request)
    except BaseException:
        making.cancel()
        raise
    return (
        making.result()
        if making.done()
        else send_events(_read_events(making, form), interval, form.keep_alive)
    )


async def _do(
    models: Models,
    model: ServedModel,
    body: Body,
    work: Callable[[ModelManager, PromptTokenizer, Body], Awaitable[Result]],
) -> Result:
    try:
        check_engine(model.manager)
        return await work(model.manager, model.prompt_tokenizer, body)
    finally:
        models.leave(model)


async def _read_events(making: asyncio.Task[Any], form: StreamForm) -> AsyncGenerator[bytes, None]:
    try:
        yield form.keep_alive
        response = await making
        assert isinstance(response, EventSourceResponse)
        events = cast(AsyncGenerator[bytes, None], response.body_iterator)
        async with aclosing(events):
            async for event in events:
                yield event
    except Exception as error:
        for event in form.write_error(error if isinstance(error, ApiError) else end_with_error(error)):
            yield event
    finally:
        making.cancel()
