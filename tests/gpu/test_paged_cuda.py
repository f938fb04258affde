"""The paged cache on a GPU: what it computes is what the CPU computes, and memory stays within its limit."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from turboquant_core import (
    AttentionOptions,
    BlockCodec,
    BlockQuantizer,
    CacheManager,
    Chunk,
    DecodeBuffers,
    ExactCodec,
    PagedStore,
    StoreLayer,
    Timeline,
    Visibility,
)
from turboquant_server.config import ServerConfig
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_manager import ModelManager

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

DEMO = Path(__file__).resolve().parents[2] / "turboquant_server" / "demo"
GIB = 2**30


def run_store(device: torch.device, visibility: Visibility) -> list[torch.Tensor]:
    """Compute a prompt of 1,300 tokens and 70 generated ones; the same numbers on any device."""
    timeline = Timeline()
    layer = StoreLayer(
        ExactCodec(128, 128, torch.float32), num_kv_heads=2, key_dim=128, value_dim=128, group=0
    )
    manager = CacheManager(timeline, [visibility], [40], 2, caches_prefixes=False)
    store = PagedStore(
        {0: layer}, [visibility], timeline, num_blocks=[40], num_slots=2, dtype=torch.float32, device=device
    )
    buffers = DecodeBuffers([visibility], timeline, 2, device)
    num_prompt_tokens, num_tokens = 1300, 1370
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (
        torch.randn(num_tokens, heads, 128, generator=generator).to(device) for heads in (8, 2, 2)
    )
    cache = manager.open([0] * num_prompt_tokens, num_prompt_tokens)
    assert cache is not None and cache.extend(0, num_prompt_tokens)
    options = AttentionOptions(128**-0.5)
    chunks, start = [], 0
    while start < num_prompt_tokens:
        end = timeline.chunk_end(start, num_prompt_tokens)
        chunks.append(Chunk(cache, start, end, num_prompt_tokens))
        start = end
    new = slice(0, num_prompt_tokens)
    (plan,) = store.plan_prefill(chunks)
    outputs = [store.prefill(0, queries[new], keys[new], values[new], plan, options)]
    for position in range(num_prompt_tokens, num_tokens):
        assert cache.extend(position, position + 1)
        chunk = Chunk(cache, position, position + 1, num_prompt_tokens)
        buffers.fill([chunk])
        [plan] = buffers.plans(1)
        new = slice(position, position + 1)
        outputs.append(store.decode(0, queries[new], keys[new], values[new], plan, options))
        store.make_due_blocks([chunk])
    return [output.cpu() for output in outputs]


@pytest.mark.parametrize("visibility", [Visibility(), Visibility(window=700), Visibility(chunk=512)])
def test_attention_on_the_store_is_the_same_on_cuda(visibility: Visibility) -> None:
    pairs = zip(
        run_store(torch.device("cuda"), visibility), run_store(torch.device("cpu"), visibility), strict=True
    )
    for gpu, cpu in pairs:
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 4), (3, 2), (8, 3)])
def test_records_are_read_the_same_on_cuda(key_bits: int, value_bits: int) -> None:
    codec = BlockCodec(
        BlockQuantizer(128, key_bits, scale="norm_corrected"),
        BlockQuantizer(80, value_bits, scale="unbiased"),
    )
    generator = torch.Generator().manual_seed(0)
    keys, values, queries, weights = (
        torch.randn(5, 2, *shape, generator=generator)
        for shape in ((1, 64, 128), (1, 64, 80), (3, 128), (3, 64))
    )
    records = codec.encode(keys, values)[:, :, 0]
    scores = codec.scores(queries.cuda(), records.cuda()).cpu()
    torch.testing.assert_close(scores, codec.scores(queries, records), rtol=1e-4, atol=1e-4)
    sums = codec.weighted_values(weights.cuda(), records.cuda()).cpu()
    torch.testing.assert_close(sums, codec.weighted_values(weights, records), rtol=1e-4, atol=1e-4)


def test_memory_stays_within_the_limit_under_load() -> None:
    torch.cuda.empty_cache()
    limit = 4 * GIB
    manager = ModelManager(ServerConfig(vram_limit=limit, dtype="bfloat16"))
    manager.load()
    try:
        print(manager.startup_report())
        torch.cuda.reset_peak_memory_stats()
        text = (DEMO / "held_out.txt").read_text("utf-8")
        token_ids = manager.tokenizer.backend_tokenizer.encode(text).ids
        params = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, seed=0, ignore_eos=True, n=2)

        async def count(index: int) -> int:
            prompt = token_ids[500 * index : 500 * index + 250 * (index + 1)]
            total = 0
            async for output in manager.engine.generate(prompt, params, str(index)):
                total += len(output.token_ids)
            return total

        async def count_all() -> list[int]:
            return await asyncio.gather(*(count(index) for index in range(30)))

        assert asyncio.run(count_all()) == [80] * 30
        peak = torch.cuda.max_memory_allocated()
        print(f"peak {peak / GIB:.2f} GiB of {limit / GIB:.0f}")
        assert peak <= limit
        manager.check_integrity()
    finally:
        manager.unload()


def test_the_same_request_gets_the_same_tokens_alone_and_in_a_crowd() -> None:
    manager = ModelManager(ServerConfig(dtype="float32", kv_cache_memory=GIB))
    manager.load()
    try:
        text = (DEMO / "held_out.txt").read_text("utf-8")
        token_ids = manager.tokenizer.backend_tokenizer.encode(text).ids
        prompts = [token_ids[997 * i : 997 * i + 40 + 150 * i] for i in range(24)]
        params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)

        async def answer(index: int, request_id: str) -> list[int]:
            tokens: list[int] = []
            async for output in manager.engine.generate(prompts[index], params, request_id):
                tokens += output.token_ids
            return tokens

        async def answer_all() -> tuple[list[list[int]], list[list[int]]]:
            alone = [await answer(index, f"alone-{index}") for index in range(len(prompts))]
            crowd = await asyncio.gather(*(answer(i, f"crowd-{i}") for i in range(len(prompts))))
            return alone, list(crowd)

        alone, crowd = asyncio.run(answer_all())
        different = sum(a != b for a, b in zip(alone, crowd, strict=True))
        print(f"{different} of {len(prompts)} answers differ")
        # A difference takes a tie of the two likeliest tokens; the CPU's tests show that each is one.
        assert different <= 1
    finally:
        manager.unload()
