"""From loading to unloading, the engine answers as transformers does, from compressed caches."""

from __future__ import annotations

import asyncio
import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MptConfig, MptForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from turboquant_core import TurboQuantCache
from turboquant_server.config import ServerConfig
from turboquant_server.engine.async_engine import EngineDeadError
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_manager import ModelLoadError, ModelManager, find_eos_token_ids

GREEDY = SamplingParams(max_tokens=30, temperature=0)
IGNORING_EOS = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def manager(tiny_model_dir: Path) -> Iterator[ModelManager]:
    manager = ModelManager(ServerConfig(model=str(tiny_model_dir), device="cpu"))
    assert not manager.is_ready
    manager.load()
    yield manager
    manager.unload()


async def generate(manager: ModelManager, prompt: list[int], params: SamplingParams) -> list[int]:
    outputs = manager.engine.generate(prompt, params, f"{id(params)}-{prompt}")
    return [token_id async for output in outputs for token_id in output.token_ids]


def test_the_engine_gives_the_tokens_of_transformers(
    manager: ModelManager, tiny_model: PreTrainedModel
) -> None:
    prompt = manager.tokenizer.encode("The access code of the harbour is")
    expected = tiny_model.generate(
        torch.tensor([prompt]),
        past_key_values=DynamicCache(config=tiny_model.config),
        do_sample=False,
        max_new_tokens=30,
    )
    assert asyncio.run(generate(manager, prompt, GREEDY)) == expected[0, len(prompt) :].tolist()


def test_a_seed_gives_the_same_tokens_alone_and_among_others(manager: ModelManager) -> None:
    seeded = SamplingParams(max_tokens=25, temperature=1.2, top_p=0.95, seed=42, ignore_eos=True)
    noisy = SamplingParams(max_tokens=7, temperature=2.0)

    async def among_others() -> list[int]:
        answers = await asyncio.gather(
            *(generate(manager, [number], noisy) for number in range(5, 9)),
            generate(manager, [5, 6], seeded),
            generate(manager, [9], noisy),
        )
        return answers[4]

    assert asyncio.run(generate(manager, [5, 6], seeded)) == asyncio.run(among_others())


def test_a_request_of_a_long_prompt_runs_on_compressed_keys_and_values(manager: ModelManager) -> None:
    opened: list[TurboQuantCache] = []
    footprints = []
    scheduler = manager.engine._engine.scheduler

    def open_cache() -> TurboQuantCache:
        opened.append(manager.open_cache())
        return opened[-1]

    async def main() -> None:
        params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
        async for _ in manager.engine.generate([5] * 1500, params, "long"):
            footprints.append(opened[0].memory_footprint())

    plain_open_cache, scheduler._open_cache = scheduler._open_cache, open_cache
    try:
        asyncio.run(main())
    finally:
        scheduler._open_cache = plain_open_cache
    assert len(opened) == 1
    assert footprints[-1].num_values >= 1500 * 2 * 2 * 2 * 64
    assert footprints[-1].compressed_bytes > 0
    assert footprints[-1].total_bytes < 0.6 * footprints[-1].bf16_bytes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_cache_is_new_and_of_the_configured_bits(tiny_model_dir: Path, bits: int) -> None:
    manager = ModelManager(ServerConfig(model=str(tiny_model_dir), device="cpu", bits=bits))
    manager.load()
    try:
        first, second = manager.open_cache(), manager.open_cache()
        states = torch.randn(1, 2, 320, 64)
        first.update(states, states, 0)
        assert (first.get_seq_length(), second.get_seq_length()) == (320, 0)
        # The first 4 tokens stay exact, and at least the newest 128: 2 blocks of 64 are between. Each vector
        # has 64 codes, a norm of 2 bytes and a 32nd of a mean: 64 bytes and its step's 2.
        assert first.memory_footprint().compressed_bytes == 128 * 2 * 2 * (8 * bits + 2 + 66 / 32)
        assert f"{bits}-bit codes" in manager.startup_report()
    finally:
        manager.unload()


def test_the_report_names_the_model_and_what_its_cache_takes(
    manager: ModelManager, tiny_model_dir: Path
) -> None:
    lines = manager.startup_report().splitlines()
    assert lines[0] == f"model      {tiny_model_dir} (llama, 471K parameters, float32 on cpu)"
    assert lines[2] == "context    2,048 tokens"
    # 13 blocks take 4 bits, a 64th of a 16-bit norm and a 32nd of the bits of a mean, 8 and a 64th of 16; the
    # first 4 tokens and the newest 188 are float32.
    compressed_bits = 4 + 16 / 64 + (8 + 16 / 64) / 32
    assert f"{compressed_bits:.3f} bits per value" in lines[3]
    assert f"{(13 * 64 * compressed_bits + 192 * 32) / 1024:.2f} measured at 1,024 tokens" in lines[3]
    assert len(lines) == 5


def test_keys_and_values_get_bits_of_their_own(tiny_model_dir: Path) -> None:
    manager = ModelManager(ServerConfig(model=str(tiny_model_dir), device="cpu", kv_bits="4,3"))
    manager.load()
    try:
        cache = manager.open_cache()
        cache.update(torch.randn(1, 2, 320, 64), torch.randn(1, 2, 320, 64), 0)
        assert [states.blocks.codes.shape[-1] for states in cache.layers[0].states] == [32, 24]
        assert "keys in 4-bit codes, values in 3-bit codes, 4.008 bits per value" in manager.startup_report()
    finally:
        manager.unload()


def test_a_server_with_a_budget_answers_within_it(tiny_model_dir: Path) -> None:
    manager = ModelManager(ServerConfig(model=str(tiny_model_dir), device="cpu", kv_budget_bits=3.6))
    manager.load()
    try:
        prompt = manager.tokenizer.encode("The access code of the harbour is") * 60
        assert len(prompt) > 300  # longer than what stays uncompressed
        assert len(asyncio.run(generate(manager, prompt, IGNORING_EOS))) == 30
        cache = manager.open_cache()
        for layer_idx in (0, 1):
            cache.update(torch.randn(1, 2, 320, 64), torch.randn(1, 2, 320, 64), layer_idx)
        spent = cache.memory_footprint().bits_per_compressed_value
        # 8 bits more for one part of the 4 would not fit; anything less would have been bought.
        assert 3.6 - 8 / 4 < spent <= 3.6
        lines = manager.startup_report().splitlines()
        assert f"codes of 2 to 8 bits by layer, {spent:.3f} bits per value" in lines[3]
        widths = [[int(word) for word in line.split()[2:4]] for line in lines[4:6]]
        codes = [[states.blocks.codes.shape[-1] // 8 for states in layer.states] for layer in cache.layers]
        assert codes == [list(pair) for pair in zip(*widths, strict=True)]
    finally:
        manager.unload()


def test_requests_share_the_memory_of_the_transforms(manager: ModelManager) -> None:
    measured = manager._cache_plan.transforms
    assert set(measured) == {0, 1}
    for cache in (manager.open_cache(), copy.deepcopy(manager.open_cache()), manager.open_cache()):
        for layer_idx, transforms in measured.items():
            cache.update(torch.randn(1, 2, 320, 64), torch.randn(1, 2, 320, 64), layer_idx)
            used = [states._quantizer.transform for states in cache.layers[layer_idx].states]
            assert used[0] is transforms.keys and used[1] is transforms.values


def test_names_are_those_of_the_flag_or_the_models_own() -> None:
    assert ModelManager(ServerConfig()).model_names == ["turboquant-demo"]
    assert ModelManager(ServerConfig(model="org/model")).model_names == ["org/model"]
    config = ServerConfig(model="org/model", served_model_name=("a", "b"))
    assert ModelManager(config).model_names == ["a", "b"]


def test_the_engine_decodes_with_a_tokenizer_of_its_own(manager: ModelManager) -> None:
    assert manager.engine._engine._tokenizer is not manager.tokenizer


def test_after_a_failure_the_manager_is_not_ready() -> None:
    manager = ModelManager(ServerConfig(model="/no/such/dir"))
    with pytest.raises(ModelLoadError, match="there is no directory"):
        manager.load()
    assert not manager.is_ready


def test_a_model_whose_cache_cannot_be_compressed_is_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    small_heads = MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=300, max_seq_len=64))
    small_heads.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    manager = ModelManager(ServerConfig(model=str(tmp_path), device="cpu", max_model_len=64))
    with pytest.raises(ModelLoadError) as caught:
        manager.load()
    sentence = str(caught.value)
    assert sentence.startswith(f"{tmp_path} cannot be served with a compressed KV cache: it fails with one (")
    assert sentence.endswith("; choose another --model")


@pytest.mark.parametrize("step", ["check_cache", "plan_cache", "measure_cache"])
def test_a_gpu_that_the_weights_fill_is_told(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"turboquant_server.model_manager.{step}", out_of_memory)
    with pytest.raises(ModelLoadError, match="leaves no memory for a cache on cpu; try --quantize"):
        ModelManager(ServerConfig(model=str(tiny_model_dir), device="cpu")).load()


def test_unload_stops_the_engine_and_frees_the_model(tiny_model_dir: Path) -> None:
    manager = ModelManager(ServerConfig(model=str(tiny_model_dir), device="cpu"))
    manager.load()
    model = weakref.ref(manager._model)

    async def main() -> None:
        engine = manager.engine
        params = SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True)
        outputs = engine.generate([5], params, "r")
        await anext(outputs)
        await asyncio.to_thread(manager.unload)
        with pytest.raises(EngineDeadError):
            async for _ in outputs:
                pass
        assert not engine.is_alive

    asyncio.run(main())
    assert not manager.is_ready
    gc.collect()
    assert model() is None


@pytest.mark.parametrize(
    ("configured", "of_tokenizer", "expected"),
    [(None, None, set()), (7, None, {7}), (None, 3, {3}), ([7, 8], 3, {3, 7, 8}), (7, 7, {7}), (0, 0, {0})],
)
def test_eos_tokens_are_those_of_generation_config_and_tokenizer(
    configured: Any, of_tokenizer: int | None, expected: set[int]
) -> None:
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    tokenizer: Any = SimpleNamespace(eos_token_id=of_tokenizer)
    assert find_eos_token_ids(model, tokenizer) == expected


def test_the_demo_model_is_the_default_and_finds_a_code() -> None:
    manager = ModelManager(ServerConfig(device="cpu"))
    manager.load()
    try:
        question = "The access code of Maria is 482913.\nWhat is the access code of Maria?"
        text = manager.tokenizer.apply_chat_template(
            [{"role": "user", "content": "import os\nprint(os.name)\n" * 40 + question}],
            add_generation_prompt=True,
            tokenize=False,
        )
        prompt = manager.tokenizer.encode(str(text), add_special_tokens=False)
        assert len(prompt) > 300  # longer than what stays uncompressed
        answer = asyncio.run(generate(manager, prompt, GREEDY))
        assert manager.tokenizer.decode(answer, skip_special_tokens=True).strip() == "482913"
        assert manager.max_model_len == 8192
    finally:
        manager.unload()
