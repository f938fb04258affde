"""The HTTP application: which path does what. Everything below it is in api/."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response

from turboquant_server import __version__
from turboquant_server.api.body_limit import BodyLimitMiddleware
from turboquant_server.api.chat import create_chat_completion
from turboquant_server.api.completions import create_completion
from turboquant_server.api.errors import ErrorResponse, add_error_handlers, unavailable
from turboquant_server.api.models import describe_model, list_models
from turboquant_server.api.prompts import PromptTokenizer
from turboquant_server.api.protocol import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
)
from turboquant_server.api.streaming import finish_streams_on_shutdown

if TYPE_CHECKING:
    from turboquant_server.model_manager import ModelManager

MAX_BODY_BYTES = 64 * 2**20
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in ("4XX", "5XX")
}


def build_app(model_manager: ModelManager) -> FastAPI:
    """Return the application that serves one model.

    Args:
        model_manager: May still be loading; until it is ready, all paths of the API answer 503.
    """

    async def check_ready() -> None:
        if not model_manager.is_ready:
            raise unavailable("The model is still loading; try again in a few seconds.", "model_loading")
        if not model_manager.engine.is_alive:
            raise unavailable("The engine has ended; the server must be started again.", "engine_dead")

    prompt_tokenizer = PromptTokenizer(model_manager)
    app = FastAPI(title="TurboQuant server", version=__version__)
    app.add_middleware(BodyLimitMiddleware, max_bytes=MAX_BODY_BYTES)
    add_error_handlers(app)
    finish_streams_on_shutdown()
    router = APIRouter(dependencies=[Depends(check_ready)], responses=ERROR_RESPONSES)

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(
        body: ChatCompletionRequest, http_request: Request
    ) -> ChatCompletion | Response:
        return await create_chat_completion(model_manager, prompt_tokenizer, body, http_request)

    @router.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, http_request: Request) -> Completion | Response:
        return await create_completion(model_manager, prompt_tokenizer, body, http_request)

    @router.get("/v1/models")
    async def models() -> ModelList:
        return list_models(model_manager)

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        return describe_model(model_manager, name)

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    app.include_router(router)
    return app
