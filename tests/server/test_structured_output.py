"""Answers of the bundled model over HTTP: whatever it is asked, they parse, validate and match."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import httpx
import jsonschema
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field
from schemas import SCHEMAS

import turboquant_server

if TYPE_CHECKING:
    from conftest import RunningServer
    from transformers import PreTrainedTokenizerFast

TIMEOUT = 60
DEMO = Path(turboquant_server.__file__).parent / "demo"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SUBJECTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Describe the harbour."}]},
    COMPLETIONS: {"prompt": "The harbour as JSON:"},
}
PATTERN = r"[A-Z][a-z]{2,8} [0-9]{4}(, [a-z]{1,8})?\."
# In Lark's language: sums with balanced brackets.
GRAMMAR = 'start: term ("+" term)~0..3\nterm: NUMBER | "(" start ")"\nNUMBER: /[1-9][0-9]{0,2}/'


@pytest.fixture(scope="module")
def demo(
    running_server: Callable[..., AbstractContextManager[RunningServer]],
) -> Iterator[RunningServer]:
    with running_server(DEMO, kv_cache_memory=64 * 2**20) as server:
        yield server


@pytest.fixture(scope="module")
def http_demo(demo: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo.url, timeout=TIMEOUT) as client:
        yield client


def post(http: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    defaults = {"max_tokens": 120, "temperature": 1.5, "seed": 7}
    return http.post(path, json={**SUBJECTS[path], **defaults, **fields})


def answers_of(response: httpx.Response) -> list[tuple[str, str]]:
    """Return each answer's text and why it ended."""
    assert response.status_code == 200, response.text
    return [
        (choice["message"]["content"] if "message" in choice else choice["text"], choice["finish_reason"])
        for choice in response.json()["choices"]
    ]


def as_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def check_schemas(http: httpx.Client, **fields: Any) -> int:
    """Ask for all schemas at once; return how many answers were whole."""

    def ask(schema: dict[str, Any]) -> list[tuple[str, str]]:
        return answers_of(post(http, CHAT, response_format=as_format(schema), **fields))

    num_whole = 0
    with ThreadPoolExecutor(8) as threads:
        for schema, answers in zip(SCHEMAS.values(), threads.map(ask, SCHEMAS.values()), strict=True):
            jsonschema.Draft202012Validator.check_schema(schema)
            for text, finish_reason in answers:
                assert finish_reason in ("stop", "length")
                if finish_reason == "stop":
                    jsonschema.validate(json.loads(text), schema)
                    num_whole += 1
    return num_whole


def test_answers_validate_by_thirty_schemas(http_demo: httpx.Client) -> None:
    assert len(SCHEMAS) == 30
    assert check_schemas(http_demo, n=2, seed=1) >= 50


@pytest.mark.long
def test_three_hundred_answers_validate_by_thirty_schemas(http_demo: httpx.Client) -> None:
    assert check_schemas(http_demo, n=10, seed=2, max_tokens=400) >= 280


def test_json_mode_gives_an_object(http_demo: httpx.Client) -> None:
    [(text, finish_reason)] = answers_of(
        post(http_demo, CHAT, response_format={"type": "json_object"}, temperature=0, max_tokens=300)
    )
    assert text.startswith("{")
    if finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


class Place(BaseModel):
    name: str = Field(max_length=20)
    kind: Literal["harbour", "light house", "Kaffeehäuser ☕"]


class Tour(BaseModel):
    places: list[Place] = Field(min_length=1, max_length=2)
    days: int = Field(ge=1, le=30)
    guide: Place | None


def test_the_sdk_parses_an_answer_into_a_pydantic_model(demo: RunningServer) -> None:
    with OpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0, timeout=TIMEOUT) as client:
        completion = client.chat.completions.parse(
            model=str(DEMO),
            messages=[{"role": "user", "content": "Plan a tour."}],
            response_format=Tour,
            temperature=1.5,
            seed=4,
            max_tokens=400,
            n=3,
        )
        for choice in completion.choices:
            assert choice.finish_reason == "stop"
            assert isinstance(choice.message.parsed, Tour)
        with client.chat.completions.stream(
            model=str(DEMO),
            messages=[{"role": "user", "content": "Plan a tour."}],
            response_format=Tour,
            temperature=1.5,
            seed=4,
            max_tokens=400,
        ) as stream:
            streamed = stream.get_final_completion().choices[0]
    assert streamed.message.parsed == completion.choices[0].message.parsed


@pytest.mark.parametrize("path", SUBJECTS)
@pytest.mark.parametrize(
    "fields",
    [{"guided_regex": PATTERN}, {"structured_outputs": {"regex": PATTERN}}],
    ids=["guided", "structured_outputs"],
)
def test_a_regex_is_matched_as_a_whole(http_demo: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    for text, finish_reason in answers_of(post(http_demo, path, n=4, **fields)):
        assert finish_reason == "stop"
        assert re.fullmatch(PATTERN, text)


@pytest.mark.parametrize("path", SUBJECTS)
@pytest.mark.parametrize("field", ["guided_choice", "structured_outputs"])
def test_one_of_the_choices_is_taken(http_demo: httpx.Client, path: str, field: str) -> None:
    choices = ["yes", "no", "yes, but", 'der "Übermut"', "two\nlines", "😀"]
    value = choices if field == "guided_choice" else {"choice": choices}
    for text, finish_reason in answers_of(post(http_demo, path, n=6, **{field: value})):
        assert finish_reason == "stop"
        assert text in choices


@pytest.mark.parametrize("path", SUBJECTS)
@pytest.mark.parametrize("field", ["guided_grammar", "structured_outputs"])
def test_a_grammar_is_followed_to_its_end(http_demo: httpx.Client, path: str, field: str) -> None:
    value = GRAMMAR if field == "guided_grammar" else {"grammar": GRAMMAR}
    answers = answers_of(post(http_demo, path, n=6, **{field: value}))
    whole = [text for text, finish_reason in answers if finish_reason == "stop"]
    assert whole
    for text in whole:
        assert re.fullmatch(r"[0-9+()]+", text)
        assert isinstance(eval(text), int)


@pytest.mark.parametrize(
    "value", [SCHEMAS["flat object"], json.dumps(SCHEMAS["flat object"])], ids=["{}", "text"]
)
@pytest.mark.parametrize("field", ["guided_json", "structured_outputs"])
def test_a_schema_is_taken_as_an_object_and_as_text(http_demo: httpx.Client, field: str, value: Any) -> None:
    fields = {field: value if field == "guided_json" else {"json": value}}
    [(text, finish_reason)] = answers_of(post(http_demo, COMPLETIONS, **fields))
    assert finish_reason == "stop"
    jsonschema.validate(json.loads(text), SCHEMAS["flat object"])


def test_each_prompt_of_a_list_is_answered_by_the_grammar(http_demo: httpx.Client) -> None:
    fields = {"prompt": ["One:", "Two:", "Three:"], "n": 2, "guided_regex": PATTERN}
    answers = answers_of(post(http_demo, COMPLETIONS, **fields))
    assert len(answers) == 6
    assert not [text for text, _ in answers if not re.fullmatch(PATTERN, text)]


def test_a_request_gets_the_same_beside_others_that_follow_grammars(http_demo: httpx.Client) -> None:
    plain = {"max_tokens": 40}
    constrained = {"response_format": as_format(SCHEMAS["nested object"])}
    alone = [answers_of(post(http_demo, CHAT, **fields)) for fields in (plain, constrained)]
    with ThreadPoolExecutor(8) as threads:
        crowd = [threads.submit(post, http_demo, CHAT, **fields) for fields in [plain, constrained] * 4]
    assert [answers_of(response.result()) for response in crowd] == alone * 4


@pytest.mark.parametrize("path", SUBJECTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "named"),
    [
        (
            {"response_format": as_format({"type": "array", "uniqueItems": True})},
            "response_format.json_schema.schema",
            "uniqueItems",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "schema",
        ),
        ({"response_format": as_format({}) | {"type": "xml"}}, "response_format.type", "json_object"),
        ({"guided_json": {"not": {}}}, "guided_json", "not"),
        ({"guided_json": "{"}, "guided_json", "line 1"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_grammar": "start: b"}, "guided_grammar", '"b"'),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"structured_outputs": {"regex": "a(?=b)"}}, "structured_outputs.regex", "look-ahead"),
        ({"structured_outputs": {"json": {"type": "x"}}}, "structured_outputs.json", "x"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar", "GBNF"),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
            "not support",
        ),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice", "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "regex"),
        ({"guided_choice": ["a"], "min_tokens": 3}, "min_tokens", "min_tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused_before_the_first_byte(
    http_demo: httpx.Client, path: str, stream: bool, fields: dict[str, Any], param: str, named: str
) -> None:
    response = post(http_demo, path, stream=stream, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert named in error["message"]
    assert param.partition(".")[0] in error["message"]
    assert "\n" not in error["message"]


def test_a_long_reason_is_cut(http_demo: httpx.Client) -> None:
    response = post(http_demo, CHAT, guided_grammar="start: <|no such token|>")
    assert response.status_code == 400
    assert len(response.json()["error"]["message"]) < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None, "structured_outputs": {}},
        {"structured_outputs": {"json_object": False, "regex": None}},
        {"guided_json": None, "guided_regex": None, "guided_choice": None, "guided_grammar": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", SUBJECTS)
def test_fields_that_ask_for_no_grammar_change_nothing(
    http_demo: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    expected = answers_of(post(http_demo, path, max_tokens=5))
    assert answers_of(post(http_demo, path, max_tokens=5, **fields)) == expected


def test_a_grammar_begins_where_the_reasoning_ends(
    save_model: Callable[..., Path],
    running_server: Callable[..., AbstractContextManager[RunningServer]],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = save_model("llama", vocab_size=310)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    closing = str(tokenizer.convert_tokens_to_ids("</think>"))
    tokenizer.chat_template = f"{tokenizer.chat_template}{{{{ '<think>\n' }}}}{{# </think> #}}"
    tokenizer.save_pretrained(path)
    fields = {"response_format": as_format(SCHEMAS["enum"]), "logit_bias": {closing: 4}, "n": 4}
    with running_server(path) as server, httpx.Client(base_url=server.url, timeout=TIMEOUT) as http:
        response = post(http, CHAT, max_tokens=200, **fields)
    for choice in response.json()["choices"]:
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["reasoning"]
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMAS["enum"])
