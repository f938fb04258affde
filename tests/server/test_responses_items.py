"""POST /v1/responses: items in, as the turns of a conversation, and tools, whose calls are items, too."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI
from openai.types.responses import Response
from scripted_engine import ScriptedEngine, hermes_call

QUESTION = "What is the access code?"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Tell the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
NAMED: Any = {"type": "function", "name": "get_weather"}
CALL = hermes_call("get_weather", '{"city": "Zürich"}')
THOUGHT = "<think>\nIs it cold?\n</think>\n\n"


def answer(client: OpenAI, engine: ScriptedEngine, text: str, **fields: Any) -> Response:
    engine.texts = [text]
    response = client.responses.create(
        **{"model": "tiny", "input": QUESTION, "tools": [WEATHER], **fields},
    )
    assert isinstance(response, Response)
    return response


@pytest.mark.parametrize(
    ("items", "prompt"),
    [
        ("Hi", "user: Hi"),
        ([{"role": "user", "content": "Hi"}], "user: Hi"),
        (
            [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            "user: Hi",
        ),
        (
            [
                {"role": "developer", "content": "One."},
                {"role": "system", "content": [{"type": "input_text", "text": "Two."}]},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": [{"type": "input_text", "text": text} for text in ("Go", "on")]},
            ],
            "system: One.\nTwo.|user: Hi|assistant: Yes?|user: Go\non",
        ),
        (
            [
                {"role": "user", "content": "Hi"},
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": None},
                {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "Yes", "annotations": []}]},
                {"role": "assistant", "content": "No"},
                {"role": "system", "content": "Late."},
            ],
            "user: Hi|assistant: <think>\nHm</think>Yes\nNo|system: Late.",
        ),
    ],
    ids=["text", "short", "parts", "system", "answer"],
)
def test_items_become_turns(
    client: OpenAI, engine: ScriptedEngine, server: Any, items: Any, prompt: str
) -> None:
    answer(client, engine, "Hi", input=items, tools=[])
    turns = [turn.split(": ", 1) for turn in prompt.split("|")]
    rendered = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    assert engine.prompt(server.model_manager) == f"{rendered}<|im_start|>assistant\n"


def test_instructions_come_before_a_system_message_in_one(
    client: OpenAI, engine: ScriptedEngine, server: Any
) -> None:
    items = [{"role": "system", "content": "Two."}, {"role": "user", "content": "Hi"}]
    answer(client, engine, "Hi", instructions="One.", input=items, tools=[])
    assert engine.prompt(server.model_manager).startswith("<|im_start|>system\nOne.\nTwo.<|im_end|>\n")


def test_a_tool_loop_passes_whole_outputs_back(client: OpenAI, engine: ScriptedEngine, server: Any) -> None:
    engine.texts = [f"{THOUGHT}{CALL}\n{CALL}", "It is cold."]
    items: list[Any] = [{"role": "user", "content": "Weather?"}]
    while True:
        response = client.responses.create(model="tiny", input=items, tools=[WEATHER])
        items += response.output
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            break
        for number, call in enumerate(calls):
            output: Any = [{"type": "input_text", "text": "degrees"}] if number else "0 degrees"
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
    assert response.output_text == "It is cold."
    turn = "<think>Is it cold?</think>" + CALL + CALL
    assert engine.prompt(server.model_manager).endswith(
        f"<|im_start|>assistant\n{turn}<|im_end|>\n<|im_start|>tool\n0 degrees<|im_end|>\n"
        "<|im_start|>tool\ndegrees<|im_end|>\n<|im_start|>assistant\n"
    )
    engine.texts = ["Bye"]
    client.responses.create(
        model="tiny", input=[*items, {"role": "user", "content": "Thanks"}], tools=[WEATHER]
    )
    assert engine.prompt(server.model_manager).endswith(
        "<|im_start|>assistant\nIt is cold.<|im_end|>\n<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_none_hides_the_tools(client: OpenAI, engine: ScriptedEngine, server: Any) -> None:
    assert answer(client, engine, CALL, tool_choice="none").output_text == CALL
    assert "get_weather" not in engine.prompt(server.model_manager)
    assert answer(client, engine, CALL, tool_choice="auto").output[0].type == "function_call"


def test_the_model_sees_a_tool_as_in_a_chat(client: OpenAI, engine: ScriptedEngine, server: Any) -> None:
    answer(client, engine, CALL)
    function = {name: value for name, value in WEATHER.items() if name != "type"}
    messages: Any = [{"role": "user", "content": QUESTION}]
    tools: Any = [{"type": "function", "function": function}]
    engine.texts = [""]
    client.chat.completions.create(model="tiny", messages=messages, tools=tools)
    assert engine.prompts[0] == engine.prompts[1]


def test_without_parallel_calls_there_is_one(client: OpenAI, engine: ScriptedEngine) -> None:
    assert len(answer(client, engine, CALL + CALL, parallel_tool_calls=False).output) == 1


@pytest.mark.parametrize(
    ("choice", "must_call"),
    [
        ("required", True),
        (NAMED, True),
        ({"type": "allowed_tools", "mode": "required", "tools": [NAMED]}, True),
        ({"type": "allowed_tools", "mode": "auto", "tools": [NAMED]}, False),
    ],
    ids=str,
)
def test_a_choice_of_tools_means_what_it_does_in_a_chat(
    client: OpenAI, engine: ScriptedEngine, server: Any, choice: Any, must_call: bool
) -> None:
    other = {**WEATHER, "name": "other"}
    response = answer(client, engine, CALL, tools=[WEATHER, other], tool_choice=choice)
    [params] = engine.sampling_params
    assert (params.grammar is not None) == must_call
    assert ("other" in engine.prompt(server.model_manager)) == (choice in ("required", NAMED))
    assert response.to_dict()["tool_choice"] == choice
