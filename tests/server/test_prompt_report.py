"""What a request is told of its prompt, and how fast it was, through OpenAI's SDK over a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from turboquant_server.api.completion_request import CompletionRequest
from turboquant_server.api.spelling import Spelling
from turboquant_server.api.token_report import CompletionTokenReport
from turboquant_server.engine.logprobs import TokenLogprobs

DEMO = Path(__file__).parents[2] / "turboquant_server" / "demo"
USER = {"role": "user", "content": "What is the access code?"}
PROMPTS = ["The access code of the harbour", "Der Hafen é"]


@pytest.fixture(scope="module")
def demo(running_server: Any) -> Iterator[OpenAI]:
    """OpenAI's SDK, talking to a server of the demo model."""
    with (
        running_server(DEMO, dtype="float32", served_model_name=("demo",)) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=20) as sdk,
    ):
        yield sdk


@pytest.fixture(scope="module")
def small(running_server: Any, tiny_model_dir: Path) -> Iterator[OpenAI]:
    """The same with the tiny model, which reads long prompts in several steps."""
    with (
        running_server(
            tiny_model_dir, dtype="float32", served_model_name=("demo",), max_num_batched_tokens=1024
        ) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=20) as sdk,
    ):
        yield sdk


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


def reference(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of all tokens at each place but the first."""
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0, :-1]
    return torch.log_softmax(logits.double(), dim=-1)


def complete(sdk: OpenAI, prompt: Any = PROMPTS, **fields: Any) -> Any:
    extra = {"ignore_eos": True, **fields.pop("extra", {})}
    fields = {"temperature": 0, "max_tokens": 6, **fields}
    return sdk.completions.create(model="demo", prompt=prompt, extra_body=extra, **fields)


def check(
    told: Any, token_ids: Sequence[int], model: Any, tokenizer: PreTrainedTokenizerFast, num_top: int
) -> None:
    assert len(told) == len(token_ids) and told[0] is None
    for token_id, row, entry in zip(token_ids[1:], reference(model, token_ids), told[1:], strict=True):
        values, top = row.topk(num_top)
        assert entry.keys() == {str(token_id), *map(str, top.tolist())}
        own = entry[str(token_id)]
        assert own["rank"] == 1 + int((row > row[token_id]).sum())
        assert own["logprob"] == pytest.approx(float(row[token_id]), abs=1e-4)
        for rank, (other, value) in enumerate(zip(top.tolist(), values.tolist(), strict=True), 1):
            assert entry[str(other)]["rank"] == rank
            assert entry[str(other)]["logprob"] == pytest.approx(value, abs=1e-4)
            assert entry[str(other)]["decoded_token"] == tokenizer.decode([other])


@pytest.mark.parametrize("num_top", [0, 5])
def test_each_choice_of_a_completion_has_its_prompts_log_probabilities(
    demo: OpenAI, model: Any, tokenizer: PreTrainedTokenizerFast, num_top: int
) -> None:
    completion = complete(demo, n=2, extra={"prompt_logprobs": num_top})
    assert completion.usage.prompt_tokens_details.cached_tokens == 0
    for choice in completion.choices:
        token_ids = tokenizer.encode(PROMPTS[choice.index // 2])
        check(choice.prompt_logprobs, token_ids, model, tokenizer, num_top)
    texts = [choice.text for choice in completion.choices]
    silent = complete(demo, n=2)
    assert [choice.text for choice in silent.choices] == texts
    assert "prompt_logprobs" not in silent.model_dump_json()


def test_a_chat_has_them_beside_its_choices(
    demo: OpenAI, model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    answer: Any = demo.chat.completions.create(
        model="demo",
        messages=[USER],  # type: ignore[list-item]
        max_tokens=3,
        n=2,
        extra_body={"prompt_logprobs": 3, "return_token_ids": True},
    )
    assert len(answer.choices) == 2
    check(answer.prompt_logprobs, answer.prompt_token_ids, model, tokenizer, 3)


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_an_echo_tells_the_log_probabilities_of_prompt_and_answer_in_one_list(
    demo: OpenAI, model: Any, tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> None:
    fields = {"n": 2, "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    completion = complete(demo, extra={"return_token_ids": True}, **fields)
    assert completion.usage.completion_tokens == 4 * max_tokens
    for choice in completion.choices:
        prompt_ids = tokenizer.encode(PROMPTS[choice.index // 2])
        token_ids = prompt_ids + (getattr(choice, "token_ids", None) or [])
        told, expected = choice.logprobs, reference(model, token_ids)
        assert len(token_ids) == len(prompt_ids) + max_tokens == len(told.tokens)
        assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
        assert choice.finish_reason == "length"
        for token_id, row, logprob, top in zip(
            token_ids[1:], expected, told.token_logprobs[1:], told.top_logprobs[1:], strict=True
        ):
            assert logprob == pytest.approx(float(row[token_id]), abs=1e-4)
            assert sorted(top.values())[-2:] == pytest.approx(row.topk(2).values.tolist()[::-1], abs=1e-4)
        offsets = [*told.text_offset, len(choice.text)]
        assert choice.text.startswith(PROMPTS[choice.index // 2])
        for token, start, end in zip(told.tokens, offsets, offsets[1:], strict=False):
            assert choice.text[start:end] == ("é" if token == r"bytes:\xa9" else token.partition("bytes:")[0])
    by_ids = complete(demo, [tokenizer.encode(prompt) for prompt in PROMPTS], **fields)
    assert [choice.logprobs for choice in by_ids.choices] == [
        choice.logprobs for choice in completion.choices
    ]
    assert streamed(demo, **fields) == {
        choice.index: (choice.text, choice.logprobs.model_dump()) for choice in completion.choices
    }


def streamed(sdk: OpenAI, **fields: Any) -> dict[int, Any]:
    """Return the text of each streamed choice and its log-probabilities, joined."""
    texts: dict[int, str] = {}
    joined: dict[int, dict[str, list[Any]]] = {}
    for chunk in complete(sdk, stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            for name, items in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                joined.setdefault(choice.index, {}).setdefault(name, []).extend(items)
    return {index: (texts[index], joined[index]) for index in sorted(texts)}


def test_how_likely_a_given_answer_is_can_be_asked(
    demo: OpenAI, model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As lm-eval-harness does: a context and its continuation as tokens, whose last is thrown away."""
    context, answer = (
        tokenizer.encode(text, add_special_tokens=False) for text in ("The access", " code is")
    )
    [choice] = complete(demo, [context + answer], echo=True, logprobs=1, max_tokens=1).choices
    rows = reference(model, context + answer)[len(context) - 1 :]
    expected = sum(float(row[token_id]) for token_id, row in zip(answer, rows, strict=True))
    assert sum(choice.logprobs.token_logprobs[len(context) : -1]) == pytest.approx(expected, abs=1e-3)
    is_greedy = [
        token == max(top, key=top.get)
        for token, top in zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True)
        if top
    ][len(context) - 1 : -1]
    assert is_greedy == [token_id == int(row.argmax()) for token_id, row in zip(answer, rows, strict=True)]


def test_an_echo_and_prompt_logprobs_each_have_the_likeliest_that_they_ask_for(demo: OpenAI) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": 1}
    [choice] = complete(demo, "The access", extra={"prompt_logprobs": 4}, **fields).choices
    assert {len(entry) for entry in choice.prompt_logprobs[1:]} <= {4, 5}
    assert {len(top) for top in choice.logprobs.top_logprobs[1:]} <= {1, 2}
    assert choice.logprobs == complete(demo, "The access", **fields).choices[0].logprobs


def test_offsets_are_in_the_text_as_it_was_given() -> None:
    """A tokenizer may add a token, and a space before the first word; special tokens may be typed."""
    spellings = {
        1: Spelling(b"<s>", True),
        2: Spelling(b" The", False),
        3: Spelling(b" code", False),
        4: Spelling(b"<|end|>", True),
        5: Spelling(b" is", False),
    }

    async def spell(token_ids: object) -> dict[int, Spelling]:
        return spellings

    report = CompletionTokenReport(
        CompletionRequest(prompt="", logprobs=0),
        SimpleNamespace(spell=spell),  # type: ignore[arg-type]
    )
    token = TokenLogprobs(-1.0, (), 1)
    prompt = report.take_prompt("The code<|end|>", [1, 2, 3, 4], [None, token, token, token], 0)
    assert asyncio.run(prompt).text_offset == [0, 0, 3, 8]
    answer: Any = SimpleNamespace(take_tokens=lambda: ([5, 5], [token, token]))
    assert asyncio.run(report.take(answer))["logprobs"].text_offset == [15, 18]


def check_timings(timings: dict[str, float], prompt_n: int, cache_n: int, predicted_n: int) -> None:
    assert len(timings) == 9
    assert [timings[name] for name in ("prompt_n", "cache_n", "predicted_n")] == [
        prompt_n,
        cache_n,
        predicted_n,
    ]
    for kind in ("prompt", "predicted"):
        count, milliseconds = timings[f"{kind}_n"], timings[f"{kind}_ms"]
        assert 0 <= milliseconds < 20_000
        if milliseconds and count:
            assert timings[f"{kind}_per_token_ms"] == pytest.approx(milliseconds / count)
            assert timings[f"{kind}_per_second"] == pytest.approx(1000 * count / milliseconds)


def test_timings_are_told_whole_and_with_each_chunk(small: OpenAI) -> None:
    prompt = [5 + index % 100 for index in range(1500)]
    asked: dict[str, Any] = {"extra": {"timings_per_token": True}}
    check_timings(complete(small, prompt, n=2, **asked).timings, 1500, 0, 12)
    chunks = [chunk.timings for chunk in complete(small, prompt, stream=True, **asked)]
    check_timings(chunks[-1], 1500 - 1028, 1028, 6)
    assert [chunk["predicted_n"] for chunk in chunks] == sorted(chunk["predicted_n"] for chunk in chunks)
    assert len({chunk["prompt_ms"] for chunk in chunks}) == 1
    answer: Any = small.chat.completions.create(
        model="demo",
        messages=[USER],  # type: ignore[list-item]
        max_tokens=3,
        extra_body={**asked["extra"], "ignore_eos": True},
    )
    check_timings(answer.timings, answer.usage.prompt_tokens, 0, 3)
    assert "timings" not in complete(small).model_dump_json()


def test_a_stream_can_tell_how_far_the_prompt_has_been_read(small: OpenAI) -> None:
    text = "The harbour. " * 300
    asked: dict[str, Any] = {"extra_body": {"return_progress": True, "ignore_eos": True}, "stream": True}

    def chat() -> Any:
        return small.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": text}], max_tokens=3, **asked
        )

    def complete_it() -> Any:
        return small.completions.create(model="demo", prompt=text, max_tokens=3, echo=True, **asked)

    for ask in (chat, complete_it):
        told, num_others = [], 0
        for chunk in ask():
            progress = getattr(chunk, "prompt_progress", None)
            if progress is None:
                num_others += any(getattr(choice, "text", None) for choice in chunk.choices)
                continue
            assert num_others == 0, "the answer comes after its prompt"
            told.append(progress)
        assert len(told) == 2  # steps
        assert [progress["processed"] for progress in told] == sorted(p["processed"] for p in told)
        assert told[0]["cache"] == 0 and told[-1]["processed"] == told[-1]["total"] > 1024
        assert 0 <= told[0]["time_ms"] <= told[1]["time_ms"] < 20_000
    silent = small.completions.create(model="demo", prompt=text, max_tokens=3, stream=True)
    assert not any(hasattr(chunk, "prompt_progress") for chunk in silent)
    # Nothing to tell without a stream.
    complete(small, "a", extra={"return_progress": True})
