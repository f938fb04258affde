"""POST /v1/responses as OpenAI's SDK sees it: text, items, tools, reasoning, usage, what comes back."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import BaseModel
from scripted_engine import ScriptedEngine, hermes_call

from turboquant_server.api.responses_request import ResponsesRequest
from turboquant_server.engine.request import FinishReason

RESPONSES = "/v1/responses"
QUESTION = "What is the access code?"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Tell the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CALL = hermes_call("get_weather", '{"city": "Zürich"}')
THOUGHT = "<think>\nIs it cold?\n</think>\n\n"
LOGPROBS: Any = "message.output_text.logprobs"


def ask(client: OpenAI, **fields: Any) -> Response:
    response = client.responses.create(**{"model": "tiny", "input": QUESTION, **fields})
    assert isinstance(response, Response)
    return response


def answer(client: OpenAI, engine: ScriptedEngine, text: str, **fields: Any) -> Response:
    engine.texts = [text]
    return ask(client, **{"tools": [WEATHER], **fields})


def items_of(response: Response) -> list[Any]:
    return [item.to_dict() for item in response.output]


def test_a_response_says_what_a_chat_completion_says(client: OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=30)
    response = ask(client, instructions="Be brief.", temperature=0, max_output_tokens=30)
    assert response.output_text == chat.choices[0].message.content
    assert chat.usage is not None and response.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens == 30
    assert response.usage.total_tokens == chat.usage.total_tokens


def test_a_response_has_exactly_the_shape_of_the_sdk(http: httpx.Client) -> None:
    body = http.post(RESPONSES, json={"input": QUESTION, "max_output_tokens": 3}).json()
    response = Response.model_validate_json(json.dumps(body), strict=True)
    # OpenAI sends these, too.
    assert set(response.model_extra or ()) == {"frequency_penalty", "presence_penalty", "store"}
    assert body["id"].startswith("resp_") and body["output"][0]["id"].startswith("msg_")
    assert (body["object"], body["model"], body["error"], body["store"]) == ("response", "tiny", None, False)
    assert (body["text"], body["tools"], body["tool_choice"]) == ({"format": {"type": "text"}}, [], "auto")
    assert (body["temperature"], body["top_p"], body["parallel_tool_calls"]) == (1, 1, True)
    [part] = body["output"][0]["content"]
    assert part == {"type": "output_text", "text": part["text"], "annotations": [], "logprobs": []}


def test_what_was_asked_for_comes_back(client: OpenAI, engine: ScriptedEngine) -> None:
    fields: dict[str, Any] = {
        "instructions": "Be brief.",
        "max_output_tokens": 50,
        "max_tool_calls": 3,
        "metadata": {"key": "value"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "temperature": 0.5,
        "tool_choice": "auto",
        "tools": [WEATHER],
        "top_p": 0.9,
        "truncation": "disabled",
        "user": "u",
    }
    told = answer(client, engine, "Hi", **fields, reasoning={"effort": "low"}).to_dict()
    assert {name: told[name] for name in fields} == fields
    assert told["reasoning"] == {"effort": "low", "summary": None}


def test_an_input_has_the_tokens_that_a_response_to_it_counts(client: OpenAI, engine: ScriptedEngine) -> None:
    fields: Any = {"model": "tiny", "instructions": "Be brief.", "input": QUESTION, "tools": [WEATHER]}
    count = client.responses.input_tokens.count(**fields)
    assert count.object == "response.input_tokens"
    usage = answer(client, engine, "Hi", **fields).usage
    assert usage is not None and count.input_tokens == usage.input_tokens
    with pytest.raises(openai.BadRequestError, match=r"input\[0\]\.call_id"):
        output: Any = {"type": "function_call_output", "call_id": "a", "output": ""}
        client.responses.input_tokens.count(model="tiny", input=[output])


def test_conversations_are_not_compacted(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not compact"):
        client.responses.compact(model="tiny", input=QUESTION)


def test_a_limit_makes_a_response_incomplete(client: OpenAI) -> None:
    response = ask(client, max_output_tokens=5, extra_body={"ignore_eos": True})
    assert response.status == "incomplete" and response.completed_at is None
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert [item["status"] for item in items_of(response)] == ["incomplete"]
    assert response.usage is not None and response.usage.output_tokens == 5


def test_an_answer_that_ends_by_itself_is_completed(client: OpenAI, engine: ScriptedEngine) -> None:
    response = answer(client, engine, "Hello ")
    assert (response.status, response.incomplete_details) == ("completed", None)
    assert response.completed_at is not None and response.completed_at >= response.created_at
    assert (response.output_text, response.output[0].status) == ("Hello ", "completed")


def test_an_answer_that_says_nothing_is_a_message(client: OpenAI, engine: ScriptedEngine) -> None:
    [message] = items_of(answer(client, engine, ""))
    assert [part["text"] for part in message["content"]] == [""]


def test_reasoning_text_and_calls_are_items_of_their_own(client: OpenAI, engine: ScriptedEngine) -> None:
    reasoning, message, call, second = items_of(answer(client, engine, f"{THOUGHT}I look.\n{CALL}\n{CALL}"))
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Is it cold?"}]
    assert (reasoning["summary"], message["content"][0]["text"]) == ([], "I look.")
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Zürich"})
    prefixes = [item["id"].split("_")[0] for item in (reasoning, message, call)]
    assert prefixes == ["rs", "msg", "fc"] and call["call_id"].startswith("call_")
    assert second["call_id"] != call["call_id"] and second["id"] != call["id"]
    assert {item["status"] for item in (reasoning, message, call)} == {"completed"}


@pytest.mark.parametrize(
    ("text", "statuses"),
    [
        (THOUGHT[:-15], ["incomplete"]),
        (f"{THOUGHT}Yes", ["completed", "incomplete"]),
        (f"{CALL}", ["completed"]),
        (f"{CALL}{CALL[:-20]}", ["completed", "incomplete"]),
    ],
    ids=["reasoning", "text", "call", "half a call"],
)
def test_only_what_was_cut_off_is_incomplete(
    client: OpenAI, engine: ScriptedEngine, text: str, statuses: list[str]
) -> None:
    engine.finish_reason = FinishReason.LENGTH
    response = answer(client, engine, text)
    assert response.status == "incomplete"
    assert [item["status"] for item in items_of(response)] == statuses


def test_reasoning_tokens_are_those_up_to_the_closing_mark(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.piece_length = 1
    usage = answer(client, engine, f"{THOUGHT}Yes.").usage
    assert usage is not None
    assert usage.output_tokens_details.reasoning_tokens == len("<think>\nIs it cold?")
    assert usage.output_tokens == len(f"{THOUGHT}Yes.") + 1
    usage = answer(client, engine, f"Yes.{CALL}").usage
    assert usage is not None and usage.output_tokens_details.reasoning_tokens == 0


def test_cached_tokens_are_counted(client: OpenAI) -> None:
    fields: dict[str, Any] = {"input": "again" * 200, "max_output_tokens": 1}
    ask(client, **fields)
    usage = ask(client, **fields).usage
    assert usage is not None and usage.input_tokens_details.cached_tokens > 500


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"reasoning": {"effort": "low"}}, "low"),
        ({"reasoning": {"effort": "none", "summary": "auto"}}, "<think>\n\n</think>\n\n"),
        ({"extra_body": {"chat_template_kwargs": {"reasoning_effort": "x"}}}, "x"),
    ],
    ids=str,
)
def test_the_effort_reaches_the_template(
    client: OpenAI, engine: ScriptedEngine, server: Any, fields: dict[str, Any], end: str
) -> None:
    answer(client, engine, "Hi", **fields)
    assert engine.prompt(server.model_manager).endswith(f"assistant\n{end}")


class Code(BaseModel):
    """An answer."""

    code: int


def test_parse_returns_an_object(client: OpenAI) -> None:
    response = client.responses.parse(
        model="tiny", input=QUESTION, text_format=Code, temperature=0, max_output_tokens=60
    )
    assert response.status == "completed"
    assert isinstance(response.output_parsed, Code)
    text = response.to_dict()["text"]
    assert isinstance(text, dict) and text["format"]["schema"]["required"] == ["code"]


def test_a_json_object_is_one(client: OpenAI) -> None:
    response = ask(client, text={"format": {"type": "json_object"}}, max_output_tokens=400, temperature=0)
    if response.status == "completed":
        json.loads(response.output_text)
    assert response.output_text.startswith("{")


def test_sampling_fields_reach_the_engine(client: OpenAI, engine: ScriptedEngine) -> None:
    answer(
        client,
        engine,
        "Hi",
        temperature=0.5,
        top_p=0.25,
        max_output_tokens=7,
        extra_body={"seed": 3, "top_k": 4, "stop": ["x"], "presence_penalty": 0.5},
    )
    [params] = engine.sampling_params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.25, 7)
    assert (params.seed, params.top_k, params.stop, params.presence_penalty) == (3, 4, ("x",), 0.5)


def test_log_probabilities_are_those_of_a_chat(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    fields: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
    chat = client.chat.completions.create(
        model="tiny", messages=messages, logprobs=True, top_logprobs=2, max_tokens=9, **fields
    )
    response = ask(client, include=[LOGPROBS], top_logprobs=2, max_output_tokens=9, **fields)
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    expected = [token.to_dict() for token in chat.choices[0].logprobs.content]
    [part] = items_of(response)[0]["content"]
    assert part["logprobs"] == expected
    assert response.top_logprobs == 2


def test_every_field_of_the_sdk_is_known() -> None:
    known = ResponsesRequest.model_fields.keys() | ResponsesRequest.harmless_fields
    assert ResponseCreateParamsBase.__annotations__.keys() <= known


def test_no_response_is_kept(client: OpenAI) -> None:
    response = ask(client, store=True, max_output_tokens=1)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="keeps no responses"):
            call(response.id)
