"""Decode steps as graphs, with a stand-in for those of CUDA: rows and states are those of their requests."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import architectures
import pytest
import torch
from engine_bench import Bench, greedy, tokens_of
from fake_graphs import FakeGraph, FakeRecorder, RowAttention
from no_attention import NoAttention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

from turboquant_core import (
    PagedStore,
    StatePool,
    Timeline,
    forward_context,
    use_paged_attention,
)
from turboquant_server.attention_check import find_attention
from turboquant_server.engine import decode_graphs
from turboquant_server.engine.model_forward import ModelForward
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.request import RequestFailedError

NAMES = [*architectures.STATES, *architectures.MAMBA1]
NUM_SLOTS = 6  # sizes 1, 2, 3, 4 and 6: five requests leave a row free
# Over the experts that have tokens; the last one in older releases of transformers.
LOOPS_ON_THE_HOST = {"dbrx", "jetmoe", "aria_text"}
PROMPT_LENGTHS = {"a": 150, "b": 9, "c": 75, "d": 1, "e": 30}


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "_Recorder", FakeRecorder)
    monkeypatch.setattr(decode_graphs, "DecodeAttention", RowAttention)


def build(name: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Bench:
    model = architectures.build(name)
    attention = find_attention(model, tokenizer, architectures.NUM_POSITIONS)
    options = {"num_blocks": 30, "num_slots": NUM_SLOTS, "max_num_batched_tokens": 130, **options}
    bench = Bench(
        model,
        tokenizer,
        attention=attention,
        timeline=Timeline(residual_length=64, segment_size=64),
        bits=None,
        caches_prefixes=False,
        eos_token_ids=(),
        **options,
    )
    # Without the wrapper, which does not know all names that models have for their cache.
    runner_of(bench)._model = bench.model.model
    runner_of(bench)._model_forward = ModelForward(bench.model.model)
    return bench


def runner_of(bench: Bench) -> ModelRunner:
    return bench.engine._model_runner


def capture(bench: Bench) -> None:
    runner_of(bench).capture_graphs(NUM_SLOTS, architectures.NUM_POSITIONS)


def states_of(bench: Bench) -> list[Tensor]:
    states = runner_of(bench)._states
    assert states is not None
    return [state.clone() for slot in range(NUM_SLOTS) for state in states.of_slot(slot)]


def serve(
    bench: Bench, num_tokens: int = 12, lengths: dict[str, int] = PROMPT_LENGTHS
) -> dict[str, list[int]]:
    """Serve requests that come, fork, leave and are aborted; return their tokens, by request and choice."""
    generator = torch.Generator().manual_seed(1)
    for index, (request_id, length) in enumerate(lengths.items()):
        prompt = torch.randint(3, architectures.VOCAB_SIZE, (length,), generator=generator).tolist()
        params = greedy(num_tokens + 3 * index, ignore_eos=True)
        if request_id == "b":
            params = dataclasses.replace(params, temperature=1.0, seed=3, n=2)
        bench.engine.add_request(request_id, prompt, params)
    tokens: dict[str, list[int]] = {}
    for number in range(1000):
        if not bench.engine.has_unfinished_requests:
            break
        if number == 8:
            bench.engine.abort_request("c")
        for output in bench.engine.step():
            assert not isinstance(output, RequestFailedError), output
            tokens.setdefault(f"{output.request_id}{output.choice_index}", []).extend(output.token_ids)
    bench.check_empty()
    return tokens


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_states_are_those_of_steps_without(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    expected_bench, bench = (build(name, tiny_tokenizer) for _ in range(2))
    expected = serve(expected_bench)
    capture(bench)
    assert runner_of(bench).graphs is not None
    assert serve(bench) == expected
    assert len(states_of(bench)) >= NUM_SLOTS
    assert [len(expected[key]) for key in ("a0", "b0", "b1", "d0", "e0")] == [12, 15, 15, 21, 24]
    for state, reference in zip(states_of(bench), states_of(expected_bench), strict=True):
        torch.testing.assert_close(
            state, reference, rtol=1e-4, atol=1e-4 * (1 + reference.abs().max().item())
        )


@pytest.mark.parametrize("overlaps_steps", [False, True])
@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_preempted_requests_go_on_from_their_states(
    name: str, overlaps_steps: bool, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths = {"a": 100, "b": 75, "e": 90}
    expected = serve(build(name, tiny_tokenizer), 90, lengths)
    bench = build(name, tiny_tokenizer, num_blocks=3, overlaps_steps=overlaps_steps)
    capture(bench)
    assert serve(bench, 90, lengths) == expected
    assert bench.scheduler.num_preemptions > 0


@torch.inference_mode()
def test_rows_without_a_request_touch_no_slot(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    bench = build("qwen3_5_text", tiny_tokenizer)
    capture(bench)
    states = runner_of(bench)._states
    assert states is not None
    for slot in range(1, NUM_SLOTS):
        for state in states.of_slot(slot):
            state.fill_(torch.nan)
    bench.engine.add_request("r", [5] * 9, greedy(4, ignore_eos=True))
    graphs = runner_of(bench).graphs
    assert graphs is not None
    graphs._sizes = [4, 6]  # so that three rows are free
    assert len(tokens_of(bench.run()["r"])) == 4
    for slot in range(1, NUM_SLOTS):
        assert all(state.isnan().all() for state in states.of_slot(slot))
    assert all(state.isfinite().all() for state in states.of_slot(0))


class _Host(TorchDispatchMode):
    """Refuse what makes the host wait for the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = (
            args[1] if function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) else []
        )
        assert not any(index is not None and index.dtype == torch.bool for index in indices), function
        assert function.overloadpacket.__name__ not in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "_unique2",
            "is_nonzero",
        ), function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", sorted({*NAMES, *architectures.MIXTURES} - LOOPS_ON_THE_HOST))
@torch.inference_mode()
def test_a_step_never_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.build(name)
    assert use_paged_attention(model)
    store = PagedStore(
        {}, [], Timeline(), num_blocks=[], num_slots=4, dtype=model.dtype, device=torch.device("cpu")
    )
    runner = ModelRunner(model, store, StatePool(4), is_paged=True)
    rows = torch.tensor([5, 6, 7]), torch.tensor([9, 0, 3]), torch.tensor([2, 0, -1])
    with forward_context(NoAttention()):
        runner._decode(*rows)  # states get their memory
    for method in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, method, None)
    with forward_context(NoAttention()), _Host():
        runner._decode(*rows)


def test_what_cannot_be_captured_is_served_without(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = serve(build("lfm2", tiny_tokenizer))

    def fail(self: FakeRecorder, step: object) -> Any:
        raise RuntimeError("the stream is capturing\nand so on")

    monkeypatch.setattr(FakeRecorder, "record", fail)
    bench = build("lfm2", tiny_tokenizer)
    with caplog.at_level(logging.WARNING):
        capture(bench)
    assert caplog.messages == ["decode steps run without CUDA graphs: the stream is capturing (RuntimeError)"]
    assert runner_of(bench).graphs is None
    assert serve(bench) == expected


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "mamba2"])
@pytest.mark.parametrize("captured", ["tokens", "slots", "places", "nothing"])
def test_graphs_that_compute_something_else_are_not_used(
    name: str,
    captured: str,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From the third on, they go on with what they were captured with, write elsewhere, too, or are empty."""
    if captured == "slots" and name == "llama":
        pytest.skip("a layer that attends finds its slots by itself")
    if captured == "places" and name == "mamba2":
        pytest.skip("it has no tokens in slots")
    bench = build(name, tiny_tokenizer)
    decode = runner_of(bench)._decode
    num_captured = 0

    def record(self: FakeRecorder, step: Callable[[], None]) -> Any:
        nonlocal num_captured
        num_captured += 1
        is_wrong = num_captured >= 3

        def wrong_step() -> None:
            nonlocal is_replay
            is_replay = is_wrong
            step()
            is_replay = False
            if is_wrong and captured == "places":
                keys, _ = next(iter(bench.store.exact.values()))
                keys[0, :, 7] = keys[0, :, 0]

        step()
        return FakeGraph(wrong_step) if captured != "nothing" or not is_wrong else FakeGraph(lambda: None)

    is_replay = False

    def wrong_decode(input_ids: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        if is_replay and captured == "tokens":
            input_ids = torch.full_like(input_ids, 7)
        if is_replay and captured == "slots":
            slots = torch.full_like(slots, 2)
        return decode(input_ids, positions, slots)

    monkeypatch.setattr(runner_of(bench), "_decode", wrong_decode)
    monkeypatch.setattr(FakeRecorder, "record", record)
    with caplog.at_level(logging.WARNING):
        capture(bench)
    [message] = caplog.messages
    assert message.startswith("decode steps run without CUDA graphs: the graph of ")
    assert message.endswith(" rows computes something else than the model")
    assert runner_of(bench).graphs is None


def test_a_step_whose_states_have_moved_on_is_not_tried_again(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = build("qwen3_5_text", tiny_tokenizer)
    capture(bench)
    for request_id in ("a", "b"):
        bench.engine.add_request(request_id, [5] * 9, greedy(6, ignore_eos=True))
    bench.engine.step()

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError

    num_steps = 0
    graphs = runner_of(bench).graphs
    assert graphs is not None
    run = graphs.run

    def count(input_ids: Tensor) -> Tensor:
        nonlocal num_steps
        num_steps += 1
        return run(input_ids)

    monkeypatch.setattr(graphs, "run", count)
    monkeypatch.setattr(bench.store, "make_due_blocks", fail)
    outputs = bench.run()
    assert num_steps == 1
    assert all(isinstance(outputs[request_id][-1], RequestFailedError) for request_id in ("a", "b"))
