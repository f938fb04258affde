"""ResponsesRequest: the body of POST /v1/responses, with OpenAI's names. Knows no chat message."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    GetPydanticSchema,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from turboquant_server.api.generation_request import GenerationRequest, JsonSchema
from turboquant_server.api.request_model import RequestModel, Text, only
from turboquant_server.api.responses_items import Item, type_of
from turboquant_server.api.responses_tools import ResponsesTool, ToolChoice
from turboquant_server.engine.sampling_params import MAX_LOGPROBS

LOGPROBS = "message.output_text.logprobs"

Includable: TypeAlias = Literal[
    "message.output_text.logprobs",
    # Reasoning is told as it is, so that it can be given back without.
    "reasoning.encrypted_content",
    # Of tools and inputs that no request can have here.
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]

STATELESS = "This server keeps no responses; give all items of the conversation as 'input'"


def _now(name: str) -> GetPydanticSchema:
    """Refuse a field of chat completions that is called something else here."""
    return only(reason=f"In this API it is '{name}'")


class ReasoningConfig(RequestModel):
    """How the model is to think. There are no summaries; who asks for one gets the thoughts themselves."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Annotated[Any, only("auto")] = None
    mode: Annotated[Any, only("standard")] = None


class TextFormat(RequestModel):
    """What the answer must look like, without more to say about it."""

    type: Literal["text", "json_object", "json_schema"]


class JsonSchemaFormat(JsonSchema):
    """A schema that the answer must keep to."""

    type: Literal["json_schema"]


class TextConfig(RequestModel):
    """The answer's text."""

    harmless_fields = frozenset({"verbosity"})

    format: (
        Annotated[
            Annotated[TextFormat, Tag("text")] | Annotated[JsonSchemaFormat, Tag("json_schema")],
            Discriminator(lambda value: "json_schema" if type_of(value) == "json_schema" else "text"),
        ]
        | None
    ) = None


class ResponsesRequest(GenerationRequest):
    """The body of POST /v1/responses."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": "Where is the harbour?", "max_output_tokens": 32}]}
    )
    harmless_fields = frozenset(
        {
            *(
                "access_programs",
                "client_metadata",
                "image",
                "moderation",
                "prompt_cache_options",
                "prompt_cache_retention",
            ),
            *("service_tier", "store"),
            # vLLM's
            *("guided_decoding_backend", "request_id", "spaces_between_special_tokens"),
        }
    )

    input: Text | Annotated[list[Item], Field(min_length=1, fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[ResponsesTool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # Counts calls of tools that a server brings along, so there are none.
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    include: list[Includable] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # What comes back as it was given.
    metadata: (
        Annotated[
            dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    prompt_cache_key: Text | None = None
    safety_identifier: Text | None = None
    user: Text | None = None

    background: Annotated[Any, only(False)] = None
    background_options: Annotated[Any, only()] = None
    context_management: Annotated[Any, only([])] = None
    conversation: Annotated[Any, only(reason=STATELESS)] = None
    previous_response_id: Annotated[Any, only(reason=STATELESS)] = None
    prompt: Annotated[Any, only()] = None
    # Prompts that are too long are refused, never cut.
    truncation: Annotated[Any, only("disabled")] = None

    # Fields of chat completions, whose clients may have forgotten to rename them.
    logprobs: Annotated[Any, _now("include")] = None
    max_completion_tokens: Annotated[Any, _now("max_output_tokens")] = None
    max_tokens: Annotated[Any, _now("max_output_tokens")] = None
    messages: Annotated[Any, _now("input")] = None
    n: Annotated[Any, only(1)] = None
    reasoning_effort: Annotated[Any, _now("reasoning.effort")] = None
    response_format: Annotated[Any, _now("text.format")] = None
    return_token_ids: Annotated[Any, only(False)] = None

    # vLLM's
    enable_response_messages: Annotated[Any, only(False)] = None
    previous_input_messages: Annotated[Any, only([])] = None
    previous_response: Annotated[Any, only(reason=STATELESS)] = None
    vllm_xargs: Annotated[Any, only({})] = None

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count and LOGPROBS not in (info.data.get("include") or ()):
            message = f"It may be given only together with include=[{LOGPROBS!r}]"
            raise PydanticCustomError("without_logprobs", message)
        return count

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report beside each token; None reports no log-probability."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None
