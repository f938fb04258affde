"""Decode steps in CUDA graphs give the tokens of steps without, in batches of any size."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
import torch

from turboquant_server.config import ServerConfig
from turboquant_server.engine import model_runner
from turboquant_server.engine.pending_step import PendingStep
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.engine.scheduler import ScheduledBatch
from turboquant_server.model_manager import ModelManager

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("uncompiled"),
]

DEMO = Path(__file__).resolve().parents[2] / "turboquant_server" / "demo"


def answers(*, enforce_eager: bool = False, has_graphs: bool = True) -> list[list[int]]:
    """Serve requests of all lengths that come and go, so that most batches have rows to spare."""
    config = ServerConfig(
        dtype="bfloat16", kv_cache_memory=2**30, max_num_seqs=20, enforce_eager=enforce_eager
    )
    manager = ModelManager(config)
    manager.load()
    try:
        assert (manager.engine._engine._model_runner.graphs is not None) == has_graphs
        token_ids = manager.tokenizer.backend_tokenizer.encode((DEMO / "held_out.txt").read_text("utf-8")).ids

        async def answer(index: int) -> list[int]:
            prompt = token_ids[997 * index : 997 * index + 5 + 170 * index]
            params = SamplingParams(max_tokens=30 + 11 * index, temperature=0.0, ignore_eos=True)
            outputs = manager.engine.generate(prompt, params, str(index))
            return [token async for output in outputs for token in output.token_ids]

        async def answer_all() -> list[list[int]]:
            return await asyncio.gather(*(answer(index) for index in range(24)))

        result = asyncio.run(answer_all())
        manager.check_integrity()
        return result
    finally:
        manager.unload()


def test_tokens_are_those_of_steps_without_graphs() -> None:
    with_graphs, without = answers(), answers(enforce_eager=True, has_graphs=False)
    assert [len(tokens) for tokens in with_graphs] == [30 + 11 * index for index in range(24)]
    # A step's batch has other shapes, so bfloat16 rounds otherwise, and a near tie may fall the other way.
    num_same = sum(
        sum(1 for a, b in zip(one, other, strict=True) if a == b)
        for one, other in zip(with_graphs, without, strict=True)
    )
    num_tokens = sum(map(len, without))
    print(f"{num_same} of {num_tokens} tokens are the same")
    assert num_same > 0.5 * num_tokens
    assert sum(a[:10] == b[:10] for a, b in zip(with_graphs, without, strict=True)) >= 22


def test_a_model_that_cannot_be_captured_is_served_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = model_runner.ModelRunner._call_model

    def call_and_wait(self: model_runner.ModelRunner, *args: object) -> torch.Tensor:
        logits = original(self, *args)  # type: ignore[arg-type]
        float(logits.sum())
        return logits

    monkeypatch.setattr(model_runner.ModelRunner, "_call_model", call_and_wait)
    with caplog.at_level(logging.WARNING):
        answers(has_graphs=False)
    assert any("decode steps run without CUDA graphs" in message for message in caplog.messages)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_launching_a_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, enforce_eager: bool) -> None:
    launch = model_runner.ModelRunner.launch
    num_launched = 0

    def launch_or_raise(runner: model_runner.ModelRunner, batch: ScheduledBatch) -> PendingStep:
        nonlocal num_launched
        num_launched += 1
        # The first steps load what libraries need.
        torch.cuda.set_sync_debug_mode("error" if num_launched > 3 else "default")
        try:
            return launch(runner, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(model_runner.ModelRunner, "launch", launch_or_raise)
    manager = ModelManager(
        ServerConfig(dtype="bfloat16", kv_cache_memory=2**30, max_num_seqs=12, enforce_eager=enforce_eager)
    )
    manager.load()
    try:
        prompts = [[5 + (index + i) % 200 for i in range(50 + 400 * index)] for index in range(6)]

        async def count(index: int) -> int:
            params = SamplingParams(
                max_tokens=150, temperature=index % 3, top_p=0.9, seed=1, n=1 + index % 2, ignore_eos=True
            )
            outputs = manager.engine.generate(prompts[index], params, str(index))
            return sum([len(output.token_ids) async for output in outputs])

        async def count_all() -> list[int]:
            return await asyncio.gather(*(count(index) for index in range(6)))

        assert asyncio.run(count_all()) == [150, 300] * 3
        assert num_launched > 150
        manager.check_integrity()
    finally:
        manager.unload()
