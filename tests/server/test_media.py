"""Images and the like: a client's are refused in plain words, a tool's are told of, and an agent goes on."""

from __future__ import annotations

from typing import Any, TypeAlias

import httpx
import pytest
from scripted_engine import ScriptedEngine

Call: TypeAlias = tuple[str, dict[str, Any]]

PNG = "data:image/png;base64,iVBORw0KGgo="
SOURCE = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
IMAGE = {"type": "image", "source": SOURCE, "cache_control": {"type": "ephemeral"}}
DOCUMENT = {"type": "document", "source": {**SOURCE, "media_type": "application/pdf"}, "title": "a"}
INPUT_IMAGE = {"type": "input_image", "image_url": PNG, "detail": "high"}
INPUT_FILE = {"type": "input_file", "file_data": "AAAA", "filename": "a"}
SCHEMA = {"type": "object"}


def chat(part: Any) -> Call:
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]}


def response(part: Any) -> Call:
    return "/v1/responses", {"input": [{"role": "user", "content": [part]}]}


def message(part: Any) -> Call:
    return "/v1/messages", {"messages": [{"role": "user", "content": [part]}], "max_tokens": 5}


def tool_result(parts: list[Any], *following: Any) -> Call:
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": parts}
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "see", "input": {}}]},
        {"role": "user", "content": [result, *following]},
    ]
    tools = [{"name": "see", "input_schema": SCHEMA}]
    return "/v1/messages", {"messages": messages, "max_tokens": 5, "tools": tools}


def call_output(parts: list[Any], kind: str = "function_call", **fields: str) -> Call:
    items = [
        {"role": "user", "content": "Look."},
        {"type": kind, "call_id": "call_1", "name": "see", **(fields or {"arguments": "{}"})},
        {"type": f"{kind}_output", "call_id": "call_1", "output": parts},
    ]
    return "/v1/responses", {"input": items, "tools": [{"type": "function", "name": "see"}]}


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (tool_result([IMAGE]), ["image"]),  # Claude Code's Read
        (tool_result([DOCUMENT, {"type": "text", "text": "Page 1"}, IMAGE]), ["PDF document", None, "image"]),
        (call_output([INPUT_IMAGE]), ["image"]),  # Codex' view_image
        (call_output([{"type": "input_text", "text": "Page 1"}, INPUT_FILE]), [None, "file"]),
        (call_output([INPUT_IMAGE], "custom_tool_call", input=""), ["image"]),
    ],
)
def test_the_model_is_told_of_what_a_tool_has_returned_and_it_cannot_read(
    http: httpx.Client,
    engine: ScriptedEngine,
    server: Any,
    call: Call,
    told: list[str | None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine.texts = ["I cannot see it."]
    path, body = call
    assert http.post(path, json=body).status_code == 200
    result = "\n".join(f"[{kind} left out: you can read text only]" if kind else "Page 1" for kind in told)
    assert engine.prompt(server.model_manager).endswith(
        f"<|im_start|>tool\n{result}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not caplog.records


@pytest.mark.parametrize(
    ("call", "place", "words"),
    [
        (chat({"type": "image_url", "image_url": {"url": PNG}}), "messages[0].content[0]", "image"),
        (chat({"type": "input_audio", "input_audio": {}}), "messages[0].content[0]", "audio"),
        (chat({"type": "file", "file": {"file_id": "f"}}), "messages[0].content[0]", "file"),
        (response(INPUT_IMAGE), "input[0].content[0]", "image"),
        (response(INPUT_FILE), "input[0].content[0]", "file"),
        # By these words Claude Code sends the rest again; its Read has a PDF after the result.
        (message(IMAGE), "messages[0].content[0]", "image"),
        (message(DOCUMENT), "messages[0].content[0]", "PDF document"),
        (tool_result([], DOCUMENT), "messages[2].content[1]", "PDF document"),
    ],
)
def test_what_a_client_shows_is_refused(http: httpx.Client, call: Call, place: str, words: str) -> None:
    path, body = call
    refused = http.post(path, json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        f"Invalid '{place}.type': could not process {words}: this server reads text only."
    )


@pytest.mark.parametrize("kind", ["video", "image_url", 3, None, [], {}])
def test_a_result_of_another_type_is_refused_by_its_path(http: httpx.Client, kind: Any) -> None:
    for (path, body), place in [
        (tool_result([{"type": kind}]), "messages[2].content[0].content[0].type"),
        (call_output([{"type": kind}]), "input[2].output[0].type"),
    ]:
        refused = http.post(path, json=body)
        assert refused.status_code == 400
        assert f"'{place}'" in refused.json()["error"]["message"]
