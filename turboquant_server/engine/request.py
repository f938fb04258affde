"""One unit of the engine's work: what was asked, how far it has come, and what each step hands out."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Cache

    from turboquant_server.engine.detokenizer import Detokenizer
    from turboquant_server.engine.sampling_params import SamplingParams


class RequestStatus(Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(str, Enum):
    """Why a request ended; ``STOP`` and ``LENGTH`` are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Request:
    """Follow one request from the inbox to its last token. Only the engine thread changes it.

    Args:
        request_id: One that no earlier request had.
        prompt_token_ids: At least one token.
        sampling_params: What was asked of the sampler and of the stop conditions.
        detokenizer: Turns this request's tokens into text.

    Attributes:
        token_ids: The prompt's tokens, then the generated ones.
        num_computed_tokens: How many of ``token_ids`` lie in the cache.
        cache: The request's compressed KV cache while it runs, else None.
        seed: What the sampler draws from; random where the request names none.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        detokenizer: Detokenizer,
    ) -> None:
        self.request_id = request_id
        self.sampling_params = sampling_params
        self.detokenizer = detokenizer
        self.seed = secrets.randbits(63) if sampling_params.seed is None else sampling_params.seed
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed_tokens = 0
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.cache: Cache | None = None

    @property
    def num_tokens(self) -> int:
        """Count the tokens of prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Count the generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True)
class RequestOutput:
    """What one engine step adds to one request.

    Attributes:
        request_id: The request that this belongs to.
        text: The new text only; whole characters, never any part of a stop string that matched.
        token_ids: The new tokens only.
        num_prompt_tokens: Tokens of the prompt.
        num_output_tokens: Tokens generated so far, these included.
        finish_reason: Why the request ended, on its last output; None before.
    """

    request_id: str
    text: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: FinishReason | None


class RequestFailedError(RuntimeError):
    """One request could not be finished; the engine and all other requests go on.

    Attributes:
        request_id: The request that failed.
    """

    def __init__(self, request_id: str, message: str) -> None:
        super().__init__(message)
        self.request_id = request_id
