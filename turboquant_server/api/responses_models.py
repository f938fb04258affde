"""The body of a response to POST /v1/responses, with OpenAI's names. Knows no tokenizer and no engine."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

from turboquant_server.api.response_models import TokenLogprob
from turboquant_server.api.responses_tools import AllowedTools, ClientTool, NamedTool

ResponseStatus: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed"]
ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    """What a message says."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[object] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(BaseModel):
    """Text for the user."""

    id: str
    type: Literal["message"] = "message"
    status: ItemStatus = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningText(BaseModel):
    """What the model thought, as it wrote it."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(BaseModel):
    """Text in which the model thinks."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: ItemStatus = "in_progress"
    summary: list[object] = []
    content: list[ReasoningText]
    encrypted_content: None = None


class OutputFunctionCall(BaseModel):
    """A call that the model wants to be made, with arguments as the text of a JSON object."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus = "in_progress"
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str = ""


class OutputCustomToolCall(BaseModel):
    """A call, with plain text, that the model wants to be made."""

    id: str
    type: Literal["custom_tool_call"] = "custom_tool_call"
    status: ItemStatus = "in_progress"
    call_id: str
    name: str
    namespace: str | None = None
    input: str = ""


OutputItem: TypeAlias = OutputMessage | OutputReasoning | OutputFunctionCall | OutputCustomToolCall


class InputTokenCount(BaseModel):
    """How many tokens an input has."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class InputTokensDetails(BaseModel):
    """How many tokens of the input did not have to be computed."""

    cached_tokens: int
    cache_write_tokens: int = 0  # those that OpenAI charges for


class OutputTokensDetails(BaseModel):
    """How many tokens of the output were thoughts."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """How many tokens a response took."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(BaseModel):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ModelResponse(BaseModel):
    """A response, and how it was asked for."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputItem] = []
    usage: ResponseUsage | None = None

    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    reasoning: dict[str, str | None]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | NamedTool | AllowedTools
    tools: list[ClientTool]
    top_logprobs: int
    top_p: float
    frequency_penalty: float
    presence_penalty: float
    prompt_cache_key: str | None
    safety_identifier: str | None
    user: str | None

    # The only values that a request may ask for, or that are kept to whatever it asks for.
    background: Literal[False] = False
    previous_response_id: None = None
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
