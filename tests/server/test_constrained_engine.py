"""Answers that follow grammars: beside others, in overlapped steps, in several choices, after preemptions."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from engine_bench import Bench, greedy, text_of, tokens_of
from test_overlap import HashModel, of_choice
from tiny_tokenizer import build_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from turboquant_server.engine.grammar import Grammar, GrammarCompiler, GrammarKind, Matcher
from turboquant_server.engine.request import FinishReason, RequestFailedError, RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams

EOS = (0, 2)
COMPILER = GrammarCompiler(build_tokenizer(), 300, EOS)
REGEXES = ["[a-f]{5,60}", "(yes|no|perhaps)", "([0-9]{1,3}, ){0,20}end", "a.{0,40}z", "é{3,9}|[東京]+x"]


def regex(pattern: str) -> Grammar:
    return COMPILER.compile(GrammarKind.REGEX, pattern)


@pytest.fixture
def make_bench(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    def make(**options: Any) -> Bench:
        bench = Bench(tiny_model, tiny_tokenizer, **{"eos_token_ids": EOS, "max_model_len": 400, **options})
        bench.model.model = HashModel()  # type: ignore[assignment]
        return bench

    return make


def random_request(draw: random.Random) -> tuple[list[int], SamplingParams]:
    prompt = [draw.randrange(3, 300) for _ in range(draw.choice([1, 5, 60, 130]))]
    pattern = draw.choice([None, None, *REGEXES])
    return prompt, SamplingParams(
        max_tokens=draw.choice([2, 20, 100]),
        temperature=draw.choice([0.0, 1.0, 1.5]),
        top_p=draw.choice([1.0, 0.8]),
        seed=draw.randrange(100),
        n=draw.choice([1, 1, 3]),
        ignore_eos=draw.random() < 0.3,
        logit_bias=draw.choice([(), ((70, 5.0), (0, 100.0))]),
        repetition_penalty=draw.choice([1.0, 1.3]),
        grammar=None if pattern is None else regex(pattern),
    )


@pytest.mark.parametrize("seed", range(8))
def test_a_mixed_crowd_in_overlapped_steps_gets_what_each_gets_alone_step_by_step(
    make_bench: Any, seed: int
) -> None:
    draw = random.Random(seed)
    requests = {str(index): random_request(draw) for index in range(14)}
    crowd = make_bench(overlaps_steps=True, num_slots=draw.choice([3, 6]), num_blocks=draw.choice([5, 8]))
    for request_id, request in requests.items():
        crowd.engine.add_request(request_id, *request)
    outputs = crowd.run()
    alone = make_bench()
    for request_id, (prompt, params) in requests.items():
        expected = alone.generate(prompt, params)
        for index in range(params.n):
            got, choice = of_choice(outputs[request_id], index), of_choice(expected, index)
            assert tokens_of(got, index) == tokens_of(choice, index)
            assert (text_of(got), got[-1].finish_reason) == (text_of(choice), choice[-1].finish_reason)
            is_whole = got[-1].finish_reason is FinishReason.STOP
            if params.grammar is not None and is_whole:
                assert any(re.fullmatch(pattern, text_of(got)) for pattern in REGEXES)


def test_a_preempted_answer_goes_on_where_it_stood(make_bench: Any) -> None:
    params = greedy(300, grammar=regex("([0-9]{3}[a-z]){75}"))
    crowd = make_bench(num_blocks=10, overlaps_steps=True, max_model_len=1000)
    for index in range(3):
        crowd.engine.add_request(str(index), [5 + index] * 250, params)
    outputs = crowd.run()
    assert crowd.scheduler.num_preemptions > 0
    alone = make_bench(max_model_len=1000)
    for index in range(3):
        expected = alone.generate([5 + index] * 250, params)
        assert tokens_of(outputs[str(index)]) == tokens_of(expected)
        assert re.fullmatch("([0-9]{3}[a-z]){75}", text_of(expected)) or len(expected) == 300


def test_choices_follow_the_grammar_each_for_itself(make_bench: Any) -> None:
    params = SamplingParams(max_tokens=100, n=3, temperature=1.5, seed=3, grammar=regex("[a-z]{2,30}!"))
    outputs = make_bench(overlaps_steps=True).generate([9] * 70, params)
    texts = [text_of(of_choice(outputs, index)) for index in range(3)]
    assert all(re.fullmatch("[a-z]{2,30}!", text) for text in texts)
    assert len(set(texts)) == 3


def test_choices_that_find_no_slot_at_first_follow_it_too(make_bench: Any) -> None:
    params = SamplingParams(max_tokens=100, n=4, temperature=1.5, seed=3, grammar=regex("[a-z]{2,30}!"))
    expected = make_bench().generate([9] * 70, params)
    got = make_bench(num_slots=2, overlaps_steps=True).generate([9] * 70, params)
    for index in range(4):
        assert tokens_of(got, index) == tokens_of(expected, index)


def test_steps_with_grammars_overlap(make_bench: Any) -> None:
    bench = make_bench(overlaps_steps=True)
    bench.engine.add_request("r", [5] * 20, greedy(3, grammar=regex("[a-z]{9}")))
    assert bench.engine.step() == []
    [first] = bench.engine.step()
    assert bench.model.shapes == [(1, 20), (1, 1)]
    assert first.num_output_tokens == 1
    bench.run()


def test_masks_are_computed_after_the_forward_has_been_launched(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    num_forwards = []
    advance = Matcher.advance

    def noting(matcher: Matcher, token_ids: list[int]) -> None:
        num_forwards.append(len(bench.model.shapes))
        advance(matcher, token_ids)

    monkeypatch.setattr(Matcher, "advance", noting)
    bench.generate([5] * 20, greedy(4, grammar=regex("[a-z]{9}")))
    assert num_forwards == [1, 2, 3, 4]


def test_an_answer_ends_with_its_grammar_though_ends_are_to_be_ignored(make_bench: Any) -> None:
    outputs = make_bench().generate([5] * 20, greedy(50, ignore_eos=True, grammar=regex("ab")))
    assert (text_of(outputs), outputs[-1].finish_reason) == ("ab", FinishReason.STOP)
    assert outputs[-1].token_ids[0] in EOS


class BrokenGrammar(Grammar):
    """Break after a few tokens, as a grammar does that has become too complex."""

    def open(self) -> Matcher:
        matcher = super().open()
        advance = matcher.advance

        def advance_until_broken(token_ids: list[int]) -> None:
            advance(token_ids)
            if matcher.num_tokens >= 3:
                matcher.state.consume_token(299)

        matcher.advance = advance_until_broken  # type: ignore[method-assign, assignment]
        return matcher


@pytest.mark.parametrize("overlaps_steps", [False, True])
def test_a_grammar_that_fails_fails_its_request_only(make_bench: Any, overlaps_steps: bool) -> None:
    whole = regex("[a-z]{9}")
    broken = BrokenGrammar(whole.source, whole._matcher, whole.executor, whole.num_tokens)
    bench = make_bench(overlaps_steps=overlaps_steps)
    neighbours = {"plain": greedy(20), "constrained": greedy(20, grammar=whole)}
    bench.engine.add_request("broken", [6] * 20, greedy(20, grammar=broken, n=2))
    for request_id, params in neighbours.items():
        bench.engine.add_request(request_id, [5] * 20, params)
    outputs = bench.run()
    *before, failure = outputs["broken"]
    assert all(isinstance(output, RequestOutput) for output in before)
    assert isinstance(failure, RequestFailedError)
    assert str(failure).startswith("The answer cannot go on as its grammar wants")
    for request_id, params in neighbours.items():
        expected = make_bench().generate([5] * 20, params)
        assert tokens_of(outputs[request_id]) == tokens_of(expected)


@pytest.mark.parametrize("overlaps_steps", [False, True])
def test_logits_without_a_token_fail_a_constrained_request_as_any_other(
    make_bench: Any, overlaps_steps: bool
) -> None:
    bench = make_bench(overlaps_steps=overlaps_steps)

    def spoil(input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        if len(bench.model.shapes) == 3:
            logits.fill_(torch.nan)

    bench.model.spoil = spoil
    bench.engine.add_request("r", [5] * 20, greedy(20, grammar=regex("[a-z]{9}")))
    *before, failure = bench.run()["r"]
    assert len(before) == 2
    assert isinstance(failure, RequestFailedError)
    assert "not a number" in str(failure)
