"""What every request passes before the application sees it: its id, the end of the server, the key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turboquant_server.api.api_keys import AdminKeys, ApiKeys
from turboquant_server.api.errors import ApiError, shutting_down
from turboquant_server.api.page import CHAT_PAGE, DOCS_PAGE
from turboquant_server.api.request_id import HEADER, choose_request_id, current_request_id

if TYPE_CHECKING:
    from turboquant_server.door_config import DoorConfig

HEALTH = "/health"
METRICS = "/metrics"


class Door:
    """Know who may come in, and who is inside.

    Args:
        config: Holds the keys.

    Attributes:
        is_closing: The server is about to end and takes no more requests.
        num_inside: Requests whose response is not finished.
    """

    def __init__(self, config: DoorConfig) -> None:
        self.is_closing = False
        self.num_inside = 0
        self._keys = ApiKeys([*config.api_key, *config.admin_key] if config.api_key else ())
        self._admin_keys = AdminKeys(config.admin_key)
        self._public_paths = {HEALTH, DOCS_PAGE}
        if config.public_metrics:
            self._public_paths.add(METRICS)
        if config.ui:
            self._public_paths.add(CHAT_PAGE)

    def refuse(self, scope: Scope) -> ApiError | None:
        """Return why a request does not get in, if so."""
        path = scope["path"]
        error = None if path in self._public_paths else self._keys.check(scope["headers"])
        if error is None and self.is_closing and path != METRICS:
            return shutting_down()
        return error

    def check_admin(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Check that a request that is inside has an admin key.

        Raises:
            ApiError: It has none (401), or another key, or there is no admin key (403).
        """
        error = self._admin_keys.check(headers)
        if error is not None:
            raise error


class DoorMiddleware:
    """Let requests through a Door, and give each response its request's id.

    Args:
        app: The application behind the door.
        door: Shared with whoever ends the server.
    """

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI applications do."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = choose_request_id(Headers(scope=scope).get(HEADER))
        current_request_id.set(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        error = self._door.refuse(scope)
        if error is not None:
            await error.response(scope["path"])(scope, receive, send_with_id)
            return
        self._door.num_inside += 1
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._door.num_inside -= 1
