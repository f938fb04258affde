"""CompletionRequest: the body of POST /v1/completions, with OpenAI's names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from turboquant_server.api.generation_request import CompletionsRequest
from turboquant_server.api.request_model import Text, only
from turboquant_server.engine.sampling_params import MAX_LOGPROBS

MAX_PROMPTS = 2048

TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class CompletionRequest(CompletionsRequest):
    """The body of POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "The harbour is", "max_tokens": 32}]}
    )

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )

    # None beside echo: only the prompt comes back.
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    add_special_tokens: Annotated[Any, only(True)] = None
    best_of: Annotated[Any, only(1)] = None
    prompt_embeds: Annotated[Any, only()] = None
    suffix: Annotated[Any, only("")] = None

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report beside each token; None reports no log-probability."""
        return self.logprobs

    @property
    def echoes_logprobs(self) -> bool:
        """Whether log-probabilities come for the prompt as for the answer, in one list."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same as `num_logprobs` of the prompt's tokens."""
        counts = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in counts if count is not None), default=None)
