"""Biases, penalties and bans are what loops in float64 and transformers' processors make of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_bench import Bench, greedy, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from turboquant_server.engine.logit_adjustments import adjust_logits
from turboquant_server.engine.request import FinishReason
from turboquant_server.engine.sampler import SamplingRow, sample
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.engine.token_counts import IN_PROMPT

VOCAB_SIZE = 11
NO_EOS = (299,)


def adjusted(
    logits: list[float], params: SamplingParams, prompt: list[int], answer: list[int], banned: list[int]
) -> list[float]:
    """Do what vLLM's documentation says, token by token."""
    result = []
    for token_id, logit in enumerate(logits):
        logit += dict(params.logit_bias).get(token_id, 0.0)
        if token_id in prompt or token_id in answer:
            penalty = params.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        logit -= params.frequency_penalty * answer.count(token_id)
        logit -= params.presence_penalty * (token_id in answer)
        result.append(-np.inf if token_id in banned else logit)
    return result


TOKENS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=8)
ROWS = st.fixed_dictionaries(
    {
        "logits": st.lists(
            st.one_of(st.floats(-30, 30, width=16), st.just(-np.inf)),
            min_size=VOCAB_SIZE,
            max_size=VOCAB_SIZE,
        ).filter(lambda values: max(values) > -np.inf),
        "params": st.builds(
            SamplingParams,
            max_tokens=st.just(9),
            temperature=st.sampled_from([0.0, 0.8]),
            min_p=st.sampled_from([0.0, 0.07]),
            top_k=st.sampled_from([0, 3]),
            frequency_penalty=st.sampled_from([0.0, -1.7, 0.3]),
            presence_penalty=st.sampled_from([0.0, 0.0, 1.9]),
            repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
            logit_bias=st.dictionaries(st.integers(0, VOCAB_SIZE + 2), st.floats(-100, 100), max_size=3).map(
                lambda biases: tuple(biases.items())
            ),
            min_tokens=st.integers(0, 9),
        ),
        "prompt": TOKENS,
        "answer": TOKENS,
        "banned": st.lists(st.integers(0, VOCAB_SIZE + 2), max_size=3, unique=True),
    }
)


def make_rows(cases: list[dict[str, Any]]) -> tuple[torch.Tensor, list[SamplingRow], torch.Tensor]:
    logits = torch.tensor([case["logits"] for case in cases], dtype=torch.bfloat16)
    counts = torch.tensor(
        [
            [case["answer"].count(i) + IN_PROMPT * (i in case["prompt"]) for i in range(VOCAB_SIZE)]
            for case in cases
        ],
        dtype=torch.int32,
    )
    # Each row's counts in a slot of another number.
    rows = [
        SamplingRow(case["params"], 3, 0, 7, len(cases) - 1 - index, tuple(case["banned"]))
        for index, case in enumerate(cases)
    ]
    return logits, rows, counts.flip(0)


@settings(deadline=None, max_examples=100)
@given(cases=st.lists(ROWS, min_size=1, max_size=6))
def test_logits_are_changed_as_loops_in_float64_change_them(cases: list[dict[str, Any]]) -> None:
    logits, rows, counts = make_rows(cases)
    before = logits.clone()
    result = adjust_logits(logits, rows, counts)
    assert result.dtype is torch.float64
    assert torch.equal(logits, before)
    for case, got, row_logits in zip(cases, result.tolist(), logits.tolist(), strict=True):
        expected = adjusted(row_logits, case["params"], case["prompt"], case["answer"], case["banned"])
        np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-13)


@settings(deadline=None, max_examples=100)
@given(cases=st.lists(ROWS, min_size=1, max_size=6))
def test_a_row_gets_its_token_whatever_rows_are_beside_it(cases: list[dict[str, Any]]) -> None:
    logits, rows, counts = make_rows(cases)
    together = sample(logits, rows, counts).tolist()
    for index, row in enumerate(rows):
        assert sample(logits[index : index + 1], [row], counts).tolist() == together[index : index + 1]
        if not row.sampling_params.adjusts_logits:
            assert sample(logits[index : index + 1], [row]).tolist() == together[index : index + 1]


def test_penalty_and_bias_are_those_of_transformers() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(1, VOCAB_SIZE, generator=generator)
    input_ids = torch.tensor([[1, 4, 4, 9]])
    params = SamplingParams(max_tokens=5, repetition_penalty=1.4, logit_bias=((4, 2.5), (7, -3.0)))
    counts = torch.zeros(1, VOCAB_SIZE, dtype=torch.int32)
    counts[0, [1, 4]] = IN_PROMPT
    counts[0, [4, 9]] += 1
    bias = SequenceBiasLogitsProcessor([[[4], 2.5], [[7], -3.0]])
    penalty = RepetitionPenaltyLogitsProcessor(1.4)
    expected = penalty(input_ids, bias(input_ids, logits))
    torch.testing.assert_close(
        adjust_logits(logits, [SamplingRow(params, 0, 0, 4)], counts).float(), expected
    )


@pytest.mark.parametrize("overlaps_steps", [False, True])
@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_greedy_tokens_with_a_repetition_penalty_are_those_of_transformers_generate(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    overlaps_steps: bool,
    penalty: float,
) -> None:
    prompt = tiny_tokenizer.encode("What is the access code of the harbour?")
    output = tiny_model.generate(
        torch.tensor([prompt]),
        past_key_values=DynamicCache(config=tiny_model.config),
        do_sample=False,
        max_new_tokens=50,
        repetition_penalty=penalty,
        eos_token_id=None,
    )
    bench = Bench(tiny_model, tiny_tokenizer, bits=None, overlaps_steps=overlaps_steps)
    bench.engine.add_request("beside", prompt, greedy(20, ignore_eos=True, frequency_penalty=0.5))
    bench.engine.add_request("r", prompt, greedy(50, ignore_eos=True, repetition_penalty=penalty))
    assert tokens_of(bench.run()["r"]) == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("overlaps_steps", [False, True])
def test_preempted_forked_and_sharing_requests_with_penalties_get_what_each_gets_alone(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, overlaps_steps: bool
) -> None:
    params = SamplingParams(
        max_tokens=90,
        n=2,
        seed=4,
        ignore_eos=True,
        frequency_penalty=0.4,
        presence_penalty=0.3,
        repetition_penalty=1.2,
    )
    alone = Bench(tiny_model, tiny_tokenizer, bits=None)
    prompts = {str(length): [7 + index % 200 for index in range(length)] for length in (250, 330, 420)}
    expected = {name: alone.generate(prompt, params) for name, prompt in prompts.items()}
    crowd = Bench(
        tiny_model, tiny_tokenizer, bits=None, num_blocks=7, num_slots=4, overlaps_steps=overlaps_steps
    )
    for name, prompt in prompts.items():
        crowd.engine.add_request(name, prompt, params)
    outputs = crowd.run()
    assert crowd.scheduler.num_preemptions > 0
    for name in prompts:
        for index in range(2):
            assert tokens_of(outputs[name], index) == tokens_of(expected[name], index)


@pytest.mark.parametrize("overlaps_steps", [False, True])
def test_an_answer_has_min_tokens_whatever_would_end_it(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, overlaps_steps: bool
) -> None:
    bench = Bench(tiny_model, tiny_tokenizer, eos_token_ids=NO_EOS, overlaps_steps=overlaps_steps)
    always = ((299, 100.0),)
    outputs = bench.generate([5, 6], greedy(30, logit_bias=always, min_tokens=7))
    assert len(outputs) == 8 and outputs[-1].finish_reason is FinishReason.STOP
    ends = {"stop_token_ids": (12,), "ignore_eos": True}
    outputs = bench.generate([5, 6], greedy(30, logit_bias=((12, 100.0),), min_tokens=3, **ends))
    assert tokens_of(outputs)[3:] == [12] and 12 not in tokens_of(outputs)[:3]
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_a_token_that_ends_an_answer_has_text_only_if_that_is_asked_for(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bench = Bench(tiny_model, tiny_tokenizer, eos_token_ids=NO_EOS)
    [letter] = tiny_tokenizer.encode("k", add_special_tokens=False)
    ends: dict[str, Any] = {"logit_bias": ((letter, 100.0),), "stop_token_ids": (letter,)}
    for include_stop, text in ((False, ""), (True, "k")):
        [output] = bench.generate([5, 6], greedy(30, include_stop=include_stop, **ends))
        assert (output.text, output.token_ids, output.finish_reason) == (text, [letter], FinishReason.STOP)
