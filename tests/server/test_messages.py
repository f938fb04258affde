"""Messages as Anthropic's SDK sees them: text, streams, ends, usage, errors; the tiny model answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic
from anthropic.types import (
    Message,
    RawMessageStreamEvent,
)
from held_steps import held_steps
from openai import OpenAI
from transformers import PreTrainedTokenizerFast

QUESTION = "What is the access code?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
SYSTEM = "Answer in one word."
PATH = "/v1/messages"
TIMEOUT = 20


def ask(client: Anthropic, **fields: Any) -> Message:
    """Return the greedy answer."""
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, **fields}
    body["extra_body"] = {"temperature": 0, **fields.get("extra_body", {})}
    message = client.messages.create(**body)
    assert isinstance(message, Message)
    return message


def stream(client: Anthropic, **fields: Any) -> tuple[Message, list[RawMessageStreamEvent]]:
    """Return the greedy answer as the SDK's helper makes it from a stream, and the events."""
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, **fields}
    body["extra_body"] = {"temperature": 0, **fields.get("extra_body", {})}
    events: Any = list(client.messages.create(**body, stream=True))
    with client.messages.stream(**body) as helper:
        return helper.get_final_message(), events


def text_of(message: Message) -> str:
    [block] = message.content
    assert block.type == "text"
    return block.text


def same(message: Message) -> dict[str, Any]:
    """Return what must not depend on whether an answer was streamed."""
    return message.model_dump(exclude={"id": True, "content": {"__all__": {"parsed_output"}}})


def test_a_streamed_message_is_the_one_that_is_not_streamed(anthropic_client: Anthropic) -> None:
    message = ask(anthropic_client)
    streamed, _ = stream(anthropic_client)
    assert same(message) == same(streamed)
    assert len(text_of(message)) > 10
    assert (message.role, message.model, message.stop_reason) == ("assistant", "tiny", "max_tokens")
    assert message.id.startswith("msg_") and message.id != streamed.id


def test_a_message_is_what_a_chat_completion_is(anthropic_client: Anthropic, client: OpenAI) -> None:
    chat: Any = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=30,
    )
    message = ask(anthropic_client, system=SYSTEM)
    assert text_of(message) == chat.choices[0].message.content
    assert message.usage.input_tokens == chat.usage.prompt_tokens


def test_events_come_in_anthropics_order_and_with_their_names(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 30, "temperature": 0, "stream": True}
    response = http.post(f"{PATH}?beta=true", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    names = [event["type"] for event in events]
    deltas = names.count("content_block_delta")
    assert deltas > 3
    assert names == [
        *("message_start", "ping", "content_block_start"),
        *["content_block_delta"] * deltas,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    start, _, block_start, delta, *_, block_stop, message_delta, _ = events
    assert start["message"]["content"] == []
    assert start["message"]["stop_reason"] is start["message"]["stop_sequence"] is None
    assert block_start == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    assert (delta["index"], delta["delta"]["type"]) == (0, "text_delta")
    assert block_stop == {"type": "content_block_stop", "index": 0}
    assert message_delta["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert message_delta["usage"]["output_tokens"] == 30


def test_a_response_has_exactly_the_shape_of_the_sdk(http: httpx.Client) -> None:
    response = http.post(PATH, json={"messages": MESSAGES, "max_tokens": 3, "temperature": 0})
    message = Message.model_validate_json(response.content, strict=True)
    assert not message.model_extra and not message.usage.model_extra
    assert not message.content[0].model_extra


def test_the_stop_sequence_that_ended_the_answer_is_named(anthropic_client: Anthropic) -> None:
    text = text_of(ask(anthropic_client, max_tokens=60))
    first, second = text[20:23], text[30:33]
    for stop in ([first], [second], [second, "never in it", first]):
        message = ask(anthropic_client, max_tokens=60, stop_sequences=stop)
        streamed, _ = stream(anthropic_client, max_tokens=60, stop_sequences=stop)
        assert same(message) == same(streamed)
        start, found = min((text.index(one), one) for one in stop if one in text)
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", found)
        assert text_of(message) == text[:start]


def test_tokens_are_counted_as_the_usage_counts_them(
    anthropic_client: Anthropic, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    count = anthropic_client.messages.count_tokens(model="tiny", messages=MESSAGES, system=SYSTEM)
    usage = ask(anthropic_client, system=SYSTEM, max_tokens=2).usage
    prompt = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert count.input_tokens == usage.input_tokens == len(tiny_tokenizer(prompt)["input_ids"])
    assert (usage.output_tokens, usage.cache_creation_input_tokens) == (2, 0)


def test_tokens_of_what_does_not_fit_are_counted_too(anthropic_client: Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "x" * 5000}]
    assert anthropic_client.messages.count_tokens(model="tiny", messages=messages).input_tokens > 5000


def test_what_was_found_in_the_cache_counts_apart(anthropic_client: Anthropic) -> None:
    messages = [{"role": "user", "content": "messages" * 90}]
    first = ask(anthropic_client, messages=messages, max_tokens=2)
    second, events = stream(anthropic_client, messages=messages, max_tokens=2)
    assert first.usage.cache_read_input_tokens == 0
    assert second.usage.cache_read_input_tokens == 516
    assert second.usage.input_tokens == first.usage.input_tokens - 516
    start = events[0]
    assert start.type == "message_start"
    assert start.message.usage.cache_read_input_tokens == 516
    assert start.message.usage.input_tokens == second.usage.input_tokens


def test_claude_codes_header_is_no_part_of_the_prompt(anthropic_client: Anthropic) -> None:
    def count(*texts: str) -> int:
        system: Any = [
            {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in texts
        ]
        counted = anthropic_client.messages.count_tokens(model="tiny", messages=MESSAGES, system=system)
        return counted.input_tokens

    header = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"
    assert count(header, SYSTEM, "More.") == count(SYSTEM, "More.") == count(f"{header}\n{SYSTEM}", "More.")
    assert count(header) < count(SYSTEM)


def test_an_answer_goes_on_with_the_last_message_of_the_assistant(
    anthropic_client: Anthropic, client: OpenAI
) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The code"}]
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\nThe code"
    completion = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=30)
    assert text_of(ask(anthropic_client, messages=messages)) == completion.choices[0].text


SCHEMA = {
    "type": "object",
    "properties": {"open": {"type": "boolean"}},
    "required": ["open"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("place", ["output_config", "output_format"])
def test_an_answer_keeps_to_a_schema(anthropic_client: Anthropic, place: str) -> None:
    wish: Any = {"type": "json_schema", "schema": SCHEMA}
    extra = {place: {"format": wish} if place == "output_config" else wish}
    message = ask(anthropic_client, max_tokens=200, extra_body=extra)
    assert message.stop_reason == "end_turn"
    assert json.loads(text_of(message)).keys() == {"open"}
    extra = {"output_config": {"format": {**wish, "schema": {"type": "nothing"}}}}
    with pytest.raises(anthropic.BadRequestError, match=r"Invalid 'output_config\.format\.schema'"):
        ask(anthropic_client, extra_body=extra)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_who_leaves_is_not_answered_any_more(server: Any, is_streamed: bool) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1900, "temperature": 0, "stream": is_streamed}
    with httpx.Client(base_url=server.url, timeout=0.2) as impatient:
        if is_streamed:
            with impatient.stream("POST", PATH, json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                impatient.post(PATH, json=body)
    started = time.monotonic()
    server.wait_until_idle()
    assert time.monotonic() - started < TIMEOUT


def test_a_silent_stream_has_pings(running_server: Any, tiny_model_dir: Path) -> None:
    body = {"messages": MESSAGES, "max_tokens": 4, "stream": True}
    with (
        running_server(tiny_model_dir, sse_keep_alive_interval=0.05, max_num_seqs=1) as server,
        held_steps(server.model_manager) as held,
        httpx.stream("POST", server.url + PATH, json=body, timeout=TIMEOUT) as response,
    ):
        lines = response.iter_lines()
        silent = [next(lines) for _ in range(9)]
        held.let_go()
        rest = [line for line in lines if line and "ping" not in line]  # there may be more
    assert silent == ["event: ping", 'data: {"type":"ping"}', ""] * 3
    assert rest[-2:] == ["event: message_stop", 'data: {"type":"message_stop"}']
