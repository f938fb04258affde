"""What is found of an answer is what a plain forward finds, and looking for it is in nobody's way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from engine_bench import Bench, Parts, greedy, plain_attention, tokens_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from turboquant_core import Timeline
from turboquant_server.engine.async_engine import AsyncEngine
from turboquant_server.engine.exact_reader import ExactReader
from turboquant_server.engine.fidelity import MAX_ANSWERS, Fidelity
from turboquant_server.engine.request import RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams

PROMPT = [3 + 7 * index % 290 for index in range(600)]
ANSWER = SamplingParams(max_tokens=60, seed=3, ignore_eos=True)
TIMEOUT = 20

Build = Callable[..., Bench]


@pytest.fixture
def build(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Build:
    """Return a function that makes an engine which compares its answers; all, unless a rate is given."""

    def build(sample_rate: float | None = None, num_blocks: int = 24, **options: Any) -> Bench:
        bench = Bench(tiny_model, tiny_tokenizer, **options)
        parts = Parts(
            bench.model,  # type: ignore[arg-type]
            plain_attention(bench.model.config),
            Timeline(),
            num_blocks=num_blocks,
            num_slots=1,
            bits=None,
            max_num_batched_tokens=2048,
            caches_prefixes=False,
        )
        model: Any = bench.model
        reader = ExactReader(model, parts.store, None, parts.manager, is_paged=True, one_shot=False)
        bench.engine.fidelity = Fidelity(reader, Timeline(), sample_rate or 1.0)
        if sample_rate is not None:
            bench.engine.fidelity.set_range()
        return bench

    return build


def fidelity_of(bench: Bench) -> Fidelity:
    assert bench.engine.fidelity is not None
    return bench.engine.fidelity


def read_model(bench: Bench) -> Any:
    """Return the model of the comparisons, which is not that of the steps."""
    reader: Any = fidelity_of(bench)._reader
    return reader._split._forward._model


def compare(bench: Bench) -> Fidelity:
    """Take the steps of an engine that has no requests."""
    while bench.engine.has_work:
        assert bench.engine.step() == []
    manager: Any = fidelity_of(bench)._reader._manager
    manager.check_integrity()
    assert manager.num_running == 0
    return fidelity_of(bench)


def expected_kld(model: PreTrainedModel, prompt: Sequence[int], outputs: Sequence[RequestOutput]) -> Any:
    """Return the divergence by token, in float64, from what a client is told and a plain forward."""
    tokens = [*prompt, *tokens_of(outputs)]
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1].double().numpy()
    exact = np.exp(logits - logits.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    klds, agreements = [], []
    for row, output in zip(exact, outputs, strict=True):
        ids, served = zip(*output.logprobs[0].top, strict=True)
        p, q = row[list(ids)], np.exp(served)
        p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
        klds.append((p * np.log(p / q)).sum())
        agreements.append(row.argmax() == ids[0])
    return np.array(klds), np.array(agreements)


@pytest.mark.parametrize("overlaps_steps", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_divergence_is_that_of_what_was_served(
    build: Build, tiny_model: PreTrainedModel, bits: int, overlaps_steps: bool
) -> None:
    params = SamplingParams(max_tokens=60, seed=3, ignore_eos=True, logprobs=20)
    bench = build(bits=bits, overlaps_steps=overlaps_steps)
    outputs = bench.generate(PROMPT, params)
    total = compare(bench).state.total
    klds, agreements = expected_kld(tiny_model, PROMPT, outputs)
    # The first token comes from the prompt's last chunk, which reads nothing compressed.
    assert total.num_tokens == 59 and total.num_agreeing == agreements[1:].sum()
    assert total.kld == pytest.approx(klds[1:].mean(), rel=1e-3)


def test_fewer_bits_diverge_more_and_none_does_not(build: Build) -> None:
    found = {}
    for bits in (2, 4, 8, None):
        bench = build(bits=bits)
        bench.generate(PROMPT, ANSWER)
        found[bits] = compare(bench).state.total
    assert found[2].kld > 4 * found[4].kld > 100 * found[8].kld
    assert found[None].kld < 1e-6 and found[None].agreement == 1
    assert found[2].agreement <= found[4].agreement <= found[8].agreement
    assert found[8].num_agreeing >= 58  # of 59


def test_an_answer_is_the_same_and_tells_the_same(build: Build) -> None:
    for params in (ANSWER, greedy(60, logprobs=2, ignore_eos=True)):
        watched = build()
        outputs = watched.generate(PROMPT, params)
        watched.engine.fidelity = None
        assert outputs == watched.generate(PROMPT, params, cache_salt="other")


def test_of_several_choices_the_first_is_compared(build: Build) -> None:
    bench = build()
    outputs = bench.generate(PROMPT, SamplingParams(max_tokens=20, n=3, seed=1, ignore_eos=True))
    assert not any(output.logprobs for output in outputs)
    state = compare(bench).state
    assert (state.num_answers, state.total.num_tokens) == (1, 19)


def test_a_request_that_gave_its_cache_back_counts_each_token_once(build: Build) -> None:
    bench = build(num_slots=2)
    bench.engine.add_request("r", PROMPT, ANSWER)
    for _ in range(30):
        bench.engine.step()
    bench.scheduler._preempt(bench.scheduler.running[0])
    bench.run()
    assert compare(bench).state.total.num_tokens == 59


def test_a_new_request_waits_for_one_slice(build: Build) -> None:
    alone = build()
    alone.generate(PROMPT, ANSWER)
    expected = compare(alone).state.total
    bench = build()
    bench.generate(PROMPT, ANSWER)
    for index in range(3):
        bench.engine.step()
        bench.engine.add_request(f"new {index}", PROMPT[:30], greedy(1))
        [output] = bench.engine.step()
        assert output.request_id == f"new {index}"
        bench.check_empty()
    bench.model.shapes.clear()
    fidelity = compare(bench)
    assert fidelity.state.total == expected and fidelity.state.num_skipped["too_short"] == 3
    assert max(length for _, length in bench.model.shapes) <= 64


def test_a_comparison_that_fails_is_lost_alone(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    def fail(position_ids: torch.Tensor) -> None:
        if 500 in position_ids:
            raise torch.OutOfMemoryError

    bench = build()
    for _ in range(2):
        bench.generate(PROMPT, ANSWER)
    read_model(bench).fail = fail
    fidelity = compare(bench)
    assert fidelity.state.num_skipped["failed"] == 2 and fidelity.state.num_answers == 0
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "could not be compared" in record.getMessage()
    read_model(bench).fail = lambda position_ids: None
    bench.generate(PROMPT, ANSWER)
    assert compare(bench).state.num_answers == 1


def test_logits_that_are_no_numbers_are_not_counted(build: Build) -> None:
    def spoil(input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        logits[...] = torch.nan

    bench = build()
    bench.generate(PROMPT, ANSWER)
    read_model(bench).spoil = spoil
    fidelity = compare(bench)
    assert fidelity.state.num_skipped["failed"] == 1 and fidelity.state.total.num_tokens == 0


def test_what_is_left_out_is_counted(build: Build) -> None:
    bench = build(num_blocks=8)
    longest = fidelity_of(bench).max_tokens
    assert longest == 4 + 128 + 8 * 64 + 63  # one more makes a ninth block
    long = [5] * (longest - 10)
    bench.generate(long, ANSWER)
    assert compare(bench).state.total.num_tokens == 10 + 1
    bench.generate([5] * (longest + 1), ANSWER)
    bench.generate(PROMPT[:20], ANSWER)
    for index in range(MAX_ANSWERS + 2):
        bench.engine.add_request(str(index), PROMPT[:200], ANSWER)
    bench.run()
    state = compare(bench).state
    assert state.num_skipped == {"too_long": 1, "too_short": 1, "busy": 2, "failed": 0}
    assert state.num_answers == 1 + MAX_ANSWERS


def test_an_answer_that_is_given_up_counts_as_far_as_it_came(build: Build) -> None:
    bench = build(overlaps_steps=True)
    bench.engine.add_request("r", PROMPT, ANSWER)
    outputs = [output for _ in range(30) for output in bench.engine.step()]
    bench.engine.abort_request("r")
    bench.check_empty()
    assert compare(bench).state.total.num_tokens == len(outputs) - 1


def test_the_rate_is_kept_and_the_same_requests_are_taken(build: Build) -> None:
    def taken(rate: float) -> list[bool]:
        fidelity = fidelity_of(build(rate))
        chosen = []
        for _ in range(400):
            answer = fidelity.begin(10)
            chosen.append(answer is not None)
            if answer is not None:
                fidelity.end(answer, [])
        return chosen

    assert taken(0.2) == taken(0.2)
    assert 50 < sum(taken(0.2)) < 110 and sum(taken(1.0)) == 400


def test_the_thread_compares_while_it_is_idle_and_ends_in_between(build: Build) -> None:
    bench = build()
    engine = AsyncEngine(bench.engine)
    engine.start()

    async def collect(prompt: list[int], request_id: str, num_tokens: int) -> list[RequestOutput]:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        return [output async for output in engine.generate(prompt, params, request_id)]

    async def run() -> None:
        await collect(PROMPT, "a", 60)
        deadline = time.monotonic() + TIMEOUT
        while not fidelity_of(bench).state.num_answers:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)
        assert engine.seconds_in_step == 0
        outputs = engine.generate(PROMPT, ANSWER, "left")
        await anext(outputs)
        await outputs.aclose()
        await collect([5] * 1800, "long", 20)
        assert len(await collect(PROMPT[:30], "b", 3)) == 3

    try:
        asyncio.run(run())
    finally:
        engine.shutdown()
    bench.check_empty()
