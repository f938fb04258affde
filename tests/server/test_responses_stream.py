"""A streamed response: OpenAI's events in OpenAI's order, and the same response as without a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from scripted_engine import ScriptedEngine, hermes_call

from turboquant_server.engine.request import FinishReason, RequestFailedError, RequestOutput

RESPONSES = "/v1/responses"
QUESTION = "What is the access code?"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CALL = hermes_call("get_weather", '{"city": "Zürich"}')
THOUGHT = "<think>\nIs it cold?\n</think>\n\n"
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
BEGIN = ["response.created", "response.in_progress"]
REASONING = [
    "response.output_item.added",
    "response.content_part.added",
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
MESSAGE = [kind.replace("reasoning_text", "output_text") for kind in REASONING]
FUNCTION_CALL = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]


def post(http: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """Return the events of a stream; check that each is one of the SDK's and has the next number."""
    response = http.post(RESPONSES, json={"input": QUESTION, "stream": True, **fields})
    assert response.headers["content-type"].startswith("text/event-stream")
    content = response.content.decode()
    assert content.endswith("\n\n")
    events = []
    for text in content[:-2].split("\n\n"):
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_json(data.removeprefix("data: "), strict=True)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds_of(events: list[dict[str, Any]]) -> list[str]:
    """Return the types of events, of neighbouring ones with the same type once."""
    kinds = [event["type"] for event in events]
    return [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """Return a response without what differs from one to the next."""
    output = [{**item, "id": "", "call_id": item.get("call_id") and ""} for item in response["output"]]
    return {**response, "id": "", "created_at": 0, "completed_at": 0, "output": output}


def test_events_come_in_the_order_of_openai(http: httpx.Client, engine: ScriptedEngine) -> None:
    engine.texts = [f"{THOUGHT}I look.\n{CALL}\n{CALL}Done"]
    events = post(http, tools=[WEATHER])
    expected = [*BEGIN, *REASONING, *MESSAGE, *FUNCTION_CALL, *FUNCTION_CALL, *MESSAGE, "response.completed"]
    assert kinds_of(events) == expected
    indices = [event["output_index"] for event in events if "output_index" in event]
    assert indices == sorted(indices) and set(indices) == set(range(5))


def test_events_tell_the_items_that_the_response_has(http: httpx.Client, engine: ScriptedEngine) -> None:
    engine.texts = [f"{THOUGHT}I look.\n{CALL}"]
    events = post(http, tools=[WEATHER])
    output = events[-1]["response"]["output"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert done == output
    for before, after in zip(added, output, strict=True):
        assert (before["id"], before["type"], before["status"]) == (after["id"], after["type"], "in_progress")
        assert before.get("content", []) == [] and before.get("arguments", "") == ""
    for index, item in enumerate(output):
        own = [event for event in events if event.get("output_index") == index]
        assert all(event["item_id"] == item["id"] for event in own if "item_id" in event)
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert "".join(event["delta"] for event in own if "delta" in event) == text
        assert [event.get("text", event.get("arguments")) for event in own if "text" in event] in ([], [text])
        parts = [event["part"] for event in own if "part" in event]
        assert [part["text"] for part in parts] in ([], ["", text])


def test_a_response_begins_in_progress_and_empty(http: httpx.Client) -> None:
    created, in_progress, *_ = post(http, max_output_tokens=2)
    assert created["response"] == in_progress["response"]
    response = created["response"]
    assert (response["status"], response["output"], response["usage"]) == ("in_progress", [], None)


@pytest.mark.parametrize("length", [1, 3, 1000])
@pytest.mark.parametrize("finish_reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_streamed_and_whole_responses_are_the_same(
    http: httpx.Client, engine: ScriptedEngine, length: int, finish_reason: FinishReason
) -> None:
    engine.piece_length = length
    engine.finish_reason = finish_reason
    for text in [f"{THOUGHT}I look. 😀\n{CALL}", f"{THOUGHT}", f"Yes {CALL}{CALL[:-9]}", "", " Hi "]:
        engine.texts = [text, text]
        last = post(http, tools=[WEATHER])[-1]
        whole = http.post(RESPONSES, json={"input": QUESTION, "tools": [WEATHER]}).json()
        assert without_ids(last["response"]) == without_ids(whole)
        assert last["type"] == f"response.{whole['status']}"


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 7, "top_p": 0.9}], ids=str)
def test_streamed_and_whole_answers_of_the_model_are_the_same(
    http: httpx.Client, sampling: dict[str, Any]
) -> None:
    body = {"max_output_tokens": 30, "include": ["message.output_text.logprobs"], **sampling}
    events = post(http, **body)
    whole = http.post(RESPONSES, json={"input": QUESTION, **body}).json()
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    [part] = whole["output"][0]["content"]
    assert len(deltas) > 5
    assert [token for delta in deltas for token in delta["logprobs"]] == part["logprobs"]
    assert "".join(delta["delta"] for delta in deltas) == part["text"]


class get_weather(BaseModel):
    """Tell the weather."""

    city: str


class Code(BaseModel):
    """An answer."""

    code: int


def test_the_sdks_stream_helper_collects_everything(client: OpenAI, engine: ScriptedEngine) -> None:
    import openai

    engine.texts = [f"{THOUGHT}I look. {CALL}"]
    tools: Any = [openai.pydantic_function_tool(get_weather)["function"] | {"type": "function"}]
    with client.responses.stream(model="tiny", input=QUESTION, tools=tools) as stream:
        events = list(stream)
        response = stream.get_final_response()
    snapshots = [event.snapshot for event in events if event.type == "response.output_text.delta"]
    assert snapshots[-1] == response.output_text == "I look."
    [call] = [item for item in response.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"city": "Zürich"}


def test_the_sdks_stream_helper_parses_an_answer(client: OpenAI) -> None:
    with client.responses.stream(
        model="tiny", input=QUESTION, text_format=Code, temperature=0, max_output_tokens=60
    ) as stream:
        response = stream.get_final_response()
    assert isinstance(response.output_parsed, Code)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (RequestFailedError("r", "out of memory"), "out of memory"),
        (ZeroDivisionError("secret"), "its log has the details"),
    ],
    ids=["the request's", "the server's"],
)
def test_a_failure_ends_a_stream_with_a_failed_response(
    http: httpx.Client, server: Any, monkeypatch: pytest.MonkeyPatch, failure: Exception, words: str
) -> None:
    async def fail(token_ids: list[int], *arguments: object) -> AsyncIterator[RequestOutput]:
        yield RequestOutput("r", "Half", [0], num_prompt_tokens=4, num_output_tokens=1, finish_reason=None)
        raise failure

    monkeypatch.setattr(server.model_manager.engine, "generate", fail)
    *_, done, failed = post(http)
    assert (done["type"], done["item"]["status"]) == ("response.output_item.done", "incomplete")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    error = failed["response"]["error"]
    assert error["code"] == "server_error" and words in error["message"] and "secret" not in str(failed)
    assert failed["response"]["output"][0]["content"][0]["text"] == "Half"
    whole = http.post(RESPONSES, json={"input": QUESTION})
    assert whole.status_code == 500 and words in whole.json()["error"]["message"]


# With slow_steps this takes 30 s: an engine that is idle sooner has been told to stop.
LONG = {"max_output_tokens": 1500, "ignore_eos": True}


@pytest.mark.usefixtures("slow_steps", "idle_afterwards")
def test_leaving_before_the_whole_response_is_there_frees_the_engine(server: Any) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + RESPONSES, json={"input": QUESTION, **LONG}, timeout=0.3)


@pytest.mark.usefixtures("slow_steps", "idle_afterwards")
def test_leaving_in_the_middle_of_a_stream_frees_its_blocks(client: OpenAI, server: Any) -> None:
    num_free = server.num_free_blocks
    with client.responses.create(
        model="tiny",
        input="middle" * 150,
        stream=True,
        max_output_tokens=1500,
        extra_body={"ignore_eos": True},
    ) as stream:
        assert any(event.type == "response.output_text.delta" for event in stream)
        assert server.num_free_blocks != num_free
