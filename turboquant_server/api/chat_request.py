"""ChatCompletionRequest: the body of POST /v1/chat/completions, with OpenAI's names."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from turboquant_server.api.generation_request import CompletionsRequest
from turboquant_server.api.media import ReadableOnly
from turboquant_server.api.request_model import NonEmptyText, RequestModel, Text, only
from turboquant_server.engine.sampling_params import MAX_LOGPROBS

MAX_NAME_LENGTH = 128  # as Anthropic's API has it; OpenAI's ends at 64
ToolName = Annotated[str, Field(pattern=rf"^[a-zA-Z0-9_-]{{1,{MAX_NAME_LENGTH}}}$")]


class TextPart(RequestModel):
    """One part of a message's content; only text is supported."""

    type: Annotated[Literal["text"], ReadableOnly]
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

    name: NonEmptyText
    arguments: Annotated[Text, AfterValidator(_check_arguments)]


class EarlierToolCall(RequestModel):
    """A call in an earlier answer."""

    harmless_fields = frozenset({"index"})

    id: NonEmptyText
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(RequestModel):
    """One message of a conversation."""

    harmless_fields = frozenset({"annotations", "refusal"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    # Before the content, which may be missing beside calls.
    tool_calls: Annotated[list[EarlierToolCall], Field(fail_fast=True)] | None = None
    function_call: Annotated[Any, only()] = None
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = Field(
        None, validate_default=True
    )
    name: Text | None = None
    tool_call_id: Text | None = Field(None, validate_default=True)
    reasoning: Text | None = None
    reasoning_content: Text | None = None
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
        is_right = info.data.keys() >= {"tool_calls", "function_call"}
        if content is None and is_right and not info.data["tool_calls"]:
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

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    # A wish, where the model may also answer without a call: nothing makes it keep to the schema then.
    strict: bool | None = None


class Tool(RequestModel):
    """Something that the model may call; only functions are supported."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(RequestModel):
    """The name of a function that is to be called."""

    name: Text


class NamedTool(RequestModel):
    """A tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(RequestModel):
    """Some of the tools, and whether one must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, fail_fast=True)]


class AllowedToolsChoice(RequestModel):
    """Only some of the tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatCompletionRequest(CompletionsRequest):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"messages": [{"role": "user", "content": "Where is the harbour?"}], "max_tokens": 32}
            ]
        }
    )

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None

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
        """The tools that the model is told of, as they were given; None if it may call none."""
        if not self.tools or self.tool_choice == "none":
            return None
        allowed = self.callable_names if isinstance(self.tool_choice, AllowedToolsChoice) else None
        return [
            tool.model_dump(exclude_unset=True, exclude_none=True)
            for tool in self.tools
            if allowed is None or tool.function.name in allowed
        ]

    @property
    def callable_names(self) -> set[str]:
        """The names of the functions that an answer may call."""
        if isinstance(self.tool_choice, AllowedToolsChoice):
            return {tool.function.name for tool in self.tool_choice.allowed_tools.tools}
        if self.named_tool is not None:
            return {self.named_tool}
        return set() if self.tool_choice == "none" else {tool.function.name for tool in self.tools or ()}

    @property
    def named_tool(self) -> str | None:
        """The one function that an answer must call, if the request names it."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def must_call(self) -> bool:
        """Whether an answer must be a call."""
        choice = self.tool_choice
        mode = choice.allowed_tools.mode if isinstance(choice, AllowedToolsChoice) else choice
        return mode == "required" or isinstance(choice, NamedTool)

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The variables of the chat template."""
        effort: dict[str, Any] = {"reasoning_effort": self.reasoning_effort}
        if self.reasoning_effort is None:
            effort = {}
        elif self.reasoning_effort == "none":
            effort = {"enable_thinking": False}  # what Qwen's and others' templates call it
        return effort | (self.chat_template_kwargs or {})
