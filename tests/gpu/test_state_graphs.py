"""Graphs of models with states, experts or both give the tokens of steps without."""

from __future__ import annotations

import asyncio
import logging

import architectures
import pytest
import torch
from tiny_tokenizer import VOCAB_SIZE, build_tokenizer

from turboquant_server.config import ServerConfig
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_loader import LoadedModel
from turboquant_server.model_manager import ModelManager

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("uncompiled"),
]

# States of two kinds beside attention and experts, both in one layer, of one kind, alone, and of a model that
# reads prompts in one step.
HYBRIDS = ["qwen3_next", "falcon_h1", "lfm2", "mamba2", "jamba"]
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]
# Before, torch multiplies with experts one by one, and waits for the device to know how many tokens each has.
NEEDED_FOR_EXPERTS = (9, 0)
NUM_REQUESTS = 24


@pytest.fixture(autouse=True)
def tokens_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(architectures.BASE, "vocab_size", VOCAB_SIZE)


def answers(name: str, *, enforce_eager: bool) -> list[list[int]]:
    """Serve requests of all lengths that come, fork and go, so that most batches have rows to spare."""
    model = architectures.build(name).to("cuda", torch.bfloat16)
    manager = ModelManager(
        ServerConfig(dtype="bfloat16", kv_cache_memory=2**28, max_num_seqs=20, enforce_eager=enforce_eager)
    )
    manager.load(LoadedModel(model, build_tokenizer(), architectures.NUM_POSITIONS))
    try:
        assert (manager.engine._engine._model_runner.graphs is None) == enforce_eager
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, VOCAB_SIZE, (NUM_REQUESTS, 120), generator=generator).tolist()

        async def answer(index: int) -> list[int]:
            params = SamplingParams(
                max_tokens=20 + 4 * index, temperature=0.0, ignore_eos=True, n=1 + index % 2
            )
            outputs = manager.engine.generate(tokens[index][: 5 + 4 * index], params, str(index))
            choices: list[list[int]] = [[], []]
            async for output in outputs:
                choices[output.choice_index] += output.token_ids
            assert len(choices[1]) == index % 2 * len(choices[0])
            return choices[0]

        async def answer_all() -> list[list[int]]:
            return await asyncio.gather(*map(answer, range(NUM_REQUESTS)))

        result = asyncio.run(answer_all())
        manager.check_integrity()
        return result
    finally:
        manager.unload()


@pytest.mark.parametrize("name", HYBRIDS + MIXTURES)
def test_tokens_are_those_of_steps_without_graphs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    has_experts = name in [*MIXTURES, "qwen3_next", "jamba"]
    if has_experts and torch.cuda.get_device_capability() < NEEDED_FOR_EXPERTS:
        pytest.skip("torch waits for the device to multiply with experts")
    without = answers(name, enforce_eager=True)
    with caplog.at_level(logging.WARNING):
        with_graphs = answers(name, enforce_eager=False)
    assert not any("without CUDA graphs" in message for message in caplog.messages)
    assert [len(tokens) for tokens in with_graphs] == [20 + 4 * index for index in range(NUM_REQUESTS)]
    # A step's batch has other shapes, so bfloat16 rounds otherwise, and a near tie may fall the other way.
    num_same = sum(a[:10] == b[:10] for a, b in zip(with_graphs, without, strict=True))
    print(f"{num_same} of {NUM_REQUESTS} answers begin alike")
    assert num_same >= 18
