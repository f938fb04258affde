"""The HTTP application: which path does what. Everything below it is in api/."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from turboquant_server import __version__
from turboquant_server.api.body_limit import BodyLimitMiddleware
from turboquant_server.api.chat import create_chat_completion
from turboquant_server.api.chat_request import ChatCompletionRequest
from turboquant_server.api.completion_request import CompletionRequest
from turboquant_server.api.completions import create_completion
from turboquant_server.api.door import HEALTH, METRICS, Door, DoorMiddleware
from turboquant_server.api.errors import ApiError, ErrorResponse, add_error_handlers, unavailable
from turboquant_server.api.messages import count_tokens, create_message
from turboquant_server.api.messages_error import MESSAGES, MessagesErrorResponse
from turboquant_server.api.messages_models import Message, TokenCount
from turboquant_server.api.messages_request import CountTokensRequest, MessagesRequest
from turboquant_server.api.model_use import (
    CHUNKS,
    MESSAGE_EVENTS,
    RESPONSE_EVENTS,
    answer_with_model,
    check_engine,
    with_model,
)
from turboquant_server.api.models import LifeRequest, describe_model, list_models, load_model, unload_model
from turboquant_server.api.page import CHAT_PAGE, DOCS_PAGE, add_page
from turboquant_server.api.request_id import HEADER
from turboquant_server.api.response_models import ChatCompletion, Completion, ModelCard, ModelList
from turboquant_server.api.responses import (
    count_input_tokens,
    create_response,
    refuse_compaction,
    refuse_stored,
)
from turboquant_server.api.responses_error import RESPONSES
from turboquant_server.api.responses_models import InputTokenCount, ModelResponse
from turboquant_server.api.responses_request import ResponsesRequest
from turboquant_server.api.streaming import finish_streams_on_shutdown
from turboquant_server.api.tokens import (
    Detokenized,
    DetokenizeRequest,
    TokenizeRequest,
    Tokens,
    detokenize,
    tokenize,
)
from turboquant_server.metrics_text import render_metrics
from turboquant_server.model_life import Models

if TYPE_CHECKING:
    from turboquant_server.model_manager import ModelManager

MAX_BODY_BYTES = 64 * 2**20
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in ("4XX", "5XX")
}
MESSAGES_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": MessagesErrorResponse} for status in ERROR_RESPONSES
}
STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def build_app(*model_managers: ModelManager) -> FastAPI:
    """Return the application that serves models; its ``state.door`` lets requests in to its ``state.models``.

    Args:
        model_managers: Of one model or several, the first of which is for requests that name none. Those that
            are loaded at the start may still be loading; until they are, all paths of the API answer 503.
    """
    config = model_managers[0].config
    app = FastAPI(title="TurboQuant server", version=__version__, docs_url=None, redoc_url=None)
    app.state.door = Door(config)
    app.state.models = Models(model_managers)
    # The last one is the first to see a request.
    app.add_middleware(BodyLimitMiddleware, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(DoorMiddleware, door=app.state.door)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[HEADER, "Retry-After"],
        )
    add_error_handlers(app)
    finish_streams_on_shutdown()
    _add_api(app, app.state.models, app.state.door)
    _add_status(app, app.state.models)
    add_page(app, DOCS_PAGE, "docs.html")
    if config.ui:
        add_page(app, CHAT_PAGE, "index.html")
    return app


def check_health(model_manager: ModelManager) -> None:
    """Check that the model is there and the engine works.

    Raises:
        ApiError: It is not (503).
    """
    if not model_manager.is_ready:
        raise _still_loading(model_manager)
    check_engine(model_manager)
    seconds = model_manager.config.step_timeout
    if model_manager.engine.seconds_in_step > seconds:
        message = f"The engine has been in one step for more than {seconds} s."
        raise unavailable(message, "engine_stalled")


def _still_loading(model_manager: ModelManager) -> ApiError:
    seconds = max(0, int(time.time()) - model_manager.created)
    message = f"The model is still loading, for {seconds} s so far; try again in a few seconds."
    return unavailable(message, "model_loading")


def _add_api(app: FastAPI, served: Models, door: Door) -> None:
    """Add what needs a model."""

    async def check_started() -> None:
        if not served.has_started:
            raise _still_loading(served.managers[0])

    async def check_admin(http_request: Request) -> None:
        door.check_admin(http_request.scope["headers"])

    router = APIRouter(dependencies=[Depends(check_started)], responses=ERROR_RESPONSES)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAM_RESPONSES)
    async def chat_completions(
        body: ChatCompletionRequest, http_request: Request
    ) -> ChatCompletion | Response:
        return await answer_with_model(served, body, http_request, create_chat_completion, CHUNKS)

    @router.post("/v1/completions", response_model=Completion, responses=STREAM_RESPONSES)
    async def completions(body: CompletionRequest, http_request: Request) -> Completion | Response:
        return await answer_with_model(served, body, http_request, create_completion, CHUNKS)

    @router.post(MESSAGES, response_model=Message, responses=MESSAGES_RESPONSES | STREAM_RESPONSES)
    async def messages(body: MessagesRequest, http_request: Request) -> Message | Response:
        return await answer_with_model(served, body, http_request, create_message, MESSAGE_EVENTS)

    @router.post(f"{MESSAGES}/count_tokens", responses=MESSAGES_RESPONSES)
    async def message_tokens(body: CountTokensRequest, http_request: Request) -> TokenCount:
        return await with_model(served, body, http_request, count_tokens)

    @router.post(RESPONSES, response_model=ModelResponse, responses=STREAM_RESPONSES)
    async def responses(body: ResponsesRequest, http_request: Request) -> ModelResponse | Response:
        return await answer_with_model(served, body, http_request, create_response, RESPONSE_EVENTS)

    @router.post(f"{RESPONSES}/input_tokens")
    async def input_tokens(body: ResponsesRequest, http_request: Request) -> InputTokenCount:
        return await with_model(served, body, http_request, count_input_tokens)

    # Not in the document, because all that they do is to say why not.
    @router.post(f"{RESPONSES}/compact", include_in_schema=False)
    async def compact() -> None:
        refuse_compaction()

    @router.api_route(RESPONSES + "/{response_id}", methods=["GET", "DELETE"], include_in_schema=False)
    @router.post(RESPONSES + "/{response_id}/cancel", include_in_schema=False)
    async def stored_response(response_id: str) -> None:
        if response_id == "input_tokens":  # a path of its own, for POST
            raise HTTPException(405, headers={"Allow": "POST"})
        refuse_stored(response_id)

    @router.get("/v1/models")
    async def models() -> ModelList:
        return list_models(served)

    @router.post("/v1/models/load", dependencies=[Depends(check_admin)])
    async def load(body: LifeRequest) -> ModelCard:
        return await load_model(served, body)

    @router.post("/v1/models/unload", dependencies=[Depends(check_admin)])
    async def unload(body: LifeRequest) -> ModelCard:
        return await unload_model(served, body)

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        return describe_model(served, name)

    @router.post("/tokenize")
    async def tokens(body: TokenizeRequest, http_request: Request) -> Tokens:
        return await with_model(served, body, http_request, tokenize)

    @router.post("/detokenize")
    async def text(body: DetokenizeRequest, http_request: Request) -> Detokenized:
        return await with_model(served, body, http_request, detokenize)

    app.include_router(router)


def _add_status(app: FastAPI, models: Models) -> None:
    """Add what tells of the server, from its start on."""
    config = models.managers[0].config

    @app.get(HEALTH, responses=ERROR_RESPONSES)
    async def health() -> dict[str, str]:
        if not models.has_started:
            raise _still_loading(models.managers[0])
        is_loaded = False
        for manager in models.managers:
            with manager.leaving:
                if manager.is_ready:
                    check_health(manager)
                    is_loaded = True
        is_loading = any(models.state(model) == "loading" for model in models)
        return {"status": "ok" if is_loaded else "loading" if is_loading else "unloaded"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get(METRICS, response_class=PlainTextResponse)
    def metrics() -> Response:  # takes milliseconds, so not on the event loop
        families = [one for m in models.managers for one in m.metrics.collect(m.engine_state())]
        text = render_metrics(families, with_aliases=config.vllm_metrics)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})
