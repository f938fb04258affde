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
    from turboquant_server.engine.request import Request
    from turboquant_server.engine.scheduler import ScheduledRequest

# A request's places among a step's tokens: its own and one for each of its forks, none while its prompt is
# incomplete; or why it failed.
StepResult: TypeAlias = Sequence[int] | RequestFailedError


class PendingStep:
    """Bring a step's tokens to the host.

    Args:
        results: For each request of the step.
        tokens: int64 ``[num_tokens]``, on their device, where they may not have been computed yet.
        logprobs: Rows of `gather_logprobs` for some of the tokens, there too.
        logprob_places: Which of the tokens these are of.
        prompt_logprobs: Rows for tokens of prompts, there too: whose prompt, and where the first is in it.
    """

    def __init__(
        self,
        results: list[tuple[ScheduledRequest, StepResult]],
        tokens: Tensor,
        logprobs: Tensor | None = None,
        logprob_places: Sequence[int] = (),
        prompt_logprobs: Sequence[tuple[Request, int, Tensor]] = (),
    ) -> None:
        self.results = results
        # To pinned memory, while the host goes on.
        self._tokens = tokens.to("cpu", non_blocking=True)
        self._logprobs = None if logprobs is None else logprobs.to("cpu", non_blocking=True)
        self._logprob_places = logprob_places
        self._prompt_logprobs = [
            (request, start, rows.to("cpu", non_blocking=True)) for request, start, rows in prompt_logprobs
        ]
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
        token_ids: list[int] = self._tokens.tolist()
        return token_ids

    def logprobs(self) -> dict[int, list[float]]:
        """Return the rows of `gather_logprobs`, by the places of their tokens, once those are known."""
        if self._logprobs is None:
            return {}
        return dict(zip(self._logprob_places, self._logprobs.tolist(), strict=True))

    def prompt_logprobs(self) -> list[tuple[Request, int, list[list[float]]]]:
        """Return those of prompts, once the tokens are known."""
        return [(request, start, rows.tolist()) for request, start, rows in self._prompt_logprobs]
