"""Every refusal and failure as ``{"error": {"message", "type", "param", "code"}}``, OpenAI's error body.

Where the path is Anthropic's, the body is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from turboquant_server.api.messages_error import is_messages_path, to_messages_error
from turboquant_server.api.request_id import HEADER, current_request_id
from turboquant_server.engine.request import (
    EngineDeadError,
    GrammarFailedError,
    RequestFailedError,
    RequestTimeoutError,
)

RETRY_LATER = {"Retry-After": "5"}  # seconds
STATUS_CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it
JSON_CONTENT_TYPE = "application/json"
ERROR_TYPES = {
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ErrorDetail(BaseModel):
    """Say what went wrong, to a person (message) and to a program (the rest)."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every response whose status is 400 or more, and the data of an error event."""

    error: ErrorDetail


class ApiError(Exception):
    """End a request with an error body.

    Args:
        status_code: The HTTP status.
        message: Sentences for the person who made the request.
        param: The field that is at fault, such as ``messages[0].content``.
        code: OpenAI's word for this kind of error, where it has one.
        headers: Headers of the response.
        lengths: If a prompt is too long, its tokens and the most that it may have with its answer.
    """

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        lengths: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers
        self.lengths = lengths

    @property
    def body(self) -> ErrorResponse:
        """The error body."""
        kind = ERROR_TYPES.get(self.status_code, "invalid_request_error")
        # A lone surrogate, which JSON can carry and UTF-8 cannot, may come back in a quotation.
        message, param = (
            text and text.encode(errors="replace").decode() for text in (self.message, self.param)
        )
        return ErrorResponse(error=ErrorDetail(message=message or "", type=kind, param=param, code=self.code))

    def response(self, path: str) -> Response:
        """Return the error as an HTTP response, with the body that the API of this path has."""
        body: BaseModel = to_messages_error(self) if is_messages_path(path) else self.body
        return JSONResponse(body.model_dump(), self.status_code, headers=self.headers)


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Let the errors that come up here call these fields something else."""
    try:
        yield
    except ApiError as error:
        for name, new_name in names.items():
            error.message = error.message.replace(f"'{name}'", f"'{new_name}'")
        error.param = error.param and names.get(error.param, error.param)
        raise


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request that must be changed before it is sent again (400)."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """Return the error for a request that may be sent again, unchanged, a little later (503)."""
    return ApiError(503, message, code=code, headers={**RETRY_LATER, **(headers or {})})


def shutting_down() -> ApiError:
    """Return the error for a request that comes, or waits for its model, while the server ends (503)."""
    return unavailable("The server is shutting down.", "shutting_down", {"Connection": "close"})


def queue_full() -> ApiError:
    """Return the error for a request that finds too many others waiting (429)."""
    message = "The server is busy: too many requests are waiting. Please try again in a few seconds."
    return ApiError(429, message, code="rate_limit_exceeded", headers=RETRY_LATER)


def to_api_error(error: Exception) -> ApiError:
    """Return what a client may know of an error that came up while its answer was made."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDeadError):
        return unavailable(str(error), "engine_dead")
    if isinstance(error, RequestTimeoutError):
        # OpenAI's clients would send it again, to wait as long once more.
        return ApiError(504, str(error), code="request_timeout", headers={"x-should-retry": "false"})
    if isinstance(error, GrammarFailedError):
        return invalid_request(str(error), code="grammar_too_complex")
    if isinstance(error, RequestFailedError):
        return ApiError(500, str(error))
    return ApiError(500, "The server had an error while it worked on this request; its log has the details.")


def add_error_handlers(app: FastAPI) -> None:
    """Make every error that leaves ``app`` an OpenAI error body."""

    async def handle_error(request: Request, error: Exception) -> Response:
        response = to_api_error(error).response(request.url.path)
        # Nobody foresaw some of them; those pass no middleware, which would add it.
        response.headers[HEADER] = current_request_id.get()
        return response

    async def handle_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _from_validation_error(error, request).response(request.url.path)

    async def handle_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _from_http_exception(error, request).response(request.url.path)

    async def handle_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=STATUS_CLIENT_CLOSED_REQUEST)

    for kind in (ApiError, EngineDeadError, RequestFailedError, Exception):
        app.add_exception_handler(kind, handle_error)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(ClientDisconnect, handle_disconnect)


def _from_http_exception(error: HTTPException, request: Request) -> ApiError:
    messages = {
        400: f"The body of this request {_why_unreadable(error)}.",  # FastAPI's only other use of 400
        404: f"Unknown URL: {request.method} {request.url.path}",
        405: f"{request.method} is not allowed on {request.url.path}",
    }
    message = messages.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers)


def _why_unreadable(error: HTTPException) -> str:
    if isinstance(error.__cause__, UnicodeDecodeError):
        return "is not valid UTF-8"
    if isinstance(error.__cause__, RecursionError):
        return "is nested too deeply"
    return "cannot be read as JSON"  # one of its numbers has thousands of digits


def _from_validation_error(error: RequestValidationError, request: Request) -> ApiError:
    """Put FastAPI's and pydantic's findings in OpenAI's words; of several, the one that fits best."""
    content_type = request.headers.get("content-type", "")
    errors: Sequence[Any] = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return invalid_request(f"The body of this request is not valid JSON: {reason}.")
    if isinstance(error.body, bytes):
        return invalid_request(
            f"Unsupported content type: {content_type!r}. Send the body as JSON, with the header "
            f"'Content-Type: {JSON_CONTENT_TYPE}'.",
            code="unsupported_content_type",
        )
    if not isinstance(error.body, dict):
        return invalid_request("The body of this request must be a JSON object.")
    return max((_Finding(finding, error.body) for finding in errors), key=_Finding.rank).api_error


class _Finding:
    """One of pydantic's errors about a body.

    Args:
        finding: An item of ``ValidationError.errors()``.
        body: The JSON object that it is about.
    """

    CODES: Mapping[str, str] = {
        "missing": "missing_required_parameter",
        "unsupported_parameter": "unsupported_parameter",
    }
    # Where pydantic speaks of Python.
    MESSAGES: Mapping[str, str] = {
        "model_attributes_type": "Input should be an object",
        "model_type": "Input should be an object",
    }

    def __init__(self, finding: Mapping[str, Any], body: object) -> None:
        self.kind: str = finding["type"]
        self.message: str = self.MESSAGES.get(self.kind, finding["msg"])
        self.path: list[str | int] = []
        node = body
        # pydantic's location also names the branches of unions, which the body does not have.
        places = finding["loc"][1:]
        for depth, key in enumerate(places, 1):
            is_missing = self.kind == "missing" and depth == len(places)
            if isinstance(node, dict) and (key in node or is_missing):
                node = node.get(key)
            elif isinstance(node, list) and isinstance(key, int):
                node = node[key]
            else:
                continue
            self.path.append(key)

    def rank(self) -> tuple[bool, int, int]:
        """Order the errors of a union's branches: the branch that the value is closest to comes last."""
        index = self.path[-1] if self.path and isinstance(self.path[-1], int) else -1
        return not self.kind.endswith("_type"), len(self.path), index

    @property
    def api_error(self) -> ApiError:
        """The error, with a path such as ``messages[0].content``."""
        param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.path).lstrip(".")
        if self.kind == "missing":
            message = f"Missing required parameter: '{param}'."
        elif not param:  # a name of a field that is no text
            message = f"Invalid body: {self.message[:1].lower()}{self.message[1:]}."
        else:
            message = f"Invalid '{param}': {self.message[:1].lower()}{self.message[1:]}."
        kind = "invalid_type" if self.kind.endswith("_type") else "invalid_value"
        return invalid_request(message, param or None, self.CODES.get(self.kind, kind))
