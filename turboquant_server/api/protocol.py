"""The bodies of requests and responses, with OpenAI's names. Knows no tokenizer and no engine.

More than 300 lines, because it is one flat list.
"""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

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
from typing_extensions import Required, Self, TypedDict

from turboquant_server.engine.request import FinishReason
from turboquant_server.engine.sampling_params import MAX_LOGPROBS

logger = logging.getLogger(__name__)

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024
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
Choices = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
LogitBias = Annotated[
    dict[
        Annotated[str, Field(pattern="^[0-9]{1,9}$")],
        Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)],
    ],
    Field(max_length=MAX_LOGIT_BIASES),
]
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
    stop: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)]
        | None
    ) = None
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
    cache_salt: Annotated[Text, Field(min_length=1)] | None = None

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


class TextPart(RequestModel):
    """One part of a message's content; only text is supported."""

    type: Literal["text"]
    text: Text


def _check_arguments(text: str) -> str:
    """Refuse arguments that no template can write, which may be nothing at all."""
    try:
        is_object = isinstance(json.loads(text or "{}"), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise PydanticCustomError("no_object", "Input should be the text of a JSON object")
    return text


class CalledFunction(RequestModel):
    """What an earlier answer called."""

    name: Annotated[Text, Field(min_length=1)]
    arguments: Annotated[Text, AfterValidator(_check_arguments)]


class EarlierToolCall(RequestModel):
    """A call in an earlier answer."""

    harmless_fields = frozenset({"index"})

    id: Annotated[Text, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(RequestModel):
    """One message of a conversation."""

    harmless_fields = frozenset({"annotations", "refusal"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    # Before the content, which may be missing beside calls.
    tool_calls: Annotated[list[EarlierToolCall], Field(fail_fast=True)] | None = None
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = Field(
        None, validate_default=True
    )
    name: Text | None = None
    tool_call_id: Text | None = Field(None, validate_default=True)
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    function_call: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None

    @field_validator("tool_calls")
    @classmethod
    def _check_calls(cls, calls: object, info: ValidationInfo) -> object:
        if calls and info.data.get("role") != "assistant":
            raise PydanticCustomError("not_assistant", "Only a message of the role assistant has calls")
        return calls

    @field_validator("content")
    @classmethod
    def _check_content(cls, content: object, info: ValidationInfo) -> object:
        # Where calls are given and wrong, they have an error of their own.
        if content is None and not info.data.get("tool_calls", True):
            raise PydanticCustomError("missing", "Field required")
        return content

    @field_validator("tool_call_id")
    @classmethod
    def _check_call_id(cls, call_id: object, info: ValidationInfo) -> object:
        if call_id is None and info.data.get("role") == "tool":
            raise PydanticCustomError("missing", "Field required")
        return call_id


class FunctionDefinition(RequestModel):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    # Taken as a wish: nothing makes the model keep to the schema.
    strict: bool | None = None


class Tool(RequestModel):
    """Something that the model may call; only functions are supported."""

    type: Literal["function"]
    function: FunctionDefinition


def _check_tool_choice(choice: object) -> object:
    if choice == "required" or isinstance(choice, dict):
        raise PydanticCustomError(
            "unsupported_parameter",
            "This server cannot make the model call a tool; give auto, or none for an answer without calls",
        )
    if choice not in (None, "none", "auto"):
        raise PydanticCustomError("invalid_value", "Input should be none or auto")
    return choice


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Annotated[Any, AfterValidator(_check_tool_choice)] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    add_special_tokens: Annotated[Any, only(False)] = None
    audio: Annotated[Any, only()] = None
    chat_template: Annotated[Any, only()] = None
    documents: Annotated[Any, only([])] = None
    echo: Annotated[Any, only(False)] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    include_reasoning: Annotated[Any, only(True)] = None
    mm_processor_kwargs: Annotated[Any, only({})] = None
    modalities: Annotated[Any, only(["text"])] = None
    thinking_token_budget: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count and not info.data.get("logprobs"):
            raise PydanticCustomError("without_logprobs", "It may be given only together with logprobs=true")
        return count

    @field_validator("continue_final_message")
    @classmethod
    def _check_continue(cls, is_continued: bool | None, info: ValidationInfo) -> bool | None:
        if is_continued and info.data.get("add_generation_prompt"):
            raise PydanticCustomError(
                "contradiction", "It may not be given together with add_generation_prompt=true"
            )
        return is_continued

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report beside each token; None reports no log-probability."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools as they were given; None if the model may call none."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_unset=True, exclude_none=True) for tool in self.tools]

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The variables of the chat template."""
        effort: dict[str, Any] = {"reasoning_effort": self.reasoning_effort}
        if self.reasoning_effort is None:
            effort = {}
        elif self.reasoning_effort == "none":
            effort = {"enable_thinking": False}  # what Qwen's and others' templates call it
        return effort | (self.chat_template_kwargs or {})


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


class PromptTokensDetails(BaseModel):
    """How many of a prompt's tokens did not have to be computed."""

    cached_tokens: int


class CompletionUsage(BaseModel):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class FunctionCall(BaseModel):
    """What is called, with arguments as the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model wants to be made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


def _is_none(value: object) -> bool:
    return value is None


class ChatCompletionMessage(BaseModel):
    """What the model answered."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    # Two names for one text; clients look for either.
    reasoning: str | None = Field(None, exclude_if=_is_none)
    reasoning_content: str | None = Field(None, exclude_if=_is_none)
    tool_calls: list[ToolCall] | None = Field(None, exclude_if=_is_none)
    refusal: None = None


ChatFinishReason: TypeAlias = FinishReason | Literal["tool_calls"]


class TopLogprob(BaseModel):
    """A token that could have come, by the model's own logits, and how likely it was.

    Its bytes are a part of a character where they are no text; then its text is not exact.
    """

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """What is told of a chat answer's tokens, those included that end it."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """What is told of a plain answer's tokens, those included that end it; offsets are in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChatCompletionChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatCompletionMessage
    logprobs: ChoiceLogprobs | None = None
    token_ids: list[int] | None = Field(default=None, exclude_if=_is_none)
    finish_reason: ChatFinishReason | None


class ChatCompletion(BaseModel):
    """The response to a chat completion that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatCompletionChoice]
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=_is_none)
    usage: CompletionUsage


class FunctionCallDelta(TypedDict, total=False):
    """What a chunk adds to a call's function."""

    name: str
    arguments: str


class ToolCallDelta(TypedDict, total=False):
    """What a chunk adds to a call."""

    index: Required[int]
    id: str
    type: Literal["function"]
    function: FunctionCallDelta


class ChoiceDelta(TypedDict, total=False):
    """What a chunk adds to the message."""

    role: Literal["assistant"]
    content: str
    reasoning: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class ChunkChoice(BaseModel):
    """What a chunk adds to one answer."""

    index: int
    delta: ChoiceDelta
    logprobs: ChoiceLogprobs | None = None
    token_ids: list[int] | None = Field(default=None, exclude_if=_is_none)
    finish_reason: ChatFinishReason | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=_is_none)
    usage: CompletionUsage | None = None


class CompletionChoice(BaseModel):
    """One answer, or what an event adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | None = Field(default=None, exclude_if=_is_none)
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=_is_none)
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
