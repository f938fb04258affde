"""Errors of OpenAI's Responses API as the event that ends a stream whose response cannot tell them itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turboquant_server.api.errors import ApiError

RESPONSES = "/v1/responses"


def to_error_event(error: ApiError, num_events: int) -> dict[str, Any]:
    """Return the event that comes after so many."""
    detail = error.body.error.model_dump()
    # OpenAI documents the detail's fields beside the type, and sends them as `error`.
    return {**detail, "type": "error", "error": detail, "sequence_number": num_events}
