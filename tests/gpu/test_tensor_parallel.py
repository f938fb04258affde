"""Two GPUs that share the bundled model give its answers, with CUDA graphs, and end as one."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from pathlib import Path

import openai
import pytest
import torch
from served_ranks import Server, served

from turboquant_server.config import ServerConfig
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_manager import ModelManager

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs"),
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers asks for it"),
]

SIZE = ["--tensor-parallel-size", "2"]
FACT = "The access code of the harbour is 271828."


def ask(server: Server, num_words: int) -> str | None:
    text = f"{FACT} {'The sea is calm today. ' * num_words}What is the access code of the harbour?"
    completion = server.client.chat.completions.create(
        model="turboquant-demo", temperature=0, messages=[{"role": "user", "content": text}]
    )
    return completion.choices[0].message.content


@pytest.mark.parametrize("flags", [[], ["--enforce-eager"]], ids=["graphs", "eager"])
def test_two_gpus_find_what_one_finds(tmp_path: Path, flags: list[str]) -> None:
    with served(tmp_path, [*SIZE, *flags, "--kv-cache-memory", "256MiB"]) as server:
        assert [ask(server, num_words) for num_words in (0, 100, 500)] == ["271828"] * 3
        server.process.terminate()
        assert server.wait() == 0
        log = server.log.read_text()
    assert "2 tensor-parallel ranks, cuda" in log
    assert "without CUDA graphs" not in log


def test_steps_of_two_gpus_are_graphs_that_overlap() -> None:
    manager = ModelManager(ServerConfig(tensor_parallel_size=2, kv_cache_memory=256 * 2**20))
    manager.load()
    try:
        engine = manager.engine._engine
        assert engine._overlaps_steps and engine._model_runner.graphs is not None
        params = SamplingParams(max_tokens=50, seed=1, ignore_eos=True)

        async def count() -> int:
            return sum(
                [len(output.token_ids) async for output in manager.engine.generate([5, 6], params, "1")]
            )

        assert asyncio.run(count()) == 50
    finally:
        manager.unload()


def test_a_gpu_that_is_lost_ends_the_server(tmp_path: Path) -> None:
    with served(tmp_path, SIZE) as server:
        os.kill(server.follower, signal.SIGKILL)
        with pytest.raises(openai.APIError):
            ask(server, 0)
        assert server.wait() == 1
        assert "rank 1 of 2 has ended by SIGKILL, and the server with it" in server.log.read_text()
