"""Two ranks, each with half of a model's heads, give the tokens of one; here on a CPU, with gloo."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from turboquant_server.config import ServerConfig
from turboquant_server.engine.grammar import GrammarKind
from turboquant_server.engine.request import RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_manager import ModelManager

pytestmark = [
    pytest.mark.usefixtures("no_variables"),
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers asks for it"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="ranks take the GPUs"),
]

TIMEOUT = 30
PROMPT = list(range(5, 215))
SHARED = PROMPT[:140]
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    }
)


@contextmanager
def loaded(model_dir: Path, num_ranks: int, **options: Any) -> Iterator[ModelManager]:
    """Serve a model with so many ranks; what they store together is the same."""
    manager = ModelManager(
        ServerConfig(
            model=str(model_dir),
            device="cpu",
            tensor_parallel_size=num_ranks,
            kv_cache_memory=3400 * 2**10 // num_ranks,
            max_num_seqs=6,
            **options,
        )
    )
    manager.load()
    try:
        yield manager
    finally:
        manager.unload()


@pytest.fixture(scope="module")
def one_rank(tiny_model_dir: Path) -> Iterator[ModelManager]:
    with loaded(tiny_model_dir, 1) as manager:
        yield manager


@pytest.fixture(scope="module")
def two_ranks(tiny_model_dir: Path) -> Iterator[ModelManager]:
    with loaded(tiny_model_dir, 2) as manager:
        yield manager


@dataclass(frozen=True)
class Asked:
    """A request, and after how many tokens its client leaves."""

    prompt: list[int]
    sampling_params: SamplingParams
    leaves_after: int | None = None


async def answer(manager: ModelManager, asked: Asked, request_id: str) -> list[RequestOutput]:
    outputs = []
    stream = manager.engine.generate(asked.prompt, asked.sampling_params, request_id)
    async for output in stream:
        outputs.append(output)
        if len(outputs) == asked.leaves_after:
            break
    await stream.aclose()
    return outputs


def answers(manager: ModelManager, requests: list[Asked]) -> list[dict[int, tuple[list[int], str, Any]]]:
    """Return what each choice of each request got, all asked for at once."""

    async def ask() -> list[list[RequestOutput]]:
        tasks = [answer(manager, asked, f"{index}") for index, asked in enumerate(requests)]
        return await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT)

    results = []
    for outputs in asyncio.run(ask()):
        choices: dict[int, tuple[list[int], str, Any]] = {}
        for output in outputs:
            ids, text, _ = choices.get(output.choice_index, ([], "", None))
            end = output.finish_reason, output.num_cached_tokens, output.stop_string
            choices[output.choice_index] = [*ids, *output.token_ids], text + output.text, end
        results.append(choices)
    while manager.engine.num_running:
        time.sleep(0.01)
    time.sleep(0.05)  # for the step that ended the last one
    manager.check_integrity()
    return results


def requests_of_all_kinds(manager: ModelManager) -> list[Asked]:
    grammar = manager.grammars.compile(GrammarKind.JSON_SCHEMA, SCHEMA)
    greedy: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    return [
        Asked(PROMPT, SamplingParams(**greedy)),
        Asked([*SHARED, 7, 8, 9], SamplingParams(max_tokens=24, seed=1, ignore_eos=True)),
        Asked(PROMPT[60:90], SamplingParams(max_tokens=24, seed=2, top_p=0.9, n=3, logprobs=2)),
        Asked(PROMPT[3:50], SamplingParams(max_tokens=60, seed=3, temperature=0.7, grammar=grammar)),
        Asked(PROMPT[9:40], SamplingParams(max_tokens=24, seed=4, repetition_penalty=1.3, min_tokens=9)),
        Asked(PROMPT[1:40], SamplingParams(max_tokens=40, seed=5, stop=("a", "e"))),
        Asked(PROMPT[2:99], SamplingParams(max_tokens=800, temperature=0, ignore_eos=True), leaves_after=4),
        Asked(PROMPT[:30], SamplingParams(max_tokens=4, temperature=0, prompt_logprobs=1)),
    ]


def test_two_ranks_give_the_tokens_of_one(one_rank: ModelManager, two_ranks: ModelManager) -> None:
    expected, got = (answers(manager, requests_of_all_kinds(manager)) for manager in (one_rank, two_ranks))
    assert got == expected
    assert got[5][0][2][2] in ("a", "e")  # it has met a stop string
    assert json.loads(got[3][0][1]).keys() == {"a"}


def test_both_find_what_they_have_read(one_rank: ModelManager, two_ranks: ModelManager) -> None:
    prompt = [5 + 7 * index % 200 for index in range(700)]
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    for ending in ([], [9, 8]):
        expected, got = (
            answers(manager, [Asked([*prompt, *ending], params)]) for manager in (one_rank, two_ranks)
        )
        assert got == expected
    assert got[0][0][2][1] == 4 + 512


def test_a_request_that_waits_for_blocks_gets_the_same_tokens(
    one_rank: ModelManager, two_ranks: ModelManager
) -> None:
    params = SamplingParams(max_tokens=250, temperature=0, ignore_eos=True)
    requests = [Asked([index, *PROMPT, *PROMPT, *PROMPT], params) for index in range(5, 11)]
    expected, got = answers(one_rank, requests), answers(two_ranks, requests)
    assert two_ranks.engine.num_preemptions == one_rank.engine.num_preemptions > 0
    assert got == expected


def test_what_is_told_counts_ranks_once(one_rank: ModelManager, two_ranks: ModelManager) -> None:
    one, two = one_rank.engine_state(), two_ranks.engine_state()
    assert one is not None and two is not None
    assert one.num_capacity_tokens == two.num_capacity_tokens
    assert "2 tensor-parallel ranks, cpu" in two_ranks.startup_report()
    assert "MiB a rank for" in two_ranks.startup_report()
