"""The names under which the model is served."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

from turboquant_server.api.errors import ApiError
from turboquant_server.api.response_models import ModelCard, ModelList

if TYPE_CHECKING:
    from turboquant_server.model_manager import ModelManager

MAX_QUOTED_LENGTH = 200


def list_models(model_manager: ModelManager) -> ModelList:
    """Return every name of the loaded model."""
    return ModelList(data=[describe_model(model_manager, name) for name in model_manager.model_names])


def describe_model(model_manager: ModelManager, name: str) -> ModelCard:
    """Return what clients need to know about the model of this name.

    Raises:
        ApiError: No model has this name (404).
    """
    return ModelCard(
        id=resolve_model(model_manager, name),
        created=model_manager.created,
        max_model_len=model_manager.max_model_len,
        display_name=name,
        created_at=datetime.fromtimestamp(model_manager.created, timezone.utc),
    )


def resolve_model(model_manager: ModelManager, name: str | None) -> str:
    """Return the name that a response carries: the one asked for, or the first if none was.

    Raises:
        ApiError: No model has this name (404).
    """
    names: list[str] = model_manager.model_names
    if name is None:
        return names[0]
    if name not in names:
        served = ", ".join(f"'{served_name}'" for served_name in names)
        raise ApiError(
            404,
            f"The model '{name[:MAX_QUOTED_LENGTH]}' does not exist. This server has {served}.",
            param="model",
            code="model_not_found",
        )
    return name
