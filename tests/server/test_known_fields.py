"""Every field that OpenAI or vLLM knows is honoured, harmless, or refused by its name; none is lost."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from turboquant_server.api.chat_request import ChatCompletionRequest
from turboquant_server.api.completion_request import CompletionRequest
from turboquant_server.api.generation_request import GenerationRequest, StreamOptions

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SUBJECTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 2},
}
# A value that asks for something, and one that asks for nothing.
VLLM_FIELDS: dict[str, tuple[Any, Any]] = {
    "allowed_token_ids": ([1], None),
    "bad_words": (["a"], []),
    "ebnf": ("root ::= 'a'", None),
    "grammar": ("root ::= 'a'", ""),
    "guided_whitespace_pattern": (" *", None),
    "json_schema": ({}, None),
    "kv_transfer_params": ({}, None),
    "length_penalty": (0.5, 1.0),
    "logits_processors": (["a"], []),
    "priority": (3, 0),
    "regex": ("a", None),
    "return_tokens_as_token_ids": (True, False),
    "skip_special_tokens": (False, True),
    "truncate_prompt_tokens": (5, None),
    "use_beam_search": (True, False),
}
ONLY_CHAT: dict[str, tuple[Any, Any]] = {
    "add_special_tokens": (True, False),
    "chat_template": ("{{ 1 }}", None),
    "documents": ([{"text": "a"}], []),
    "echo": (True, False),
    "mm_processor_kwargs": ({"a": 1}, {}),
    "thinking_token_budget": (5, None),
}
ONLY_COMPLETIONS: dict[str, tuple[Any, Any]] = {
    "add_special_tokens": (False, True),
    "prompt_embeds": ("AAAA", None),
}
ROWS = [
    (path, field, *values)
    for path, fields in ((CHAT, VLLM_FIELDS | ONLY_CHAT), (COMPLETIONS, VLLM_FIELDS | ONLY_COMPLETIONS))
    for field, values in fields.items()
]


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (ChatCompletionRequest, chat_create_params.CompletionCreateParamsBase),
        (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
    ],
)
def test_every_field_of_the_sdk_is_known(model: type[GenerationRequest], params: Any) -> None:
    known = model.model_fields.keys() | model.harmless_fields
    assert params.__annotations__.keys() <= known


def test_every_field_of_the_sdks_stream_options_is_known() -> None:
    from openai.types.chat import ChatCompletionStreamOptionsParam

    known = StreamOptions.model_fields.keys() | StreamOptions.harmless_fields
    assert ChatCompletionStreamOptionsParam.__annotations__.keys() <= known


@pytest.mark.parametrize(("path", "field", "something", "nothing"), ROWS, ids=lambda value: str(value)[:30])
def test_a_known_field_that_is_not_supported_is_refused_unless_it_asks_for_nothing(
    http: httpx.Client, path: str, field: str, something: Any, nothing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    response = http.post(path, json={**SUBJECTS[path], field: something})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert f"'{field}'" in error["message"]
    assert http.post(path, json={**SUBJECTS[path], field: nothing}).status_code == 200
    assert not caplog.records
