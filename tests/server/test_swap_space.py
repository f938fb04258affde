"""--swap-space: a prompt that comes back from the host is answered as one that never left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from engine_bench import Bench, greedy, tokens_of
from pydantic import ValidationError
from scrape import Scrape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from turboquant_core import Timeline
from turboquant_server import swap_space
from turboquant_server.attention_check import find_attention
from turboquant_server.config import ServerConfig
from turboquant_server.model_manager import ModelLoadError, ModelManager
from turboquant_server.swap_space import measure_swap

pytestmark = pytest.mark.usefixtures("no_variables")

Loaded = Callable[..., AbstractContextManager[ModelManager]]

MIB = 2**20
SHORT = Timeline(residual_length=64, segment_size=128)
LENGTH = 900  # 12 blocks of it can be found again


def prompt(seed: int, length: int = LENGTH) -> list[int]:
    return torch.randint(5, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_bench(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_blocks: int, **options: Any
) -> Bench:
    return Bench(model, tokenizer, timeline=SHORT, num_blocks=num_blocks, bits=3, **options)


@pytest.mark.parametrize("overlaps_steps", [False, True])
def test_a_prompt_from_the_host_gets_the_tokens_of_one_that_was_computed(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, overlaps_steps: bool
) -> None:
    bench = make_bench(tiny_model, tiny_tokenizer, 14, num_host_blocks=40, overlaps_steps=overlaps_steps)
    first = bench.generate(prompt(0), greedy(70))
    assert first[0].num_cached_tokens == 0
    records = [records.clone() for records in bench.store.records.values()]
    bench.generate(prompt(1), greedy(70))
    assert any(map(torch.Tensor.any, map(torch.ne, records, bench.store.records.values())))
    again = bench.generate(prompt(0), greedy(70))
    assert tokens_of(again) == tokens_of(first)
    assert again[0].num_cached_tokens == 4 + 12 * 64
    usage = measure_swap(bench.manager)
    assert (usage.num_hit_tokens, usage.num_blocks_in) == (12 * 64, 12)
    assert usage.num_blocks_out >= 12 and 0 < usage.share <= 1


def test_what_is_on_the_device_in_part_is_completed_from_the_host(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    bench = make_bench(tiny_model, tiny_tokenizer, 20, num_host_blocks=40)
    first = bench.generate(prompt(0), greedy(10))
    bench.generate(prompt(1), greedy(10))  # takes the last blocks of the other
    again = bench.generate(prompt(0), greedy(10))
    assert tokens_of(again) == tokens_of(first)
    assert again[0].num_cached_tokens == 4 + 12 * 64
    assert 0 < measure_swap(bench.manager).num_hit_tokens < 12 * 64


def test_only_a_request_with_the_same_salt_finds_it(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    bench = make_bench(tiny_model, tiny_tokenizer, 16, num_host_blocks=40)
    for token_ids, salt in ((prompt(0), "a"), (prompt(1), "")):
        bench.generate(token_ids, greedy(2), cache_salt=salt)
    assert bench.generate(prompt(0), greedy(2))[0].num_cached_tokens == 0
    assert bench.generate(prompt(0), greedy(2), cache_salt="a")[0].num_cached_tokens == 4 + 12 * 64


@pytest.mark.parametrize("num_host_blocks", [3, 30])
def test_a_crowd_in_a_small_cache_gets_what_each_of_it_gets_alone(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, num_host_blocks: int
) -> None:
    """By preemption, with aborts, of prompts that share their beginnings."""
    alone = make_bench(tiny_model, tiny_tokenizer, 40, caches_prefixes=False)
    small = make_bench(tiny_model, tiny_tokenizer, 16, num_host_blocks=num_host_blocks, overlaps_steps=True)
    requests = {
        str(index): prompt(index % 3)[: 400 + 50 * (index % 7)] + prompt(50 + index, 20)
        for index in range(10)
    }
    outputs: dict[str, list[Any]] = {}
    for turn in range(2):  # a second time, they may come from the host
        for request_id, token_ids in requests.items():
            small.engine.add_request(f"{request_id} {turn}", token_ids, greedy(40))
        for step in range(9):
            for output in small.engine.step():
                outputs.setdefault(output.request_id, []).append(output)
            if step % 3 == 2:
                small.engine.abort_request(f"{step} {turn}")
            small.manager.check_integrity()
        for request_id, more in small.run().items():
            outputs.setdefault(request_id, []).extend(more)
    assert small.scheduler.num_preemptions > 0
    assert measure_swap(small.manager).num_hit_tokens > 0
    for request_id, token_ids in requests.items():
        expected = tokens_of(alone.generate(token_ids, greedy(40)))
        for turn in range(2):
            got = tokens_of(outputs.get(f"{request_id} {turn}", []))
            assert got == expected[: len(got)]
            assert len(got) == len(expected) or request_id in ("2", "5", "8")


@pytest.mark.parametrize("name", ["gemma3_text", "llama4_text"])
def test_layers_with_windows_come_back_too(
    save_model: Callable[..., Path], name: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_model(name)).eval()
    attention = find_attention(model, tiny_tokenizer, 2048)
    bench = make_bench(model, tiny_tokenizer, 16, attention=attention, num_host_blocks=40)
    first = bench.generate(prompt(0), greedy(30))
    bench.generate(prompt(1), greedy(30))
    again = bench.generate(prompt(0), greedy(30))
    assert tokens_of(again) == tokens_of(first)
    assert (first[0].num_cached_tokens, again[0].num_cached_tokens) == (0, 4 + 12 * 64)
    assert measure_swap(bench.manager).num_hit_tokens > 0


# The server.

SMALL = {"kv_cache_memory": "1MiB", "max_num_seqs": 1, "dtype": "float32", "served_model_name": ("tiny",)}


def test_usage_metrics_and_the_report_tell_of_it(tiny_model_dir: Path, running_server: Any) -> None:
    with running_server(tiny_model_dir, swap_space="4MiB", **SMALL) as server, httpx.Client() as http:
        manager = server.model_manager

        def cached_tokens(token_ids: list[int]) -> int:
            body = {"prompt": token_ids, "max_tokens": 2, "temperature": 0}
            answer = http.post(f"{server.url}/v1/completions", json=body).json()
            details = answer["usage"]["prompt_tokens_details"]
            return int(details["cached_tokens"])

        def scrape() -> Scrape:
            return Scrape(http.get(f"{server.url}/metrics").text)

        before = scrape()
        names = ("swap_usage_perc", "swap_hit_tokens_total", "swap_blocks_out_total", "swap_blocks_in_total")
        assert [before[name] for name in names] == [0, 0, 0, 0]
        prompts = [prompt(seed, 1400) for seed in range(3)]
        assert [cached_tokens(token_ids) for token_ids in prompts] == [0, 0, 0]
        assert cached_tokens(prompts[0]) == 4 + 1024
        server.wait_until_idle()
        after = scrape()
        assert after["swap_hit_tokens_total"] == 1024 == 64 * after["swap_blocks_in_total"]
        assert after["prefix_cache_hits_total"] == 4 + 1024
        assert after["swap_blocks_out_total"] >= 32 and 0 < after["swap_usage_perc"] <= 1
        [line] = [line for line in manager.startup_report().splitlines() if line.startswith("swap space ")]
        num_tokens = 64 * (4 * MIB // sum(manager._cache_size.block_bytes))
        assert line.endswith(f"MiB of host memory for {num_tokens:,} more tokens of prompts")
        manager.check_integrity()


def test_without_it_nothing_is_told_but_zeros(tiny_model_dir: Path, running_server: Any) -> None:
    with running_server(tiny_model_dir, **SMALL) as server:
        scraped = Scrape(httpx.get(f"{server.url}/metrics").text)
        assert scraped["swap_usage_perc"] == scraped["swap_blocks_out_total"] == 0
        assert "swap" not in server.model_manager.startup_report()


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (
            "16",
            r"--swap-space of 0\.02 KiB holds not even 64 tokens, which take .+; give more, such as 16GiB",
        ),
        ("1000TiB", r"--swap-space asks for .+ and the host has .+ left; give less"),
    ],
)
def test_a_size_that_cannot_be_is_told_in_one_sentence(
    tiny_model_dir: Path, loaded: Loaded, size: str, sentence: str
) -> None:
    with pytest.raises(ModelLoadError, match=rf"^{sentence}$"), loaded(tiny_model_dir, swap_space=size):
        pass


def test_memory_that_cannot_be_had_is_told_in_one_sentence(
    tiny_model_dir: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    monkeypatch.setattr(swap_space, "HostStore", fail)
    sentence = r"^the host's memory for --swap-space cannot be had \(CUDA error: out of memory\); give less$"
    with pytest.raises(ModelLoadError, match=sentence), loaded(tiny_model_dir, swap_space="1MiB"):
        pass


@pytest.mark.parametrize("name", ["mamba", "lfm2"])
def test_a_model_whose_prompts_share_nothing_is_refused(
    save_model: Callable[..., Path], name: str, loaded: Loaded
) -> None:
    with (
        pytest.raises(ModelLoadError, match=r"^--swap-space holds prompts that begin alike, and [^\n]+$"),
        loaded(save_model(name), swap_space="1MiB"),
    ):
        pass


def test_it_goes_with_prefix_caching_only() -> None:
    assert ServerConfig(swap_space="16GiB").swap_space == 16 * 2**30
    assert ServerConfig(swap_space="0", enable_prefix_caching=False).swap_space == 0
    with pytest.raises(ValidationError, match=r"--swap-space .+ needs --enable-prefix-caching"):
        ServerConfig(swap_space="16GiB", enable_prefix_caching=False)


def test_on_a_cpu_the_log_says_what_does_more(
    tiny_model_dir: Path, loaded: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), loaded(tiny_model_dir, swap_space="1MiB"):
        assert any("--kv-cache-memory, does more" in record.getMessage() for record in caplog.records)


def test_a_client_that_leaves_while_blocks_come_in_harms_nobody(tiny_model_dir: Path, loaded: Loaded) -> None:
    with loaded(tiny_model_dir, swap_space="4MiB", **SMALL) as manager:

        async def run() -> list[list[int]]:
            async def answer(seed: int, name: str) -> list[int]:
                outputs = manager.engine.generate(prompt(seed, 1400), greedy(5, ignore_eos=True), name)
                return tokens_of([output async for output in outputs])

            first = await answer(0, "first")
            await answer(1, "other")
            for turn in range(5):
                leaving = asyncio.create_task(answer(turn % 2, f"leaving {turn}"))
                await asyncio.sleep(0.003 * turn)
                leaving.cancel()
                await asyncio.gather(leaving, return_exceptions=True)
            return [first, await answer(0, "again")]

        first, again = asyncio.run(run())
        assert first == again
        manager.check_integrity()
