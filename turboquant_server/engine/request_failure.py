"""Why a request has failed, told to its client and to the log. Decides nothing."""

from __future__ import annotations

import logging

import torch

from turboquant_server.engine.grammar import GrammarError
from turboquant_server.engine.request import GrammarFailedError, RequestFailedError

logger = logging.getLogger(__name__)


def request_failure(request_id: str, error: Exception) -> RequestFailedError:
    """Log an error and return what the client is told.

    The error itself stays here: its traceback holds the activations.
    """
    if isinstance(error, GrammarError):  # the client's own
        logger.warning("request %s failed: %s", request_id, error)
        return GrammarFailedError(request_id, str(error))
    logger.error("request %s failed", request_id, exc_info=error)
    if isinstance(error, torch.OutOfMemoryError):
        message = "The device ran out of memory on this request."
    else:
        message = f"The model failed on this request ({type(error).__name__}); the log has the details."
    return RequestFailedError(request_id, message)
