"""A prompt's log-probabilities are those of a plain forward, wherever it is cut and whatever is beside it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from engine_bench import Bench, greedy, tokens_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from turboquant_core import Timeline
from turboquant_server.attention_check import find_attention
from turboquant_server.engine import compiled_forward, prompt_scorer
from turboquant_server.engine.compiled_forward import compile_forward
from turboquant_server.engine.logprobs import TokenLogprobs
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.request import RequestFailedError, RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams

SHORT = [5, 6, 7, 8, 9]
LONG = [3 + 7 * index % 290 for index in range(1500)]  # three chunks


def ask(num_top: int, **options: Any) -> SamplingParams:
    fields: dict[str, Any] = {"max_tokens": 2, "temperature": 0, "ignore_eos": True, **options}
    return SamplingParams(prompt_logprobs=num_top, **fields)


def told(outputs: Sequence[object]) -> tuple[TokenLogprobs | None, ...]:
    """Return what a request was told of its prompt, once and with its first token."""
    assert all(isinstance(output, RequestOutput) for output in outputs)
    parts = [output.prompt_logprobs for output in outputs if isinstance(output, RequestOutput)]
    assert parts[0] and not any(parts[1:])
    return parts[0]


def check(model: Any, prompt: list[int], got: Sequence[TokenLogprobs | None], num_top: int) -> None:
    """Compare with a plain forward, in float64 from the logits on; ranks by counting."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0].double().numpy()
    scores = logits - logits.max(axis=1, keepdims=True)
    expected = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    assert len(got) == len(prompt) and got[0] is None
    for token_id, row, token in zip(prompt[1:], expected, got[1:], strict=False):
        assert token is not None
        assert token.logprob == pytest.approx(row[token_id], abs=2e-4)
        # Other numbers of tokens in a forward change the last bits, and so the order of near equals.
        assert np.sum(row > row[token_id] + 4e-4) < token.rank <= 1 + np.sum(row >= row[token_id] - 4e-4)
        assert [logprob for _, logprob in token.top] == pytest.approx(np.sort(row)[::-1][:num_top], abs=2e-4)
        for other, logprob in token.top:
            assert logprob == pytest.approx(row[other], abs=2e-4)


@pytest.fixture(params=[False, True], ids=["one by one", "overlapped"])
def bench(
    request: pytest.FixtureRequest, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Bench:
    return Bench(
        tiny_model, tiny_tokenizer, bits=None, overlaps_steps=request.param, max_num_batched_tokens=1024
    )


@pytest.mark.parametrize("rows_at_a_time", [10_000, 100, 1])
def test_they_are_those_of_a_plain_forward_in_slices_of_any_size(
    bench: Bench, tiny_model: PreTrainedModel, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_scorer, "MAX_ELEMENTS", 300 * rows_at_a_time)
    sizes: list[int] = []
    bench.model.spoil = lambda input_ids, logits: sizes.append(logits.shape[0] * logits.shape[1])
    lengths = (1, 2, 5, 300, 1500) if rows_at_a_time > 1 else (1, 2, 5)
    for length in lengths:
        bench.engine.add_request(str(length), LONG[:length], ask(length % 7))
    outputs = bench.run()
    for length in lengths:
        check(tiny_model, LONG[:length], told(outputs[str(length)]), length % 7)
    assert max(sizes) <= max(rows_at_a_time, len(lengths))


def test_requests_beside_it_get_what_they_get_alone(bench: Bench, tiny_model: PreTrainedModel) -> None:
    plain = greedy(6, ignore_eos=True)
    others = {"a": LONG[100:400], "b": LONG[:50], "c": SHORT}
    alone = {}
    for name, prompt in others.items():
        bench.engine.add_request(name, prompt, plain)
        alone[name] = tokens_of(bench.run()[name])
    bench.model.shapes.clear()
    bench.engine.add_request("a", others["a"], plain)
    bench.engine.add_request("asking", LONG, ask(3, max_tokens=6))
    bench.engine.add_request("b", others["b"], plain)
    bench.engine.add_request("asking too", SHORT, ask(0, max_tokens=6))
    bench.engine.add_request("c", others["c"], plain)
    outputs = bench.run()
    for name, tokens in alone.items():
        assert tokens_of(outputs[name]) == tokens
        assert not any(output.prompt_logprobs for output in outputs[name])  # type: ignore[union-attr]
    check(tiny_model, LONG, told(outputs["asking"]), 3)
    check(tiny_model, SHORT, told(outputs["asking too"]), 0)


def test_nothing_is_found_in_the_cache_and_all_is_told(bench: Bench, tiny_model: PreTrainedModel) -> None:
    for params in (greedy(1), ask(1), ask(1)):
        outputs = bench.generate(LONG, params)
        assert outputs[0].num_cached_tokens == 0
    check(tiny_model, LONG, told(outputs), 1)
    # It leaves those alone that do find something.
    assert bench.generate(LONG, greedy(1))[0].num_cached_tokens == 1028


def test_choices_share_one_reading_of_the_prompt(bench: Bench, tiny_model: PreTrainedModel) -> None:
    outputs = bench.generate(LONG[:700], ask(2, n=3, temperature=1, seed=2))
    assert sum(length for rows, length in bench.model.shapes if rows == 1) == 700 + 699  # and their logits
    check(tiny_model, LONG[:700], told(outputs), 2)
    assert outputs[0].choice_index == 0
    assert [len(tokens_of(outputs, index)) for index in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_request_that_gives_its_cache_back_is_told_the_same(
    bench: Bench, tiny_model: PreTrainedModel, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_room, calls = bench.scheduler._make_room, itertools.count()

    def make_none(request: Any, num_tokens: int) -> bool:
        if request.request_id == "old" or next(calls) != num_steps:
            return make_room(request, num_tokens)
        bench.scheduler._preempt(request)
        return False

    monkeypatch.setattr(bench.scheduler, "_make_room", make_none)
    bench.engine.add_request("old", SHORT, greedy(9, ignore_eos=True))
    bench.engine.add_request("r", LONG, ask(2, max_tokens=4))
    outputs = bench.run()["r"]
    assert (len(outputs), bench.scheduler.num_preemptions) == (4, 1)
    check(tiny_model, LONG, told(outputs), 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_fail_their_request_alone(bench: Bench, bad: float) -> None:
    expected = tokens_of(bench.generate(SHORT, greedy(4)))

    def spoil(input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        if logits.shape[1] > 200:  # of the long prompt's own tokens, not of the last
            logits[0, 7, 3] = bad

    bench.model.spoil = spoil
    bench.engine.add_request("good", SHORT, greedy(4))
    bench.engine.add_request("bad", LONG[:300], ask(1))
    outputs = bench.run()
    assert tokens_of(outputs["good"]) == expected
    [failure] = outputs["bad"]
    assert isinstance(failure, RequestFailedError) and "not a number" in str(failure)


def test_a_failure_is_that_of_one_request_and_the_other_is_told_all(
    bench: Bench, tiny_model: PreTrainedModel
) -> None:
    def fail(position_ids: torch.Tensor) -> None:
        if 699 in position_ids and bench.model.shapes[-1] != (1, 599):
            raise torch.OutOfMemoryError

    bench.model.fail = fail
    bench.engine.add_request("good", LONG[:300], ask(1))
    bench.engine.add_request("bad", LONG[:700], ask(1))
    outputs = bench.run()
    check(tiny_model, LONG[:300], told(outputs["good"]), 1)
    [failure] = outputs["bad"]
    assert isinstance(failure, RequestFailedError) and "out of memory" in str(failure)


def test_tokens_that_have_no_logit_cannot_come() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    unknown, last = prompt_scorer.gather_logprobs(logits, torch.tensor([5, 0]), 1).tolist()
    assert unknown[:2] == [-torch.inf, 4]
    assert last[1:] == [3, pytest.approx(last[2]), 1]


@pytest.mark.parametrize("name", ["gemma3_text", "falcon", "jamba", "qwen3_next", "cohere"])
def test_models_of_all_kinds_tell_it(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = architectures.build(name)
    prompt = [3 + 5 * index % 120 for index in range(150)]
    bench = Bench(
        model,
        tiny_tokenizer,
        attention=find_attention(model, tiny_tokenizer, architectures.NUM_POSITIONS),
        timeline=Timeline(residual_length=64, segment_size=64),
        bits=None,
        max_num_batched_tokens=130,
        caches_prefixes=False,
    )
    bench.engine.add_request("r", prompt, ask(3))
    bench.engine.add_request("other", prompt[:20], ask(3))
    outputs = bench.run()
    plain = architectures.build(name)
    check(plain, prompt, told(outputs["r"]), 3)
    check(plain, prompt[:20], told(outputs["other"]), 3)


def test_a_compiled_model_stays_compiled(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch._dynamo.reset()
    monkeypatch.setitem(compiled_forward.BACKENDS, "cpu", "eager")
    bench = Bench(tiny_model, tiny_tokenizer, bits=None)
    model = bench.model.model
    compiled = compile_forward(model, 2048)
    assert compiled is not None
    bench.engine._model_runner = ModelRunner(model, bench.store, None, is_paged=True, compiled=compiled)
    with caplog.at_level(logging.WARNING):
        for params in (greedy(3), ask(2), greedy(3)):
            outputs = bench.generate(LONG, params)
            if params.prompt_logprobs is not None:
                check(tiny_model, LONG, told(outputs), 2)
    assert not [record for record in caplog.records if record.name.startswith("turboquant")]
    torch._dynamo.reset()
