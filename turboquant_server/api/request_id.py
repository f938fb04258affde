"""The id of an HTTP request: the client's own, if it is a decent one, in the response and in the log."""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar

HEADER = "X-Request-Id"

current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")


def choose_request_id(wanted: str | None) -> str:
    """Return the id that a client has sent, if it has at most 128 characters, all visible; else a new one."""
    if wanted is not None and re.fullmatch(r"[!-~]{1,128}", wanted):
        return wanted
    return uuid.uuid4().hex


def add_request_id(record: logging.LogRecord) -> bool:
    """Give a line of the log the field ``request_id``: what the line is about, or nothing. Drops none."""
    request_id = current_request_id.get()
    record.request_id = f" [{request_id}]" if request_id else ""
    return True
