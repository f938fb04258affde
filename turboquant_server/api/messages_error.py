"""Errors with Anthropic's body, ``{"type": "error", "error": {"type", "message"}, "request_id"}``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from turboquant_server.api.request_id import current_request_id

if TYPE_CHECKING:
    from turboquant_server.api.errors import ApiError

MESSAGES = "/v1/messages"
TOO_LONG = "prompt is too long"
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class MessagesErrorDetail(BaseModel):
    """Say what went wrong."""

    type: str
    message: str


class MessagesErrorResponse(BaseModel):
    """The body of every response to a message whose status is 400 or more, and the data of an error event."""

    type: Literal["error"] = "error"
    error: MessagesErrorDetail
    request_id: str


def is_messages_path(path: str) -> bool:
    """Tell whether a path belongs to Anthropic's API."""
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")


def to_messages_error(error: ApiError) -> MessagesErrorResponse:
    """Return the body of an error."""
    message = error.body.error.message
    if error.lengths is not None:
        # By these words Claude Code knows that it must shorten the conversation, and by how much.
        num_tokens, most = error.lengths
        message = f"{TOO_LONG}: {num_tokens} tokens > {most} maximum, which leaves no room for an answer."
    elif error.code == "context_length_exceeded":  # told by its characters
        message = f"{TOO_LONG}: {message}"
    kind = ERROR_TYPES.get(error.status_code, "invalid_request_error")
    return MessagesErrorResponse(
        error=MessagesErrorDetail(type=kind, message=message), request_id=current_request_id.get()
    )
