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


def _find_key(headers: dict[bytes, bytes]) -> bytes | None:
    scheme, _, key = headers.get(b"authorization", b"").strip().partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" and key.strip() else headers.get(b"x-api-key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
