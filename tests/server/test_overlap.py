"""Steps that overlap give what steps one by one give, and what is computed in vain leaves nothing behind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_bench import Bench, greedy, text_of, tokens_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from turboquant_server.engine.request import FinishReason, RequestFailedError, RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams

EOS = tuple(range(2, 300, 30))
MAX_MODEL_LEN = 400


class HashBody(torch.nn.Module):
    """Hash each token and its position."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(1, 1)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> BaseModelOutput:
        assert input_ids.min() >= 0
        states = (input_ids * 7919 + position_ids * 104729) % 997
        return BaseModelOutput(last_hidden_state=states[:, :, None])


class HashModel(torch.nn.Module):
    """Stand in for a model: logits that are those of a token at a position, to the bit in any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = HashBody()
        self.logits = 2 * torch.randn(997, 300, generator=torch.Generator().manual_seed(0))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.body.embeddings

    def forward(
        self, *, input_ids: torch.Tensor, position_ids: torch.Tensor, logits_to_keep: Any, **options: Any
    ) -> Any:
        states = self.body(input_ids, position_ids).last_hidden_state
        return SimpleNamespace(logits=self.logits[states[:, logits_to_keep, 0]])


@pytest.fixture
def make_bench(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    def make(**options: Any) -> Bench:
        options = {"eos_token_ids": EOS, "max_model_len": MAX_MODEL_LEN, **options}
        bench = Bench(tiny_model, tiny_tokenizer, **options)
        bench.model.model = HashModel()  # type: ignore[assignment]
        return bench

    return make


def random_adjustments(draw: random.Random) -> dict[str, Any]:
    """Return, for every other request, some of what changes logits or is told of them."""
    some: dict[str, Any] = {
        "min_p": draw.choice([0.02, 0.2]),
        "frequency_penalty": draw.choice([-0.7, 1.1]),
        "presence_penalty": draw.choice([-1.3, 0.9]),
        "repetition_penalty": draw.choice([0.8, 1.7]),
        "logit_bias": ((draw.randrange(300), 5.0), (draw.choice(EOS), 3.0)),
        "stop_token_ids": tuple(draw.sample(range(300), 3)),
        "include_stop": True,
        "min_tokens": 1,
        "logprobs": draw.choice([0, 3, 20]),
        "prompt_logprobs": draw.choice([0, 2]),
    }
    return {name: some[name] for name in some if draw.random() < 0.4} if draw.random() < 0.5 else {}


def random_requests(draw: random.Random, count: int) -> dict[str, tuple[list[int], SamplingParams]]:
    """Return requests that end in all ways: by a token, by a text, by either length, in one or many steps."""
    requests = {}
    for index in range(count):
        length = draw.choice([1, 5, 60, 130, 260, 390])
        shared = draw.choice([0, 0, length // 2])
        prompt = [7] * shared + [draw.randrange(3, 300) for _ in range(length - shared)]
        params = SamplingParams(
            max_tokens=draw.choice([1, 2, 10, 90, 1000]),
            temperature=draw.choice([0.0, 1.0]),
            top_p=draw.choice([1.0, 0.8]),
            seed=draw.randrange(100),
            n=draw.choice([1, 1, 2, 4]),
            stop=tuple(draw.sample("abcdefghij", draw.choice([0, 1, 2]))),
            ignore_eos=draw.random() < 0.3,
            **random_adjustments(draw),
        )
        requests[str(index)] = prompt, params
    return requests


def of_choice(outputs: Sequence[object], index: int) -> list[RequestOutput]:
    """Return the outputs of one choice, but for how much of the prompt was found in the cache."""
    assert all(isinstance(output, RequestOutput) for output in outputs)
    return [
        replace(output, num_cached_tokens=0)
        for output in outputs
        if isinstance(output, RequestOutput) and output.choice_index == index
    ]


@pytest.mark.parametrize("seed", range(12))
def test_a_crowd_in_overlapped_steps_gets_what_each_of_it_gets_alone_step_by_step(
    make_bench: Any, seed: int
) -> None:
    draw = random.Random(seed)
    requests = random_requests(draw, 14)
    crowd = make_bench(
        overlaps_steps=True, num_slots=draw.choice([2, 5, 16]), num_blocks=draw.choice([6, 9, 200])
    )
    waiting = list(requests)
    to_abort, aborted = draw.sample(waiting, 3), set()
    outputs: dict[str, list[object]] = {request_id: [] for request_id in requests}
    while waiting or crowd.engine.has_unfinished_requests:
        for _ in range(draw.choice([0, 0, 1, 4])):
            if waiting:
                crowd.engine.add_request(waiting[0], *requests[waiting.pop(0)])
        for output in crowd.engine.step():
            outputs[output.request_id].append(output)
        if draw.random() < 0.15 and to_abort and to_abort[-1] not in waiting:
            crowd.engine.abort_request(to_abort[-1])
            aborted.add(to_abort.pop())
        crowd.manager.check_integrity()
    crowd.check_empty()
    assert crowd.engine.step() == []

    alone = make_bench()
    for request_id, (prompt, params) in requests.items():
        expected = alone.generate(prompt, params)
        for index in range(params.n):
            got, choice = of_choice(outputs[request_id], index), of_choice(expected, index)
            choice = [replace(output, request_id=request_id) for output in choice]
            assert got == choice[: len(got)]
            assert len(got) == len(choice) or request_id in aborted
            assert [output.num_output_tokens for output in got] == list(range(1, len(got) + 1))


def test_a_step_is_launched_before_the_tokens_of_the_one_before_it_are_taken_in(make_bench: Any) -> None:
    bench = make_bench(overlaps_steps=True)
    bench.engine.add_request("r", [5] * 20, greedy(3, ignore_eos=True))
    assert bench.engine.step() == []
    assert bench.model.shapes == [(1, 20)]
    [first] = bench.engine.step()
    assert bench.model.shapes == [(1, 20), (1, 1)]
    assert (first.num_output_tokens, first.finish_reason) == (1, None)
    [second], [third] = bench.engine.step(), bench.engine.step()
    assert bench.model.shapes == [(1, 20), (1, 1), (1, 1)]
    assert (second.num_output_tokens, third.num_output_tokens) == (2, 3)
    assert third.finish_reason is FinishReason.LENGTH
    bench.check_empty()


@pytest.mark.parametrize(("max_tokens", "num_prompt_tokens"), [(1, 20), (4, 20), (100, MAX_MODEL_LEN - 3)])
def test_nothing_is_computed_beyond_a_length(
    make_bench: Any, max_tokens: int, num_prompt_tokens: int
) -> None:
    shapes = []
    for overlaps_steps in (False, True):
        bench = make_bench(overlaps_steps=overlaps_steps)
        bench.generate([5] * num_prompt_tokens, greedy(max_tokens, ignore_eos=True, n=2))
        shapes.append(bench.model.shapes)
    assert shapes[0] == shapes[1]


def test_a_request_that_ends_by_its_token_costs_one_token_that_nobody_sees(make_bench: Any) -> None:
    alone = make_bench()
    outputs = alone.generate([9] * 30, greedy(200))
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert 1 < len(outputs) < 200
    overlapped = make_bench(overlaps_steps=True)
    overlapped.engine.add_request("r", [9] * 30, greedy(200))
    [request] = overlapped.scheduler.find("r")
    got = overlapped.run()["r"]
    assert (tokens_of(got), text_of(got)) == (tokens_of(outputs), text_of(outputs))
    assert got[-1].num_output_tokens == len(got) == request.num_output_tokens
    assert request.token_ids == [9] * 30 + tokens_of(outputs)
    assert len(overlapped.model.shapes) == len(alone.model.shapes) + 1


def test_a_prompt_of_a_request_in_flight_is_found_and_what_was_computed_in_vain_is_not(
    make_bench: Any,
) -> None:
    options = {"overlaps_steps": True, "max_model_len": 2000}
    bench = make_bench(**options)
    prompt = [5 + index % 200 for index in range(1100)]
    bench.engine.add_request("first", prompt, greedy(90, ignore_eos=True))
    bench.engine.step()
    bench.engine.add_request("second", prompt, greedy(1))
    outputs = bench.run()
    assert [outputs[name][0].num_cached_tokens for name in ("first", "second")] == [0, 516]
    hashes = bench.manager._groups[0].blocks.num_cached
    again = make_bench(**{**options, "overlaps_steps": False})
    again.generate(prompt, greedy(90, ignore_eos=True))
    assert hashes == again.manager._groups[0].blocks.num_cached


def test_who_is_beside_a_request_that_fails_loses_no_token(make_bench: Any) -> None:
    expected = make_bench().generate([5] * 9, greedy(30, ignore_eos=True))
    bench = make_bench(overlaps_steps=True)

    def fail(position_ids: torch.Tensor) -> None:
        if (position_ids == 25).any():
            raise RuntimeError("bad kernel")

    bench.model.fail = fail
    bench.engine.add_request("good", [5] * 9, greedy(10, ignore_eos=True))
    bench.engine.add_request("bad", [6] * 20, greedy(30, ignore_eos=True))
    outputs = bench.run()
    *tokens, failure = outputs["bad"]
    assert isinstance(failure, RequestFailedError)
    assert [output.num_output_tokens for output in tokens] == [1, 2, 3, 4, 5, 6]  # at 20 to 25
    assert tokens_of(outputs["good"]) == tokens_of(expected)[:10]
