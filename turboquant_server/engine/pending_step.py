"""PendingStep: a step that the device may still be computing. Knows no text and no scheduler."""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from turboquant_server.engine.request import RequestFailedError

if TYPE_CHECKING:
    from turboquant_server.engine.scheduler import ScheduledRequest

# A request's places among a step's tokens: its own and one for each of its forks, none while its prompt is
# incomplete; or why it failed.
StepResult: TypeAlias = Sequence[int] | RequestFailedError


class PendingStep:
    """Bring a step's tokens to the host.

    Args:
        results: For each request of the step.
        tokens: int64 ``[num_tokens]``, on their device, where they may not have been computed yet.
    """

    def __init__(self, results: list[tuple[ScheduledRequest, StepResult]], tokens: Tensor) -> None:
        self.results = results
        # To pinned memory, while the host goes on.
        self._tokens = tokens.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if tokens.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(tokens.device))

    @property
    def has_failures(self) -> bool:
        """Tell whether requests of the step failed."""
        return any(isinstance(result, RequestFailedError) for _, result in self.results)

    def token_ids(self) -> list[int]:
        """Wait for the step and return its tokens."""
        if self._copied is not None:
            self._copied.synchronize()
        return [int(token_id) for token_id in self._tokens.tolist()]
