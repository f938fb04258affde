"""The runner computes no more logits than it needs, and what is wrong with one request stays with it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import architectures
import pytest
import torch
from engine_bench import Bench, greedy, tokens_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from turboquant_core import Timeline
from turboquant_server.attention_check import find_attention
from turboquant_server.engine import token_drawer
from turboquant_server.engine.decode_graphs import batch_sizes
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.request import RequestFailedError
from turboquant_server.engine.sampler import SamplingRow, sample
from turboquant_server.engine.sampling_params import SamplingParams

PROMPTS = {"a": [5, 6, 7, 8, 9], "b": [10, 11], "c": [12] * 40}


@pytest.fixture(params=[False, True], ids=["one by one", "overlapped"])
def bench(
    request: pytest.FixtureRequest, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Bench:
    return Bench(tiny_model, tiny_tokenizer, overlaps_steps=request.param)


def add_all(bench: Bench, num_tokens: int) -> None:
    for request_id, prompt in PROMPTS.items():
        bench.engine.add_request(request_id, prompt, greedy(num_tokens, ignore_eos=True))


def answers(bench: Bench) -> dict[str, list[int]]:
    add_all(bench, 4)
    return {request_id: tokens_of(outputs) for request_id, outputs in bench.run().items()}


def test_only_the_last_position_of_each_prompt_has_logits(bench: Bench) -> None:
    shapes = []
    bench.model.spoil = lambda input_ids, logits: shapes.append(tuple(logits.shape))
    add_all(bench, 2)
    bench.run()
    assert shapes == [(1, 3, 300), (3, 1, 300)]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_model_may_know_neither_logits_to_keep_nor_the_newer_name_of_its_cache(
    bench: Bench, name: str
) -> None:
    expected = answers(bench)
    inner = bench.model.model

    class Model:
        device, config = inner.device, inner.config

        def with_cache(self, *, input_ids: Any, position_ids: Any, cache: Any, **options: Any) -> Any:
            return inner(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, **options)

        def with_past_key_values(
            self, *, input_ids: Any, position_ids: Any, past_key_values: Any, **options: Any
        ) -> Any:
            return self.with_cache(
                input_ids=input_ids, position_ids=position_ids, cache=past_key_values, **options
            )

        @property
        def forward(self) -> Any:
            return getattr(self, f"with_{name}")

        def __call__(self, **options: Any) -> Any:
            return self.forward(**options)

    runner = ModelRunner(Model(), bench.store, None, is_paged=True)  # type: ignore[arg-type]
    bench.engine._model_runner = runner
    assert answers(bench) == expected


def test_each_choice_draws_with_its_own_index_at_each_position(bench: Bench) -> None:
    seen: list[torch.Tensor] = []
    bench.model.spoil = lambda input_ids, logits: seen.append(logits.flatten(0, 1).clone())
    params = SamplingParams(max_tokens=3, temperature=1.5, seed=11, n=2, ignore_eos=True)
    outputs = bench.generate(PROMPTS["a"], params)
    rows = [[step[min(choice, len(step) - 1)] for step in seen] for choice in range(2)]
    for choice in range(2):
        parameters = [SamplingRow(params, 11, choice, position) for position in (5, 6, 7)]
        assert tokens_of(outputs, choice) == sample(torch.stack(rows[choice]), parameters).tolist()


def test_nothing_is_kept_for_gradients(bench: Bench) -> None:
    seen = []
    bench.model.spoil = lambda input_ids, logits: seen.append(logits.is_inference())
    answers(bench)
    assert all(seen)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_fail_their_request_alone(bench: Bench, bad: float) -> None:
    expected = answers(bench)

    def spoil(input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        if input_ids.shape == (3, 1):
            logits[1, 0, 7] = bad

    bench.model.spoil = spoil
    add_all(bench, 4)
    outputs = bench.run()
    failures = [item for items in outputs.values() for item in items if isinstance(item, RequestFailedError)]
    assert len(failures) == 1 and "not a number" in str(failures[0])
    for request_id in PROMPTS.keys() - {failures[0].request_id}:
        assert tokens_of(outputs[request_id]) == expected[request_id]


@pytest.mark.parametrize("step", [0, 2])
def test_a_failure_to_sample_ends_only_its_request(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    expected = answers(bench)
    position = len(PROMPTS["b"]) + step

    def fail(logits: torch.Tensor, rows: Sequence[SamplingRow], *counts: Any) -> torch.Tensor:
        if any(row.position == position for row in rows):
            raise torch.OutOfMemoryError
        return sample(logits, rows)

    monkeypatch.setattr(token_drawer, "sample", fail)
    add_all(bench, 4)
    outputs = bench.run()
    *tokens, failure = outputs.pop("b")
    assert len(tokens) == step
    assert isinstance(failure, RequestFailedError) and "out of memory" in str(failure)
    assert {request_id: tokens_of(items) for request_id, items in outputs.items()} == {
        request_id: expected[request_id] for request_id in outputs
    }
    bench.manager.check_integrity()


@pytest.mark.parametrize("shape", [(1, 5), (3, 1)])
def test_a_choice_with_bad_logits_ends_the_others_with_one_failure(
    bench: Bench, shape: tuple[int, int]
) -> None:
    def spoil(input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        if input_ids.shape == shape:
            logits.flatten(0, 1)[shape[0] // 2] = torch.nan

    bench.model.spoil = spoil
    bench.engine.add_request("r", PROMPTS["a"], greedy(4, ignore_eos=True, n=3))
    outputs = bench.run()["r"]
    assert [isinstance(output, RequestFailedError) for output in outputs[:-1]].count(True) == 0
    assert isinstance(outputs[-1], RequestFailedError)


def test_the_log_has_the_traceback_of_a_failed_request(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(position_ids: torch.Tensor) -> None:
        raise RuntimeError("bad kernel")

    bench.model.fail = fail
    bench.engine.add_request("r", [5, 6], greedy(3))
    with caplog.at_level(logging.ERROR):
        [failure] = bench.run()["r"]
    assert isinstance(failure, RequestFailedError)
    assert "request r failed" in caplog.text
    assert "RuntimeError: bad kernel" in caplog.text


@pytest.mark.parametrize("overlaps_steps", [False, True])
@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text"])
def test_a_failure_beside_it_does_not_make_a_recurrent_layer_go_on_twice(
    name: str, overlaps_steps: bool, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = architectures.build(name)
    attention = find_attention(model, tiny_tokenizer, architectures.NUM_POSITIONS)
    prompt = [*range(3, 120)] * 2
    last: list[torch.Tensor] = []

    def keep(input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        if input_ids.shape[1] == 102:  # the last part of the long prompt
            last.append(logits[0, 0])

    for fails in (False, True):
        bench = Bench(
            model,
            tiny_tokenizer,
            attention=attention,
            timeline=Timeline(residual_length=64, segment_size=64),
            bits=None,
            max_num_batched_tokens=130,
            caches_prefixes=False,
            overlaps_steps=overlaps_steps,
        )
        bench.model.spoil = keep
        if fails:
            bench.model.fail = fail_at(7)
        bench.engine.add_request("long", prompt, greedy(4, ignore_eos=True))
        bench.engine.step()  # the first part of the prompt
        bench.engine.add_request("short", [5] * 8, greedy(4, ignore_eos=True))
        outputs = bench.run()
        assert isinstance(outputs["short"][-1], RequestFailedError) == fails
    assert len(last) == 2
    torch.testing.assert_close(last[0], last[1])


def fail_at(last_position: int) -> Callable[[torch.Tensor], None]:
    def fail(position_ids: torch.Tensor) -> None:
        if position_ids[0, -1] == last_position:
            raise RuntimeError("bad kernel")

    return fail


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [(1, [1]), (5, [1, 2, 3, 4, 5]), (16, [1, 2, 3, 4, 6, 8, 12, 16]), (17, [1, 2, 3, 4, 6, 8, 12, 16, 17])],
)
def test_graphs_are_made_for_batches_of_few_sizes(max_batch: int, sizes: list[int]) -> None:
    assert batch_sizes(max_batch) == sizes
    # At most a third of the rows are to spare.
    assert all(2 * above <= 3 * (below + 1) for below, above in itertools.pairwise(batch_sizes(256)))
