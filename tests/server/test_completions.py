"""Plain completions: every form of a prompt, several at once, choices, and the endpoint's defaults."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Completion
from transformers import PreTrainedTokenizerFast

PROMPTS = ["The access code", "What is the harbour?", "é"]


def complete(client: OpenAI, prompt: Any, **fields: Any) -> Completion:
    completion = client.completions.create(
        **{"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12, **fields}
    )
    assert isinstance(completion, Completion)
    return completion


def texts_of(completion: Completion) -> list[str]:
    assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
    return [choice.text for choice in completion.choices]


def streamed_texts(client: OpenAI, prompt: Any, **fields: Any) -> list[str]:
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    stream = client.completions.create(
        **{"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 12, "stream": True, **fields}
    )
    for chunk in stream:
        for choice in chunk.choices:
            assert choice.index not in reasons, "text came after the end"
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert sorted(reasons) == sorted(texts)
    return [texts[index] for index in sorted(texts)]


def test_the_four_forms_of_a_prompt_give_the_same_texts(
    client: OpenAI, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    token_ids = [tiny_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    alone = [texts_of(complete(client, prompt))[0] for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    assert [texts_of(complete(client, ids))[0] for ids in token_ids] == alone
    assert texts_of(complete(client, PROMPTS)) == alone
    assert texts_of(complete(client, token_ids)) == alone


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1, "seed": 11}], ids=["greedy", "seeded"])
def test_streamed_and_whole_answers_are_the_same_texts(client: OpenAI, sampling: dict[str, Any]) -> None:
    whole = texts_of(complete(client, PROMPTS, **sampling))
    assert whole == texts_of(complete(client, PROMPTS, **sampling))
    assert whole == streamed_texts(client, PROMPTS, **sampling)
    assert whole[:1] == streamed_texts(client, PROMPTS[0], **sampling)


def test_an_answer_has_16_tokens_unless_said_otherwise(client: OpenAI) -> None:
    completion = client.completions.create(model="tiny", prompt="The", extra_body={"ignore_eos": True})
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16
    assert completion.choices[0].finish_reason == "length"


def test_usage_adds_up_over_all_prompts(client: OpenAI, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    usage = complete(client, PROMPTS, extra_body={"ignore_eos": True}).usage
    assert usage is not None
    assert usage.prompt_tokens == sum(len(tiny_tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    assert usage.completion_tokens == 12 * len(PROMPTS)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=PROMPTS,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert (chunks[-1].usage, chunks[-1].choices) == (usage, [])
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("n", [1, 3])
def test_every_prompt_has_n_choices_one_prompt_after_another(client: OpenAI, n: int) -> None:
    fields: dict[str, Any] = {"temperature": 1, "seed": 4, "n": n}
    alone = [text for prompt in PROMPTS for text in texts_of(complete(client, prompt, **fields))]
    assert len(set(alone)) == n * len(PROMPTS)
    assert texts_of(complete(client, PROMPTS, **fields)) == alone
    assert streamed_texts(client, PROMPTS, **fields) == alone


def test_usage_counts_each_prompt_once_and_all_choices(client: OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 3, "extra_body": {"ignore_eos": True}}
    one, four = (complete(client, PROMPTS, n=n, **fields).usage for n in (1, 4))
    assert one is not None and four is not None
    assert (four.prompt_tokens, four.completion_tokens) == (one.prompt_tokens, 4 * 3 * len(PROMPTS))
    assert four.total_tokens == four.prompt_tokens + four.completion_tokens


def test_usage_adds_up_what_was_found_of_each_prompt(client: OpenAI) -> None:
    prompts = [[9, 8, 7, 6] * 200, [5], [6, 7, 8, 9] * 300]
    first, second = (complete(client, prompts, max_tokens=1, n=2).usage for _ in range(2))
    for usage, found in ((first, 0), (second, 516 + 1028)):
        assert usage is not None and usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == found


def test_clients_beside_each_other_get_what_they_get_alone(client: OpenAI, server: Any) -> None:
    def ask(index: int) -> list[str]:
        # Among them prompts of several segments, some of them begun alike, and more answers than slots.
        prompt = [5, 6, 7] * (1 + 30 * (index % 5)) + [index + 10] * (1 + 37 * index % 800)
        fields = {
            "temperature": index % 3 / 2,
            "seed": index,
            "n": 1 + index % 3,
            "max_tokens": 6 + index // 2,
        }
        return texts_of(complete(client, prompt, **fields))

    alone = [ask(index) for index in range(20)]
    with ThreadPoolExecutor(20) as executor:
        together = list(executor.map(ask, range(20)))
    assert together == alone
    server.wait_until_idle()


def test_stop_strings_end_only_the_answers_that_have_them(client: OpenAI) -> None:
    plain = complete(client, PROMPTS, max_tokens=40)
    text = plain.choices[0].text
    stop = next(text[i : i + 3] for i in range(3, 30) if "\ufffd" not in text[i : i + 3])
    completion = complete(client, PROMPTS, max_tokens=40, stop=[stop])
    for before, after in zip(plain.choices, completion.choices, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.finish_reason == ("stop" if stop in before.text else before.finish_reason)
    assert streamed_texts(client, PROMPTS, max_tokens=40, stop=[stop]) == texts_of(completion)


def test_a_limit_above_the_room_is_cut_to_it(client: OpenAI) -> None:
    completion = complete(client, [5] * 2040, max_tokens=1000, extra_body={"ignore_eos": True})
    assert completion.usage is not None
    assert (completion.usage.completion_tokens, completion.usage.total_tokens) == (8, 2048)


def test_one_prompt_that_is_too_long_refuses_the_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048 tokens") as caught:
        complete(client, [[5], [5] * 2048])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt[1]")


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([[]], "prompt[0]"),
        (["a", ""], "prompt[1]"),
        ([1, "a"], "prompt[1]"),
        (["a", 1], "prompt[1]"),
        ([[1], ["a"]], "prompt[1][0]"),
        ([[1], 2], "prompt[1]"),
        ([True], "prompt[0]"),
        ([1.5], "prompt[0]"),
        ([-1], "prompt"),
        ([[5], [10**9]], "prompt[1]"),
        ([10**30], "prompt"),
        ({"text": "a"}, "prompt"),
        (3, "prompt"),
        (None, "prompt"),
    ],
    ids=str,
)
def test_a_malformed_prompt_is_refused_where_it_is_wrong(
    http: httpx.Client, prompt: object, param: str
) -> None:
    response = http.post("/v1/completions", json={"prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_response_has_exactly_the_shape_of_the_sdk(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": PROMPTS, "max_tokens": 3})
    completion = Completion.model_validate_json(response.content, strict=True)
    assert not completion.model_extra and not completion.choices[0].model_extra
    assert completion.id.startswith("cmpl-")
    assert completion.model == "tiny"
