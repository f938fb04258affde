"""The runner computes no more logits than it needs, and every failure is one request's."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from turboquant_server.engine.detokenizer import Detokenizer
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.request import Request, RequestFailedError
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.engine.scheduler import ScheduledBatch

PROMPT = [5, 6, 7, 8, 9]


class Wrapped:
    """A model whose forward is a test's own function."""

    def __init__(self, model: PreTrainedModel, forward: Any) -> None:
        self.device = model.device
        self.forward = forward

    def __call__(self, **options: Any) -> Any:
        return self.forward(**options)


@pytest.fixture
def request_(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Request:
    params = SamplingParams(max_tokens=5, temperature=0)
    request = Request("r", PROMPT, params, Detokenizer(tiny_tokenizer, PROMPT))
    request.cache = DynamicCache(config=tiny_model.config)
    return request


def run(model: Any, request: Request, num_tokens: int = len(PROMPT)) -> int | RequestFailedError | None:
    (result,) = ModelRunner(model).run(ScheduledBatch([request], [num_tokens]))
    return result


def expected_token(model: PreTrainedModel) -> int:
    with torch.inference_mode():
        return int(model(torch.tensor([PROMPT])).logits[0, -1].argmax())


def test_a_prompts_last_chunk_gives_a_token_and_the_others_none(
    tiny_model: PreTrainedModel, request_: Request
) -> None:
    assert run(tiny_model, request_, 2) is None
    assert run(tiny_model, request_, 2) is None
    assert request_.num_computed_tokens == 4
    assert run(tiny_model, request_, 1) == expected_token(tiny_model)
    assert request_.num_computed_tokens == 5


def test_only_the_last_position_has_logits(tiny_model: PreTrainedModel, request_: Request) -> None:
    shapes = []

    def forward(logits_to_keep: int = 0, **options: Any) -> Any:
        outputs = tiny_model(logits_to_keep=logits_to_keep, **options)
        shapes.append(tuple(outputs.logits.shape))
        return outputs

    assert run(Wrapped(tiny_model, forward), request_) == expected_token(tiny_model)
    assert shapes == [(1, 1, 300)]


def test_a_model_without_logits_to_keep_gives_the_same_token(
    tiny_model: PreTrainedModel, request_: Request
) -> None:
    def forward(input_ids: Any, past_key_values: Any, use_cache: bool, return_dict: bool) -> Any:
        return tiny_model(input_ids, past_key_values=past_key_values, use_cache=use_cache)

    assert run(Wrapped(tiny_model, forward), request_) == expected_token(tiny_model)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_comes_by_the_name_that_the_model_has_for_it(
    tiny_model: PreTrainedModel, request_: Request, name: str
) -> None:
    given = []

    def with_cache(*, cache: Any = None, **options: Any) -> Any:
        given.append(cache)
        return tiny_model(past_key_values=cache, **options)

    def with_past_key_values(*, past_key_values: Any = None, **options: Any) -> Any:
        return with_cache(cache=past_key_values, **options)

    forward = with_cache if name == "cache" else with_past_key_values
    assert run(Wrapped(tiny_model, forward), request_) == expected_token(tiny_model)
    assert given == [request_.cache]


def test_no_graph_for_gradients_is_kept(tiny_model: PreTrainedModel, request_: Request) -> None:
    run(tiny_model, request_)
    assert isinstance(request_.cache, DynamicCache)
    assert request_.cache.layers[0].keys.is_inference()


def test_the_log_has_the_traceback_of_a_failed_request(
    tiny_model: PreTrainedModel, request_: Request, caplog: pytest.LogCaptureFixture
) -> None:
    def forward(**options: Any) -> Any:
        raise RuntimeError("bad kernel")

    with caplog.at_level(logging.ERROR):
        failure = run(Wrapped(tiny_model, forward), request_)
    assert isinstance(failure, RequestFailedError)
    assert failure.request_id == "r"
    assert (
        failure.__traceback__ is failure.__cause__ is failure.__context__ is None
    )  # they would hold the cache
    assert "request r failed" in caplog.text
    assert "RuntimeError: bad kernel" in caplog.text


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_fail_the_request(
    tiny_model: PreTrainedModel, request_: Request, bad: float
) -> None:
    def forward(**options: Any) -> Any:
        outputs = tiny_model(**options)
        outputs.logits[..., 7] = bad
        return outputs

    failure = run(Wrapped(tiny_model, forward), request_)
    assert isinstance(failure, RequestFailedError)
    assert "not a number" in str(failure)
