"""/tokenize gives the tokens that a completion would compute, and /detokenize the text that they were."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI
from transformers import PreTrainedTokenizerFast

MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is the access code?"}]},
]
TEXTS = ["Be brief.", "What is the access code?"]


def tokenize(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post("/tokenize", json=fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    assert list(body) == ["count", "max_model_len", "tokens", "token_strs"]
    assert body["count"] == len(body["tokens"])
    assert body["max_model_len"] == 2048
    return body


@pytest.mark.parametrize("text", ["", "The access code", "emoji 🙂 und Umlaute äöü", "<|im_start|>user\n"])
def test_a_text_has_the_tokenizers_tokens(
    http: httpx.Client, tiny_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    expected = tiny_tokenizer(text)["input_ids"]
    body = tokenize(http, model="alias", prompt=text, return_token_strs=True)
    assert body["tokens"] == expected
    assert body["token_strs"] == tiny_tokenizer.convert_ids_to_tokens(expected)
    assert tokenize(http, prompt=text)["token_strs"] is None


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_conversation_has_the_templates_tokens(
    http: httpx.Client, tiny_tokenizer: PreTrainedTokenizerFast, add_generation_prompt: bool
) -> None:
    plain = [{"role": role, "content": text} for role, text in zip(("system", "user"), TEXTS, strict=True)]
    expected = tiny_tokenizer.apply_chat_template(
        plain, add_generation_prompt=add_generation_prompt, return_dict=True
    )["input_ids"]
    body = tokenize(http, messages=MESSAGES, add_generation_prompt=add_generation_prompt)
    assert body["tokens"] == expected
    if add_generation_prompt:
        assert tokenize(http, messages=MESSAGES) == body


def test_the_count_is_that_of_the_usage(http: httpx.Client, client: OpenAI) -> None:
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)
    text = client.completions.create(model="tiny", prompt="The code", max_tokens=1)
    assert chat.usage is not None and text.usage is not None
    assert tokenize(http, messages=MESSAGES)["count"] == chat.usage.prompt_tokens
    assert tokenize(http, prompt="The code")["count"] == text.usage.prompt_tokens


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_every_text_comes_back(http: httpx.Client, text: str) -> None:
    response = http.post("/detokenize", json={"tokens": tokenize(http, prompt=text)["tokens"]})
    assert response.json() == {"prompt": text}


def test_special_tokens_have_their_text(http: httpx.Client) -> None:
    assert http.post("/detokenize", json={"tokens": [1, 2]}).json() == {"prompt": "<|im_start|><|im_end|>"}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "Give either 'prompt' or 'messages'"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt", "Give either"),
        ("/tokenize", {"prompt": 3}, "prompt", "valid string"),
        ("/tokenize", {"messages": []}, "messages", "at least 1 item"),
        ("/tokenize", {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "robot"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs", "boolean"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template", "not support"),
        ("/tokenize", {"messages": MESSAGES, "tools": [{}]}, "tools", "not support"),
        ("/detokenize", {}, "tokens", "Missing required parameter"),
        ("/detokenize", {"tokens": "a"}, "tokens", "list"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens[1]", "integer"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "token -1 is not in the vocabulary of 300"),
        ("/detokenize", {"tokens": [1, 300]}, "tokens", "token 300 is not"),
        ("/detokenize", {"tokens": [10**30]}, "tokens", "token"),
    ],
)
def test_a_wrong_body_is_refused_by_its_field(
    http: httpx.Client, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"] or words == "robot"


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_an_unknown_model_is_not_found(http: httpx.Client, path: str) -> None:
    response = http.post(path, json={"model": "other", "prompt": "a", "tokens": [1]})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_no_tokens_have_no_text(http: httpx.Client) -> None:
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
