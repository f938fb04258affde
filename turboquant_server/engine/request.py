"""One unit of the engine's work: what was asked, how far it has come, and what each step hands out."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turboquant_core import RequestCache
    from turboquant_server.engine.detokenizer import Detokenizer
    from turboquant_server.engine.grammar import Matcher
    from turboquant_server.engine.logprobs import TokenLogprobs
    from turboquant_server.engine.sampling_params import SamplingParams
    from turboquant_server.engine.served_predictions import ServedPredictions


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
    """Follow one choice of a request from the inbox to its last token. Only the engine thread changes it.

    Args:
        request_id: Of the request that this is a choice of.
        prompt_token_ids: At least one token.
        sampling_params: What was asked of the sampler and of the stop conditions.
        detokenizer: Turns this choice's tokens into text.
        seed: What the sampler draws from.
        choice_index: Which of the request's choices this is.
        cache_salt: Only requests with the same one share blocks.
        max_model_len: Most tokens of prompt and answer together.
        end_token_ids: Tokens that end the answer.
        matcher: Follows this choice through the grammar of the answer, if it has one.

    Attributes:
        token_ids: The prompt's tokens, then the generated ones. One that only the device knows yet is -1 less
            its place among the tokens of its step.
        max_num_tokens: With so many tokens the answer is complete, whatever they are.
        num_computed_tokens: How many of ``token_ids`` lie in the cache.
        num_cached_tokens: How many of the prompt were found there at the first admission; None before.
        cache: The request's compressed KV cache while it runs, else None.
        forks: The other choices, until this one's prompt is computed.
        arrival: Place in the order in which requests came.
        start_time: When the first step on it began, in seconds of ``time.monotonic``; None before.
        prompt_logprobs: How likely each token of the prompt was, as far as it is known; None for the first.
            None if that was not asked for, or has been reported. Of several choices the first has it.
        predictions: Where to keep how its tokens were predicted, if they are to be compared.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        detokenizer: Detokenizer,
        *,
        seed: int = 0,
        choice_index: int = 0,
        cache_salt: bytes = b"",
        max_model_len: int = sys.maxsize,
        end_token_ids: frozenset[int] = frozenset(),
        matcher: Matcher | None = None,
    ) -> None:
        self.request_id = request_id
        self.sampling_params = sampling_params
        self.detokenizer = detokenizer
        self.seed = seed
        self.choice_index = choice_index
        self.cache_salt = cache_salt
        self.end_token_ids = end_token_ids
        self.matcher = matcher
        self.forks: list[Request] = []
        self.arrival = 0
        self.start_time: float | None = None
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if sampling_params.prompt_logprobs is not None and choice_index == 0:
            self.prompt_logprobs = [None] * len(prompt_token_ids)
        self.max_num_tokens = min(len(prompt_token_ids) + sampling_params.max_tokens, max_model_len)
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.cache: RequestCache | None = None
        self.predictions: ServedPredictions | None = None

    @property
    def num_tokens(self) -> int:
        """Count the tokens of prompt and output."""
        return len(self.token_ids)

    @property
    def is_new(self) -> bool:
        """Tell whether no token of the answer has been chosen."""
        return self.num_tokens == self.num_prompt_tokens

    @property
    def scores_prompt(self) -> bool:
        """Tell whether log-probabilities are wanted of the tokens that are to be computed."""
        return self.prompt_logprobs is not None and self.is_new

    @property
    def looks_up_logprobs(self) -> bool:
        """Tell whether log-probabilities are wanted of the tokens that are generated."""
        return self.sampling_params.logprobs is not None or self.predictions is not None

    @property
    def is_decoding(self) -> bool:
        """Tell whether nothing but the last generated token is to be computed."""
        return self.num_prompt_tokens <= self.num_computed_tokens == self.num_tokens - 1

    @property
    def is_complete(self) -> bool:
        """Tell whether the last token has been chosen, though the host may not know it yet."""
        return self.num_tokens >= self.max_num_tokens

    @property
    def num_output_tokens(self) -> int:
        """Count the generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def banned_token_ids(self) -> Collection[int]:
        """Return the tokens that may not be the next, as they would end the answer too early."""
        return self.end_token_ids if self.num_output_tokens < self.sampling_params.min_tokens else ()


@dataclass(slots=True)  # and not frozen, as one is made for each token: that takes three times as long
class RequestOutput:
    """What one engine step adds to one request; no token, if it has read a part of the prompt.

    Attributes:
        request_id: The request that this belongs to.
        text: The new text only; whole characters, never any part of a stop string that matched.
        token_ids: The new tokens only.
        num_prompt_tokens: Tokens of the prompt.
        num_output_tokens: Tokens of this choice generated so far, these included.
        num_cached_tokens: Tokens of the prompt that were found in the cache.
        choice_index: Which of the request's choices this belongs to.
        finish_reason: Why the request ended, on its last output; None before.
        logprobs: Of the new tokens, if they were asked for.
        stop_string: The stop string that ended the request, if one did.
        prompt_logprobs: Of the prompt's tokens, None for the first; with the first token of the first choice,
            if they were asked for.
        num_computed_tokens: Tokens of the prompt that have been read or found, while it is read.
        start_time: When the first step on the request began, in seconds of ``time.monotonic``.
        time: When the step was taken in.
    """

    request_id: str
    text: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: FinishReason | None
    num_cached_tokens: int = 0
    choice_index: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_string: str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    num_computed_tokens: int = 0
    start_time: float = field(default=0.0, compare=False)
    time: float = field(default=0.0, compare=False)


class EngineDeadError(RuntimeError):
    """The engine has ended, by an error or by shutdown, and will answer no more requests."""


class RequestFailedError(RuntimeError):
    """One request could not be finished; the engine and all other requests go on.

    Attributes:
        request_id: The request that failed.
    """

    def __init__(self, request_id: str, message: str) -> None:
        super().__init__(message)
        self.request_id = request_id


class GrammarFailedError(RequestFailedError):
    """The answer cannot go on by the grammar that was asked for, which has become too complex."""


class RequestTimeoutError(RequestFailedError):
    """One request has taken longer than it may."""


def output_of(
    request: Request,
    *,
    num_output_tokens: int,
    text: str = "",
    token_ids: Sequence[int] = (),
    finish_reason: FinishReason | None = None,
    **fields: Any,
) -> RequestOutput:
    """Return an output of a request, as it is now."""
    return RequestOutput(
        request_id=request.request_id,
        text=text,
        token_ids=list(token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        finish_reason=finish_reason,
        num_cached_tokens=request.num_cached_tokens or 0,
        choice_index=request.choice_index,
        start_time=request.start_time or 0.0,
        time=time.monotonic(),
        **fields,
    )
