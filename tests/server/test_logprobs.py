"""Log-probabilities are those of the model's own logits, whatever a request does to them before it draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_bench import Bench
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from turboquant_server.engine import logprobs
from turboquant_server.engine.logprobs import LOWEST_LOGPROB, gather_logprobs, read_logprobs
from turboquant_server.engine.request import RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams

PROMPT = [5, 6, 7, 8, 9]


def reference(logits: torch.Tensor) -> np.ndarray:
    scores = logits.double().numpy()
    return scores - np.log(np.exp(scores - scores.max()).sum()) - scores.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_elements", [1 << 23, 100])
def test_values_and_order_are_those_of_float64(
    dtype: torch.dtype, num_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "_MAX_ELEMENTS_AT_ONCE", num_elements)
    logits = (5 * torch.randn(7, 90, generator=torch.Generator().manual_seed(0))).to(dtype)
    chosen = torch.tensor([3, 0, 89, 7, 7, 50, 1])
    rows = gather_logprobs(logits, chosen).tolist()
    for row, row_logits, token_id in zip(rows, logits, chosen.tolist(), strict=True):
        expected = reference(row_logits)
        token = read_logprobs(row, 20)
        assert token.logprob == pytest.approx(expected[token_id], abs=1e-5)
        assert [logprob for _, logprob in token.top] == pytest.approx(np.sort(expected)[::-1][:20], abs=1e-5)
        for top_id, logprob in token.top:
            assert logprob == pytest.approx(expected[top_id], abs=1e-5)
        assert read_logprobs(row, 3).top == token.top[:3]
        assert read_logprobs(row, 0).top == ()


def test_a_small_vocabulary_and_impossible_tokens_are_no_error() -> None:
    [row] = gather_logprobs(torch.tensor([[0.0, -torch.inf, 1.0]]), torch.tensor([1])).tolist()
    token = read_logprobs(row, 20)
    assert token.logprob == LOWEST_LOGPROB
    assert [token_id for token_id, _ in token.top] == [2, 0, 1]


@pytest.mark.parametrize("overlaps_steps", [False, True])
def test_each_choice_is_told_what_the_model_thinks_of_its_own_tokens(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, overlaps_steps: bool
) -> None:
    bench = Bench(tiny_model, tiny_tokenizer, bits=None, overlaps_steps=overlaps_steps)
    changed: dict[str, Any] = {"temperature": 1.9, "frequency_penalty": 1.5, "logit_bias": ((9, 8.0),)}
    asked = SamplingParams(max_tokens=12, n=3, seed=3, ignore_eos=True, logprobs=4, **changed)
    bench.engine.add_request("silent", PROMPT, SamplingParams(max_tokens=9, ignore_eos=True, n=2))
    bench.engine.add_request("asked", PROMPT, asked)
    bench.engine.add_request("silent too", PROMPT, SamplingParams(max_tokens=5, ignore_eos=True))
    outputs = bench.run()
    for name, told in outputs.items():
        assert all(bool(output.logprobs) is (name == "asked") for output in told)  # type: ignore[union-attr]
    for index in range(3):
        choice = [
            output
            for output in outputs["asked"]
            if isinstance(output, RequestOutput) and output.choice_index == index
        ]
        token_ids = [token_id for output in choice for token_id in output.token_ids]
        with torch.inference_mode():
            logits = tiny_model(torch.tensor([PROMPT + token_ids])).logits[0, len(PROMPT) - 1 : -1]
        for output, token_id, row in zip(choice, token_ids, logits, strict=True):
            expected = reference(row)
            [token] = output.logprobs
            assert token.logprob == pytest.approx(expected[token_id], abs=1e-4)
            assert [logprob for _, logprob in token.top] == pytest.approx(
                np.sort(expected)[::-1][:4], abs=1e-4
            )
