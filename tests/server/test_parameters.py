"""Sampling parameters and reports of tokens, through OpenAI's SDK over a real server of the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from turboquant_server.api.chat_request import ChatCompletionRequest
from turboquant_server.api.completion_request import CompletionRequest
from turboquant_server.api.generation import make_prompt
from turboquant_server.engine.sampling_params import SamplingParams

DEMO = Path(__file__).parents[2] / "turboquant_server" / "demo"
USER = {"role": "user", "content": "What is the access code?"}
PROMPTS = ["The access code", "Der Hafen é"]


@pytest.fixture(scope="module")
def demo(running_server: Any) -> Iterator[OpenAI]:
    """OpenAI's SDK, talking to a server of the demo model."""
    with (
        running_server(DEMO, dtype="float32") as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=20) as sdk,
    ):
        yield sdk


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO)


def complete(sdk: OpenAI, prompt: Any = PROMPTS, **fields: Any) -> Completion:
    fields = {"model": "", "temperature": 0, "max_tokens": 10, **fields}
    sampling = {"extra_body": {"ignore_eos": True, **fields.pop("extra_body", {})}}
    del fields["model"]
    completion = sdk.completions.create(
        model=sdk.models.list().data[0].id, prompt=prompt, **fields, **sampling
    )
    assert isinstance(completion, Completion)
    return completion


def chat(sdk: OpenAI, **fields: Any) -> Any:
    fields = {"messages": [USER], "temperature": 0, "max_tokens": 10, **fields}
    return sdk.chat.completions.create(model=sdk.models.list().data[0].id, **fields)


def joined_chunks(sdk: OpenAI, prompt: Any = PROMPTS, **fields: Any) -> dict[int, dict[str, Any]]:
    """Return each choice of a streamed completion with its lists and texts joined."""
    extra = {"ignore_eos": True, **fields.pop("extra_body", {})}
    joined: dict[int, dict[str, Any]] = {}
    for chunk in sdk.completions.create(
        model=sdk.models.list().data[0].id,
        prompt=prompt,
        stream=True,
        extra_body=extra,
        **{"temperature": 0, "max_tokens": 10, **fields},
    ):
        for choice in chunk.choices:
            seen = joined.setdefault(choice.index, {"text": ""})
            told = choice.model_dump(exclude_none=True)
            for name, value in (told.pop("logprobs", {}) | told).items():
                is_one = name in ("index", "finish_reason") or name not in seen
                seen[name] = value if is_one else seen[name] + value
    return joined


def whole_choices(completion: Completion) -> dict[int, dict[str, Any]]:
    dumped = [choice.model_dump(exclude_none=True) for choice in completion.choices]
    return {choice["index"]: choice.pop("logprobs", {}) | choice for choice in dumped}


def test_every_field_reaches_the_sampler() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "frequency_penalty": -1.5,
        "presence_penalty": 1,
        "repetition_penalty": 1.25,
        "logit_bias": {"7": -100, "011": 3.5},
        "min_tokens": 4,
        "stop": "a",
        "stop_token_ids": [5, 6],
        "include_stop_str_in_output": True,
        "seed": 5,
        "n": 3,
        "prompt_logprobs": 4,
    }
    expected = SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        frequency_penalty=-1.5,
        presence_penalty=1.0,
        repetition_penalty=1.25,
        logit_bias=((7, -100.0), (11, 3.5)),
        min_tokens=4,
        stop=("a",),
        stop_token_ids=(5, 6),
        include_stop=True,
        seed=5,
        n=3,
        logprobs=2,
        prompt_logprobs=4,
    )
    plain = CompletionRequest.model_validate({"prompt": "a", "logprobs": 2, **fields})
    talk = ChatCompletionRequest.model_validate(
        {"messages": [USER], "logprobs": True, "top_logprobs": 2, **fields}
    )
    for body in (plain, talk):
        assert make_prompt(body, [1, 2], 9, 100, "prompt").sampling_params == expected


def test_a_chat_is_told_each_token_with_its_bytes_and_the_likeliest(demo: OpenAI) -> None:
    answer = chat(demo, logprobs=True, top_logprobs=3)
    assert isinstance(answer, ChatCompletion)
    [choice] = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    content = choice.logprobs.content
    assert answer.usage is not None and len(content) == answer.usage.completion_tokens
    spelled = b"".join(bytes(token.bytes or []) for token in content).decode()
    assert spelled.removesuffix("<|im_end|>") == choice.message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        # The likeliest was taken.
        first = token.top_logprobs[0]
        assert (first.token, first.logprob) == (token.token, token.logprob)
        assert token.token.encode() == bytes(token.bytes or [])
    deltas = [chunk.choices[0] for chunk in chat(demo, logprobs=True, top_logprobs=3, stream=True)]
    streamed = [token for delta in deltas if delta.logprobs for token in delta.logprobs.content or ()]
    assert streamed == content
    assert chat(demo, logprobs=False).choices[0].logprobs is None
    [silent] = chat(demo, logprobs=True).choices
    assert {len(token.top_logprobs) for token in silent.logprobs.content} == {0}


def test_a_completion_is_told_tokens_and_offsets_in_lists(demo: OpenAI) -> None:
    completion = complete(demo, n=2, logprobs=2)
    for choice in completion.choices:
        told = choice.logprobs
        assert told is not None and told.tokens and told.text_offset and told.top_logprobs
        text = "".join(told.tokens).replace(r"bytes:\xc3bytes:\xa9", "é")
        assert text == choice.text
        offsets = [*told.text_offset, len(text)]
        for token, start, end in zip(told.tokens, offsets, offsets[1:], strict=False):
            assert text[start:end] == ("é" if token == r"bytes:\xa9" else token.partition("bytes:")[0])
        for token, logprob, top in zip(
            told.tokens, told.token_logprobs or (), told.top_logprobs, strict=True
        ):
            assert len(top) == 2 and top[token] == logprob == max(top.values())
    assert joined_chunks(demo, n=2, logprobs=2) == whole_choices(completion)
    [one] = complete(demo, PROMPTS[0], logprobs=0, temperature=1, seed=1).choices
    assert one.logprobs is not None and one.logprobs.tokens is not None
    assert [list(top) for top in one.logprobs.top_logprobs or ()] == [
        [token] for token in one.logprobs.tokens
    ]


def test_parts_of_characters_are_told_as_bytes(client: OpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 80}
    answer = chat(client, logprobs=True, **fields).choices[0]
    spelled = [bytes(token.bytes) for token in answer.logprobs.content if token.token[:2] != "<|"]
    assert any(token.token == "\ufffd" for token in answer.logprobs.content)
    assert b"".join(spelled).decode(errors="replace").rstrip("\ufffd") == answer.message.content
    told = complete(client, "é", logprobs=5, **fields).choices[0].logprobs
    assert told is not None and told.tokens and told.text_offset
    assert any(token.startswith("bytes:\\x") for token in told.tokens)
    assert told.text_offset == sorted(told.text_offset)


def test_a_bias_a_penalty_and_min_p_do_what_they_say(
    demo: OpenAI, tokenizer: PreTrainedTokenizerFast
) -> None:
    [letter, other] = (tokenizer.encode(text, add_special_tokens=False)[0] for text in "kz")
    biased = {"logit_bias": {str(letter): 100, str(other): 98.5}, "max_tokens": 4}
    assert complete(demo, PROMPTS[0], **biased).choices[0].text == "kkkk"
    penalized = complete(demo, PROMPTS[0], frequency_penalty=2, **biased).choices[0].text
    assert set(penalized) == {"k", "z"}
    likeliest = complete(demo).choices[0].text
    assert complete(demo, temperature=2, extra_body={"min_p": 1}).choices[0].text == likeliest
    assert complete(demo, temperature=2).choices[0].text != likeliest


def test_stop_tokens_and_stop_texts_end_an_answer_with_or_without_them(
    demo: OpenAI, tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = complete(demo, PROMPTS[0], max_tokens=20, extra_body={"return_token_ids": True}).choices[0]
    token_ids = whole.token_ids  # type: ignore[attr-defined]
    place = next(index for index in range(3, 20) if token_ids[index] not in token_ids[:index])
    for with_it in (False, True):
        extra = {"stop_token_ids": [token_ids[place]], "include_stop_str_in_output": with_it}
        [choice] = complete(demo, PROMPTS[0], max_tokens=20, extra_body=extra).choices
        assert choice.text == tokenizer.decode(token_ids[: place + with_it])
        assert choice.finish_reason == "stop"
        stop = whole.text[5:7]
        extra = {"include_stop_str_in_output": with_it}
        [choice] = complete(demo, PROMPTS[0], max_tokens=20, stop=stop, extra_body=extra).choices
        assert choice.text == whole.text[: whole.text.index(stop) + 2 * with_it]
        late = {"min_tokens": 15, **extra}
        [choice] = complete(demo, PROMPTS[0], max_tokens=20, stop=stop, extra_body=late).choices
        assert choice.text.startswith(tokenizer.decode(token_ids[:15]))


def test_a_prompt_in_any_form_is_echoed(demo: OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = [choice.text for choice in complete(demo, n=2).choices]
    expected = [prompt + text for prompt, text in zip([p for p in PROMPTS for _ in "12"], plain, strict=True)]
    assert [choice.text for choice in complete(demo, n=2, echo=True).choices] == expected
    token_ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert [choice.text for choice in complete(demo, token_ids, n=2, echo=True).choices] == expected
    streamed = joined_chunks(demo, n=2, echo=True)
    assert [streamed[index]["text"] for index in range(4)] == expected


def test_token_ids_are_told_whole_and_streamed(demo: OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    asked: dict[str, Any] = {"extra_body": {"return_token_ids": True}}
    whole = whole_choices(complete(demo, n=2, **asked))
    for index, choice in whole.items():
        assert choice["prompt_token_ids"] == tokenizer.encode(PROMPTS[index // 2])
        assert len(choice["token_ids"]) == 10
        assert tokenizer.decode(choice["token_ids"]) == choice["text"]
    assert joined_chunks(demo, n=2, **asked) == whole
    answer = chat(demo, **asked)
    first, *chunks = chat(demo, stream=True, **asked)
    assert first.prompt_token_ids == answer.prompt_token_ids
    told = [getattr(chunk.choices[0], "token_ids", None) or [] for chunk in chunks]
    assert [token_id for token_ids in told for token_id in token_ids] == answer.choices[0].token_ids
    assert "token_ids" not in complete(demo).model_dump_json()


def test_usage_is_in_every_chunk_if_that_is_asked_for(demo: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    usage = chat(demo).usage
    chunks = list(chat(demo, stream=True, stream_options=options))
    assert chunks[-1].usage == usage and not chunks[-1].choices
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {usage.prompt_tokens}
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0
    last = list(chat(demo, stream=True, stream_options={**options, "include_usage": False}))[-1]
    assert last.usage is None


def test_an_answer_that_was_begun_goes_on(demo: OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    begun = [USER, {"role": "assistant", "content": "The access"}]
    text = f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\nThe access"
    extra = {"continue_final_message": True, "return_token_ids": True}
    for more in ({}, {"add_generation_prompt": False}):
        answer = chat(demo, messages=begun, extra_body={**extra, **more})
        assert answer.prompt_token_ids == tokenizer.encode(text, add_special_tokens=False)
    answer = chat(demo, extra_body={"add_generation_prompt": False, "return_token_ids": True})
    assert tokenizer.decode(answer.prompt_token_ids).endswith("<|im_end|>\n")
