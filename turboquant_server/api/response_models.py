"""The bodies of responses, with OpenAI's names. Knows no tokenizer and no engine."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, TypeAlias

from pydantic import BaseModel, Field
from typing_extensions import Required, TypedDict

from turboquant_server.engine.request import FinishReason


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
    # Null for the first of a prompt, which nothing comes before.
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def followed_by(self, others: CompletionLogprobs | None) -> CompletionLogprobs:
        """Return what is told of these tokens and others."""
        if others is None:
            return self
        return CompletionLogprobs(
            tokens=self.tokens + others.tokens,
            token_logprobs=self.token_logprobs + others.token_logprobs,
            top_logprobs=self.top_logprobs + others.top_logprobs,
            text_offset=self.text_offset + others.text_offset,
        )


class PromptLogprob(TypedDict):
    """How likely a token was at its place in a prompt, and how many were as likely or likelier."""

    logprob: float
    rank: int
    decoded_token: str


# Of each token of a prompt, by their ids: its own and the likeliest; null for the first. vLLM's shape.
PromptLogprobs: TypeAlias = list[dict[int, PromptLogprob] | None]


class Timings(BaseModel):
    """How many tokens were read, found and generated, and how fast; llama.cpp's names."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class PromptProgress(BaseModel):
    """How much of a prompt has been read, what was found included; llama.cpp's names."""

    total: int
    cache: int
    processed: int
    time_ms: int


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
    prompt_logprobs: PromptLogprobs | None = Field(default=None, exclude_if=_is_none)
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=_is_none)
    usage: CompletionUsage
    timings: Timings | None = Field(default=None, exclude_if=_is_none)


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
    timings: Timings | None = Field(default=None, exclude_if=_is_none)
    prompt_progress: PromptProgress | None = Field(default=None, exclude_if=_is_none)


class CompletionChoice(BaseModel):
    """One answer, or what an event adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | None = Field(default=None, exclude_if=_is_none)
    prompt_logprobs: PromptLogprobs | None = Field(default=None, exclude_if=_is_none)
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
    timings: Timings | None = Field(default=None, exclude_if=_is_none)
    prompt_progress: PromptProgress | None = Field(default=None, exclude_if=_is_none)


class ModelCard(BaseModel):
    """One name under which a model is served.

    Attributes:
        max_model_len: None before the model has been loaded, unless it was told.
        state: Whether it is in memory; a request loads one that is unloaded, and waits.
        error: Why loading it failed.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "turboquant-server"
    max_model_len: int | None
    state: Literal["loaded", "loading", "unloaded", "failed"]
    error: str | None = Field(default=None, exclude_if=_is_none)

    # Anthropic's
    type: Literal["model"] = "model"
    display_name: str
    created_at: datetime
    lifecycle: Literal["active"] = "active"


class ModelList(BaseModel):
    """All names under which the model is served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
