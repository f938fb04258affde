"""What is compiled for a GPU serves steps of any size with the model's tokens; nothing is compiled later."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
import torch

from turboquant_server.config import ServerConfig
from turboquant_server.engine import compiled_forward
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_manager import ModelManager

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    # The parts of torch 2.11 that compile warn of others when they are imported.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

DEMO = Path(__file__).resolve().parents[2] / "turboquant_server" / "demo"


def num_graphs() -> int:
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def answers() -> tuple[int, list[list[int]]]:
    """Serve requests of many lengths; return how many graphs were compiled before, and the tokens."""
    manager = ModelManager(ServerConfig(dtype="bfloat16", kv_cache_memory=2**30, max_num_seqs=12))
    manager.load()
    try:
        before = num_graphs()
        token_ids = manager.tokenizer.backend_tokenizer.encode((DEMO / "held_out.txt").read_text("utf-8")).ids

        async def answer(index: int) -> list[int]:
            prompt = token_ids[997 * index : 997 * index + 1 + 190 * index]
            params = SamplingParams(max_tokens=20 + 7 * index, temperature=0.0, ignore_eos=True)
            outputs = manager.engine.generate(prompt, params, str(index))
            return [token async for output in outputs for token in output.token_ids]

        async def answer_all() -> list[list[int]]:
            return await asyncio.gather(*map(answer, range(12)))

        result = asyncio.run(answer_all())
        assert num_graphs() == before
        return before, result
    finally:
        manager.unload()


def test_tokens_are_those_of_the_model_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr(compiled_forward, "BACKENDS", {})
        graphs, expected = answers()
        assert graphs == 0
    graphs, computed = answers()
    assert 1 <= graphs <= 2
    assert [len(tokens) for tokens in computed] == [20 + 7 * index for index in range(12)]
    # Compiled code rounds less often, and a near tie may fall the other way.
    assert sum(one[:8] == other[:8] for one, other in zip(computed, expected, strict=True)) >= 10
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any("uncompiled" in message for message in warnings)
