"""GenerationRequest: the fields that chat and plain completions share, with OpenAI's and vLLM's names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from turboquant_server.api.request_model import NonEmptyText, RequestModel, Text, only
from turboquant_server.engine.sampling_params import MAX_LOGPROBS

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024
MAX_CHOICES = 128

Choices = Annotated[list[Text], Field(min_length=1, fail_fast=True)]

LogitBias = Annotated[
    dict[
        Annotated[str, Field(pattern="^[0-9]{1,9}$")],
        Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)],
    ],
    Field(max_length=MAX_LOGIT_BIASES),
]


class StreamOptions(RequestModel):
    """What a stream holds besides the text."""

    harmless_fields = frozenset({"include_obfuscation"})

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = None


class JsonSchema(RequestModel):
    """A schema that the answer must keep to, whatever ``strict`` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """OpenAI's way to say what the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(default=None, validate_default=True)
    # llama.cpp's place for it.
    schema_of_object: Annotated[
        Any, only(reason="A schema is given as 'response_format.json_schema.schema'")
    ] = Field(default=None, alias="schema")

    @field_validator("json_schema")
    @classmethod
    def _check_schema(cls, schema: object, info: ValidationInfo) -> object:
        if schema is None and info.data.get("type") == "json_schema":
            raise PydanticCustomError("missing", "Field required")
        return schema


class StructuredOutputs(RequestModel):
    """vLLM's way to say what the answer must look like."""

    harmless_fields = frozenset({"disable_any_whitespace", "disable_fallback"})

    json_value: Text | dict[str, Any] | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None

    disable_additional_properties: Annotated[Any, only(False)] = None
    structural_tag: Annotated[Any, only()] = None
    whitespace_pattern: Annotated[Any, only()] = None


class GenerationRequest(RequestModel):
    """The fields that chat and plain completions share."""

    harmless_fields = frozenset(
        {
            *("metadata", "moderation", "parallel_tool_calls", "prediction", "prompt_cache_key"),
            *("prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "safety_identifier"),
            *("service_tier", "store", "user", "verbosity"),
            # vLLM's
            *("guided_decoding_backend", "request_id", "spaces_between_special_tokens"),
        }
    )

    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: NonEmptyText | Annotated[list[NonEmptyText], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    # Wide enough for anyone, and no logit becomes infinite.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    logit_bias: LogitBias | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    # Requests with different ones share nothing, so that nobody learns from the time to the first token what
    # others have asked.
    cache_salt: NonEmptyText | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # Older names of what structured_outputs holds.
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    guided_json: Text | dict[str, Any] | None = None
    guided_regex: Text | None = None
    # Not OpenAI's, but what clients of other servers send to change what they get.
    allowed_token_ids: Annotated[Any, only()] = None
    bad_words: Annotated[Any, only([])] = None
    ebnf: Annotated[Any, only()] = None
    grammar: Annotated[Any, only("")] = None
    guided_whitespace_pattern: Annotated[Any, only()] = None
    json_schema: Annotated[Any, only()] = None
    kv_transfer_params: Annotated[Any, only()] = None
    length_penalty: Annotated[Any, only(1)] = None
    logits_processors: Annotated[Any, only([])] = None
    priority: Annotated[Any, only(0)] = None
    prompt_logprobs: Annotated[Any, only()] = None
    regex: Annotated[Any, only()] = None
    return_tokens_as_token_ids: Annotated[Any, only(False)] = None
    skip_special_tokens: Annotated[Any, only(True)] = None
    truncate_prompt_tokens: Annotated[Any, only()] = None
    use_beam_search: Annotated[Any, only(False)] = None

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(
        cls, options: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise PydanticCustomError("without_stream", "It may be given only together with stream=true")
        return options

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that counts the tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every other chunk counts them, too, so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report beside each token; None reports no log-probability."""
        raise NotImplementedError


class CompletionsRequest(GenerationRequest):
    """The fields of the two endpoints of completions, chat and plain, of what is told beside an answer."""

    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    # llama.cpp's
    timings_per_token: bool | None = None
    return_progress: bool | None = None

    @field_validator("prompt_logprobs")
    @classmethod
    def _check_prompt_logprobs(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count is not None and info.data.get("stream"):
            raise PydanticCustomError("with_stream", "It may not be given together with stream=true")
        return count

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same as `num_logprobs` of the prompt's tokens."""
        return self.prompt_logprobs
