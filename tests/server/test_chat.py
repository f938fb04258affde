"""Chat completions as OpenAI's SDK sees them: text, sampling, stop conditions, choices, usage, shapes.

More than 300 lines: an endpoint has many fields.
"""

from __future__ import annotations

import re
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from transformers import PreTrainedTokenizerFast

MESSAGES: Any = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is the access code?"},
]
MAX_MODEL_LEN = 2048


def ask(client: OpenAI, **fields: Any) -> ChatCompletion:
    completion = client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **fields})
    assert isinstance(completion, ChatCompletion)
    return completion


def ask_for_stream(client: OpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    return list(
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "stream": True, **fields})
    )


def text_of(completion: ChatCompletion) -> str:
    content = completion.choices[0].message.content
    assert content is not None
    return content


def streamed_text(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def greedy_word(client: OpenAI) -> tuple[str, str]:
    """Return the greedy answer of 60 tokens and a plain word inside it."""
    text = text_of(ask(client, temperature=0, max_tokens=60))
    words = re.findall(r"(?<=.)[A-Za-z]{2,}", text)
    assert words, text
    return text, words[len(words) // 2]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 7}, {"seed": 7, "top_p": 0.5}], ids=str)
def test_streamed_and_whole_answers_are_the_same_text(client: OpenAI, sampling: dict[str, Any]) -> None:
    whole = ask(client, max_tokens=40, **sampling)
    again = ask(client, max_tokens=40, **sampling)
    chunks = ask_for_stream(client, max_tokens=40, **sampling)
    assert len(text_of(whole)) > 10
    assert text_of(whole) == text_of(again) == streamed_text(chunks)
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason


def test_the_temperature_seed_and_top_k_count(client: OpenAI) -> None:
    greedy = text_of(ask(client, temperature=0, max_tokens=30))
    texts = {text_of(ask(client, seed=seed, max_tokens=30)) for seed in range(3)}
    assert len(texts | {greedy}) == 4
    assert text_of(ask(client, seed=1, max_tokens=30, extra_body={"top_k": 1})) == greedy
    assert text_of(ask(client, seed=1, max_tokens=30, top_p=1e-6)) == greedy


def test_the_prompt_is_the_models_own_chat_format(
    client: OpenAI, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = ask(client, temperature=0, max_tokens=20)
    prompt = (
        "<|im_start|>system\nAnswer in one word.<|im_end|>\n"
        "<|im_start|>user\nWhat is the access code?<|im_end|>\n<|im_start|>assistant\n"
    )
    completion = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=20)
    assert text_of(chat) == completion.choices[0].text
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(tiny_tokenizer(prompt)["input_ids"])


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "What is\nthe access code?"}],
        [{"type": "text", "text": "What is"}, {"type": "text", "text": "the access code?"}],
    ],
    ids=["one part", "two parts"],
)
def test_text_parts_are_read_as_lines(client: OpenAI, content: list[dict[str, str]]) -> None:
    joined = ask(client, temperature=0, max_tokens=10, messages=[{"role": "user", "content": content}])
    plain = [{"role": "user", "content": "What is\nthe access code?"}]
    assert text_of(joined) == text_of(ask(client, temperature=0, max_tokens=10, messages=plain))


def test_developer_means_system(client: OpenAI) -> None:
    messages = [{**MESSAGES[0], "role": "developer"}, MESSAGES[1]]
    developer = ask(client, temperature=0, max_tokens=10, messages=messages)
    assert text_of(developer) == text_of(ask(client, temperature=0, max_tokens=10))


@pytest.mark.parametrize(
    ("template", "words", "param"),
    [
        (None, "no chat template; use /v1/completions", None),
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate", "messages"),
        ("{{ messages[9].content }}", "does not take these messages", "messages"),
    ],
    ids=["none", "refuses", "fails"],
)
def test_a_template_that_does_not_take_the_messages_is_told(
    client: OpenAI,
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    words: str,
    param: str | None,
) -> None:
    monkeypatch.setattr(server.model_manager.tokenizer, "chat_template", template)
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        ask(client)
    assert caught.value.param == param


@pytest.mark.parametrize("as_list", [False, True], ids=["string", "list"])
def test_a_stop_string_ends_the_answer_before_it(client: OpenAI, as_list: bool) -> None:
    text, word = greedy_word(client)
    stop = ["never in the answer", word] if as_list else word
    whole = ask(client, temperature=0, max_tokens=60, stop=stop)
    chunks = ask_for_stream(client, temperature=0, max_tokens=60, stop=stop)
    assert text_of(whole) == streamed_text(chunks) == text[: text.index(word)]
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"


def test_an_end_of_turn_token_stops_unless_it_is_ignored(client: OpenAI) -> None:
    stopped = ask(client, temperature=2, seed=3)
    limit = stopped.usage.completion_tokens + 5 if stopped.usage else 0
    ignored = ask(client, temperature=2, seed=3, extra_body={"ignore_eos": True}, max_tokens=limit)
    assert stopped.usage is not None and ignored.usage is not None
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.total_tokens < MAX_MODEL_LEN
    assert text_of(ignored).startswith(text_of(stopped))
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", limit)


@pytest.mark.parametrize(
    "limits",
    [{"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 9, "max_completion_tokens": 5}],
    ids=str,
)
def test_the_token_limit_ends_the_answer(client: OpenAI, limits: dict[str, int]) -> None:
    completion = ask(client, temperature=0, **limits)
    assert completion.usage is not None
    assert (completion.choices[0].finish_reason, completion.usage.completion_tokens) == ("length", 5)


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 10**6}], ids=["no limit", "too high a limit"])
def test_an_answer_may_take_the_room_that_the_prompt_leaves(client: OpenAI, limits: dict[str, int]) -> None:
    messages = [{"role": "user", "content": "x" * 2000}]
    completion = ask(client, messages=messages, temperature=0, extra_body={"ignore_eos": True}, **limits)
    assert completion.usage is not None
    assert completion.usage.total_tokens == MAX_MODEL_LEN
    assert completion.usage.completion_tokens < 50
    assert completion.choices[0].finish_reason == "length"


def test_a_prompt_that_leaves_no_room_is_refused(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "x" * 2048}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048 tokens") as caught:
        ask(client, messages=messages)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_usage_adds_up_and_is_the_same_in_a_stream(client: OpenAI) -> None:
    usage = ask(client, temperature=0, max_tokens=12).usage
    assert usage is not None
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    chunks = ask_for_stream(client, temperature=0, max_tokens=12, stream_options={"include_usage": True})
    assert chunks[-1].usage == usage
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])


def texts_by_choice(chunks: list[ChatCompletionChunk]) -> dict[int, str]:
    """Join each choice's text; check that it begins with a role and ends once."""
    texts: dict[int, str] = {}
    ended: set[int] = set()
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        assert choice.index not in ended, "something came after the end"
        assert (choice.delta.role == "assistant") == (choice.index not in texts)
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        if choice.finish_reason is not None:
            ended.add(choice.index)
    assert ended == set(texts)
    return texts


@pytest.mark.parametrize("n", [1, 2, 5])
def test_n_choices_are_drawn_apart_and_the_same_each_time(client: OpenAI, n: int) -> None:
    fields: dict[str, Any] = {"n": n, "seed": 5, "max_tokens": 20}
    whole = ask(client, **fields)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == list(range(n))
    assert len(set(texts)) == n
    assert texts[0] == text_of(ask(client, seed=5, max_tokens=20))
    assert texts == [choice.message.content for choice in ask(client, **fields).choices]
    assert texts_by_choice(ask_for_stream(client, **fields)) == dict(enumerate(texts))


def test_choices_without_a_seed_differ(client: OpenAI) -> None:
    texts = {choice.message.content for _ in range(2) for choice in ask(client, n=3, max_tokens=20).choices}
    assert len(texts) == 6


def test_greedy_choices_are_one_text(client: OpenAI) -> None:
    greedy = text_of(ask(client, temperature=0, max_tokens=20))
    choices = ask(client, temperature=0, max_tokens=20, n=3).choices
    assert [choice.message.content for choice in choices] == [greedy] * 3


def test_usage_counts_the_prompt_once_and_every_choice(client: OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 7, "extra_body": {"ignore_eos": True}}
    one, four = ask(client, **fields).usage, ask(client, n=4, **fields).usage
    assert one is not None and four is not None
    assert four.prompt_tokens == one.prompt_tokens
    assert four.completion_tokens == 4 * 7
    assert four.total_tokens == four.prompt_tokens + four.completion_tokens
    chunks = ask_for_stream(client, n=4, stream_options={"include_usage": True}, **fields)
    assert chunks[-1].usage == four


def test_more_choices_than_run_at_a_time_are_all_answered(client: OpenAI, server: Any) -> None:
    assert server.model_manager._cache_size.num_slots < 128
    choices = ask(client, n=128, seed=1, max_tokens=4, extra_body={"ignore_eos": True}).choices
    assert [choice.index for choice in choices] == list(range(128))
    assert len({choice.message.content for choice in choices}) > 100
    few = ask(client, n=3, seed=1, max_tokens=4, extra_body={"ignore_eos": True}).choices
    assert [choice.message for choice in few] == [choice.message for choice in choices[:3]]
    server.wait_until_idle()


def cached_tokens(usage: CompletionUsage | None) -> tuple[int, int]:
    """Return the tokens of the prompt and those of them that were found in the cache."""
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens is not None
    return usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("length", [30, 700, 1300, 1900])
def test_usage_tells_how_much_of_a_prompt_was_found_in_the_cache(client: OpenAI, length: int) -> None:
    messages = [{"role": "user", "content": f"{length} " + "xyz" * (length // 3)}]
    fields: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 8}
    first, second = ask(client, **fields), ask(client, **fields)
    *chunks, last = ask_for_stream(client, stream_options={"include_usage": True}, **fields)
    num_tokens, none = cached_tokens(first.usage)
    # The first 4 and whole segments of 512; the newest 128 are computed in any case.
    segments = max(0, num_tokens - 128 - 4) // 512
    found = 4 + 512 * segments if segments else 0
    assert none == 0
    assert cached_tokens(second.usage) == cached_tokens(last.usage) == (num_tokens, found)
    assert text_of(first) == text_of(second) == streamed_text(chunks)


def test_only_requests_of_one_salt_share_what_is_cached(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "salt" * 250}]
    texts = set()
    for salt, found in [("a", 0), ("b", 0), (None, 0), ("a", 516), ("b", 516), (None, 516), ("c", 0)]:
        extra = {} if salt is None else {"cache_salt": salt}
        completion = ask(client, messages=messages, temperature=0, max_tokens=8, extra_body=extra)
        assert cached_tokens(completion.usage)[1] == found, salt
        texts.add(text_of(completion))
    assert len(texts) == 1


def test_what_a_conversation_began_with_is_found_again(client: OpenAI) -> None:
    turn = {"role": "user", "content": "turn" * 350}
    first = ask(client, messages=[turn], temperature=0, max_tokens=8)
    more = [turn, {"role": "assistant", "content": text_of(first)}, {"role": "user", "content": "And then?"}]
    found = cached_tokens(ask(client, messages=more, max_tokens=1).usage)[1]
    assert found == 4 + 512 * ((cached_tokens(first.usage)[0] - 132) // 512) > 4


def test_a_response_names_the_model_that_was_asked_for(client: OpenAI, http: httpx.Client) -> None:
    assert ask(client, model="alias", max_tokens=1).model == "alias"
    body = {"messages": MESSAGES, "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=body).json()["model"] == "tiny"


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist") as caught:
        ask(client, model="gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_response_has_exactly_the_shape_of_the_sdk(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 3})
    completion = ChatCompletion.model_validate_json(response.content, strict=True)
    assert not completion.model_extra and not completion.choices[0].model_extra
    assert not completion.choices[0].message.model_extra
    assert completion.id.startswith("chatcmpl-")
    assert completion.choices[0].message.role == "assistant"
    other = http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 3}).json()
    assert other["id"] != completion.id
