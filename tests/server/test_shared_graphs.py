"""Graphs are captured by all ranks or by none, and none waits for one that cannot; on GPUs made up."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_bench import Bench
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from turboquant_server.engine import decode_graphs, ranks
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.ranks import ALONE, Ranks
from turboquant_server.load_error import ModelLoadError

TIMEOUT = 20
MAX_BATCH = 4

# Is called with whether a forward is captured.
Forward = Callable[[bool], None]


@pytest.fixture
def capture(
    monkeypatch: pytest.MonkeyPatch, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[[Ranks, Forward], bool]:
    """Return a function that lets a rank capture graphs, and returns whether it has them then."""
    of_thread = threading.local()

    @contextmanager
    def graph(graph: object, **options: Any) -> Iterator[None]:
        of_thread.captures = True
        try:
            yield
        finally:
            of_thread.captures = False

    stream = SimpleNamespace(wait_stream=lambda other: None, device=None)
    cuda = SimpleNamespace(
        graph=graph,
        graph_pool_handle=lambda: None,
        Stream=lambda device: stream,
        current_stream=lambda device: stream,
        stream=lambda stream: nullcontext(),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
    )
    monkeypatch.setattr(decode_graphs.torch, "cuda", cuda)

    def capture(ranks: Ranks, forward: Forward) -> bool:
        bench = Bench(tiny_model, tiny_tokenizer)
        model: Any = bench.model
        runner: Any = ModelRunner(model, bench.store, None, is_paged=True, ranks=ranks)

        def call_model(input_ids: torch.Tensor, *arguments: object) -> torch.Tensor:
            forward(getattr(of_thread, "captures", False))
            return torch.zeros(len(input_ids), 1, 300)

        runner._call_model = call_model
        runner.capture_graphs(MAX_BATCH, 512)
        return runner.graphs is not None

    return capture


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> list[Ranks]:
    """Two ranks of this process that have met on the host."""
    monkeypatch.setattr(ranks, "MEETING_TIMEOUT", timedelta(seconds=TIMEOUT))
    listener = socket.create_server((ranks.LOOPBACK, 0))
    port, descriptor = listener.getsockname()[1], listener.detach()
    two = [Ranks(rank, 2, torch.device("cpu")) for rank in range(2)]
    for one in two:
        options = {"master_listen_fd": descriptor} if one.rank == 0 else {}
        one._store = dist.TCPStore(
            ranks.LOOPBACK, port, None, one.rank == 0, wait_for_workers=False, **options
        )
    return two


def test_forwards_that_compute_come_before_those_that_are_captured(
    capture: Callable[[Ranks, Forward], bool],
) -> None:
    captured: list[bool] = []
    assert capture(ALONE, captured.append)
    assert captured == sorted(captured) and captured.count(True) == MAX_BATCH


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_a_rank_that_cannot_capture_keeps_the_others_from_it_and_holds_up_none(
    capture: Callable[[Ranks, Forward], bool],
    two_ranks: list[Ranks],
    failing: int | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    together = threading.Barrier(2)  # stands for what ranks do together in a forward

    def run(one: Ranks) -> bool:
        num_captured = 0

        def forward(is_captured: bool) -> None:
            nonlocal num_captured
            num_captured += is_captured
            if not is_captured:
                together.wait(TIMEOUT)
            elif one.rank == failing and num_captured == 2:
                raise torch.OutOfMemoryError("no room\nfor more")

        return capture(one, forward)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, two_ranks)) == [failing is None] * 2
    assert not together.broken
    expected = "decode steps run without CUDA graphs: no room (OutOfMemoryError)"
    assert caplog.messages == ([] if failing is None else [expected] * 2)


def test_a_rank_that_the_others_do_not_meet_ends_with_one_sentence(
    two_ranks: list[Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "MEETING_TIMEOUT", timedelta(milliseconds=50))
    with pytest.raises(ModelLoadError, match=r"on all GPUs \(no room\); start with --enforce-eager"):
        two_ranks[1].any_failure("no room")


def test_what_fails_in_a_forward_that_computes_is_survived_by_one_gpu_alone(
    capture: Callable[[Ranks, Forward], bool], two_ranks: list[Ranks], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(is_captured: bool) -> None:
        raise torch.OutOfMemoryError("no room")

    with caplog.at_level(logging.WARNING):
        assert not capture(ALONE, fail)
    assert caplog.messages == ["decode steps run without CUDA graphs: no room (OutOfMemoryError)"]
    with pytest.raises(torch.OutOfMemoryError):
        capture(two_ranks[0], fail)
