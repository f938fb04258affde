"""CompletionRequest: the body of POST /v1/completions, with OpenAI's names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from turboquant_server.api.generation_request import GenerationRequest
from turboquant_server.api.request_model import Text, only
from turboquant_server.engine.sampling_params import MAX_LOGPROBS

MAX_PROMPTS = 2048

TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )

    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    add_special_tokens: Annotated[Any, only(True)] = None
    best_of: Annotated[Any, only(1)] = None
    prompt_embeds: Annotated[Any, only()] = None
    suffix: Annotated[Any, only("")] = None

    @field_validator("echo")
    @classmethod
    def _check_echo(cls, echo: bool | None, info: ValidationInfo) -> bool | None:
        if echo and info.data.get("logprobs") is not None:
            raise PydanticCustomError(
                "unsupported_parameter", "This server does not support it together with logprobs"
            )
        return echo

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report beside each token; None reports no log-probability."""
        return self.logprobs
