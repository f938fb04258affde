"""The keys that clients may send, compared in a time that tells nothing about them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from turboquant_server.api.errors import ApiError

# Claude Code would send the same key again, for minutes.
REFUSAL = {"WWW-Authenticate": "Bearer", "x-should-retry": "false"}


class ApiKeys:
    """Let in who sends a key, in ``Authorization: Bearer KEY`` as OpenAI's clients or in ``x-api-key``.

    Args:
        keys: Of which one is enough; if there are none, everybody is let in.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, headers: Sequence[tuple[bytes, bytes]]) -> ApiError | None:
        """Return why a request with these headers, as ASGI has them, is not let in (401)."""
        if not self._digests:
            return None
        key = _find_key(dict(headers))
        if key is None:
            message = "You didn't provide an API key. Send it in the header 'Authorization: Bearer KEY'."
            return ApiError(401, message, code="invalid_api_key", headers=REFUSAL)
        digest = _digest(key)
        # Digests are of one length, and all of them are looked at.
        if not any([hmac.compare_digest(digest, known) for known in self._digests]):
            return ApiError(401, "Incorrect API key provided.", code="invalid_api_key", headers=REFUSAL)
        return None


class AdminKeys(ApiKeys):
    """Let in who sends a key of those who run the server; if there are none, nobody is let in."""

    def check(self, headers: Sequence[tuple[bytes, bytes]]) -> ApiError | None:
        """Return why a request is not let in: it has no key (401), or one that is not enough (403)."""
        if not self._digests:
            message = "Models cannot be loaded or unloaded by request: this server has no --admin-key."
            return ApiError(403, message, code="no_admin_key")
        error = super().check(headers)
        if error is not None and _find_key(dict(headers)) is not None:
            return ApiError(403, "This needs an admin key, which your key is not.", code="no_admin_key")
        return error


def _find_key(headers: dict[bytes, bytes]) -> bytes | None:
    scheme, _, key = headers.get(b"authorization", b"").strip().partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" and key.strip() else headers.get(b"x-api-key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
