"""The bodies of requests and responses, with OpenAI's names. Knows no tokenizer and no engine.

More than 300 lines, because it is one flat list.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Self, TypedDict

from turboquant_server.engine.request import FinishReason

logger = logging.getLogger(__name__)

MAX_STOP_STRINGS = 16
MAX_PROMPTS = 2048
MAX_CHOICES = 128
# Bounds what requests can make the server log and remember.
MAX_LOGGED_FIELDS = 100
MAX_LOGGED_LENGTH = 100

_logged_fields: set[str] = set()


def only(*values: object) -> AfterValidator:
    """Refuse a field that this server does not support, unless it asks for nothing.

    Args:
        values: What may be given, besides null, because it means the same as leaving the field out.
    """

    def check(value: object) -> object:
        # True == 1, but n=true is a mistake.
        is_allowed = any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in values)
        if value is not None and not is_allowed:
            raise PydanticCustomError("unsupported_parameter", "This server does not support this parameter")
        return value

    return AfterValidator(check)


def _check_unicode(text: str) -> str:
    """Refuse a lone surrogate, which JSON can carry and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("not_unicode", "Input should be valid Unicode text") from error
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class RequestModel(BaseModel):
    """Take JSON types as they are; ignore unknown fields and log each name once."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    # Fields that are OpenAI's and change nothing here.
    harmless_fields: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _log_unknown_fields(self) -> Self:
        for field in self.model_extra or ():
            if len(_logged_fields) == MAX_LOGGED_FIELDS:
                break
            name = field[:MAX_LOGGED_LENGTH]
            if name not in self.harmless_fields and name not in _logged_fields:
                _logged_fields.add(name)
                logger.warning("ignoring the unknown field %r of a %s", name, type(self).__name__)
        return self


class StreamOptions(RequestModel):
    """What a stream holds besides the text."""

    harmless_fields = frozenset({"include_obfuscation"})

    include_usage: bool | None = False

    continuous_usage_stats: Annotated[Any, only(False)] = None


class GenerationRequest(RequestModel):
    """The fields that chat and plain completions share."""

    harmless_fields = frozenset(
        {
            *("metadata", "moderation", "parallel_tool_calls", "prediction", "prompt_cache_key"),
            *("prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "safety_identifier"),
            *("service_tier", "store", "user", "verbosity"),
            # vLLM's
            *("request_id", "spaces_between_special_tokens"),
        }
    )

    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)]
        | None
    ) = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    # Requests with different ones share nothing, so that nobody learns from the time to the first token what
    # others have asked.
    cache_salt: Annotated[Text, Field(min_length=1)] | None = None

    frequency_penalty: Annotated[Any, only(0)] = None
    presence_penalty: Annotated[Any, only(0)] = None
    logit_bias: Annotated[Any, only({})] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    # Not OpenAI's, but what clients of other servers send to change what they get.
    allowed_token_ids: Annotated[Any, only()] = None
    bad_words: Annotated[Any, only([])] = None
    ebnf: Annotated[Any, only()] = None
    grammar: Annotated[Any, only("")] = None
    guided_choice: Annotated[Any, only()] = None
    guided_grammar: Annotated[Any, only()] = None
    guided_json: Annotated[Any, only()] = None
    guided_regex: Annotated[Any, only()] = None
    include_stop_str_in_output: Annotated[Any, only(False)] = None
    json_schema: Annotated[Any, only()] = None
    kv_transfer_params: Annotated[Any, only()] = None
    length_penalty: Annotated[Any, only(1)] = None
    logits_processors: Annotated[Any, only([])] = None
    min_p: Annotated[Any, only(0)] = None
    min_tokens: Annotated[Any, only(0)] = None
    priority: Annotated[Any, only(0)] = None
    prompt_logprobs: Annotated[Any, only()] = None
    regex: Annotated[Any, only()] = None
    repetition_penalty: Annotated[Any, only(1)] = None
    return_token_ids: Annotated[Any, only(False)] = None
    return_tokens_as_token_ids: Annotated[Any, only(False)] = None
    skip_special_tokens: Annotated[Any, only(True)] = None
    stop_token_ids: Annotated[Any, only([])] = None
    structured_outputs: Annotated[Any, only()] = None
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


class TextPart(RequestModel):
    """One part of a message's content; only text is supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(RequestModel):
    """One message of a conversation."""

    harmless_fields = frozenset({"annotations", "refusal"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    add_generation_prompt: Annotated[Any, only(True)] = None
    add_special_tokens: Annotated[Any, only(False)] = None
    audio: Annotated[Any, only()] = None
    chat_template: Annotated[Any, only()] = None
    chat_template_kwargs: Annotated[Any, only({})] = None
    continue_final_message: Annotated[Any, only(False)] = None
    documents: Annotated[Any, only([])] = None
    echo: Annotated[Any, only(False)] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    include_reasoning: Annotated[Any, only(True)] = None
    logprobs: Annotated[Any, only(False)] = None
    top_logprobs: Annotated[Any, only(0)] = None
    mm_processor_kwargs: Annotated[Any, only({})] = None
    modalities: Annotated[Any, only(["text"])] = None
    thinking_token_budget: Annotated[Any, only()] = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none", "auto")] = None
    web_search_options: Annotated[Any, only()] = None


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )

    add_special_tokens: Annotated[Any, only(True)] = None
    best_of: Annotated[Any, only(1)] = None
    echo: Annotated[Any, only(False)] = None
    logprobs: Annotated[Any, only()] = None
    prompt_embeds: Annotated[Any, only()] = None
    suffix: Annotated[Any, only("")] = None


class PromptTokensDetails(BaseModel):
    """How many of a prompt's tokens did not have to be computed."""

    cached_tokens: int


class CompletionUsage(BaseModel):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatCompletionMessage(BaseModel):
    """What the model answered."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatCompletionChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatCompletionMessage
    logprobs: None = None
    finish_reason: FinishReason | None


class ChatCompletion(BaseModel):
    """The response to a chat completion that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatCompletionChoice]
    usage: CompletionUsage


class ChoiceDelta(TypedDict, total=False):
    """What a chunk adds to the message."""

    role: Literal["assistant"]
    content: str


class ChunkChoice(BaseModel):
    """What a chunk adds to one answer."""

    index: int
    delta: ChoiceDelta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = None


class CompletionChoice(BaseModel):
    """One answer, or what an event adds to it."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The response to a completion, or one event of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


class ModelCard(BaseModel):
    """One name under which the model is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "turboquant-server"
    max_model_len: int


class ModelList(BaseModel):
    """All names under which the model is served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
