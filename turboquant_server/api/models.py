"""The names under which models are served, and POST /v1/models/load and /v1/models/unload."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from pydantic import ConfigDict

from turboquant_server.api.errors import ApiError
from turboquant_server.api.request_model import NonEmptyText, RequestModel
from turboquant_server.api.response_models import ModelCard, ModelList

if TYPE_CHECKING:
    from turboquant_server.model_life import Models

MAX_QUOTED_LENGTH = 200


class LifeRequest(RequestModel):
    """The body of POST /v1/models/load and /v1/models/unload."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "small"}]})

    model: NonEmptyText


def list_models(models: Models) -> ModelList:
    """Return every name of every model."""
    return ModelList(
        data=[describe_model(models, name) for model in models for name in model.manager.model_names]
    )


def describe_model(models: Models, name: str) -> ModelCard:
    """Return what clients need to know about the model of this name.

    Raises:
        ApiError: No model has this name (404).
    """
    model = models.find(name)
    manager, state = model.manager, models.state(model)
    return ModelCard(
        id=name,
        created=manager.created,
        max_model_len=getattr(manager, "max_model_len", manager.config.max_model_len),
        state=state,
        error=model.failure[0] if model.failure is not None and state == "failed" else None,
        display_name=name,
        created_at=datetime.fromtimestamp(manager.created, timezone.utc),
    )


async def load_model(models: Models, body: LifeRequest) -> ModelCard:
    """Load a model, and return what it is then.

    Raises:
        ApiError: There is none of this name (404), or it cannot be loaded (503).
    """
    await models.load(models.find(body.model))
    return describe_model(models, body.model)


async def unload_model(models: Models, body: LifeRequest) -> ModelCard:
    """Unload a model once the requests that it has are answered, and return what it is then.

    Raises:
        ApiError: There is none of this name (404).
    """
    await models.unload(models.find(body.model))
    return describe_model(models, body.model)


def model_not_found(name: str, names: Iterable[str]) -> ApiError:
    """Return the error for a request that names a model that is not there (404)."""
    served = ", ".join(f"'{served_name}'" for served_name in names)
    return ApiError(
        404,
        f"The model '{name[:MAX_QUOTED_LENGTH]}' does not exist. This server has {served}.",
        param="model",
        code="model_not_found",
    )
