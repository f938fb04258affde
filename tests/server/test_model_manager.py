"""From loading to unloading, the engine answers as transformers does, from a compressed cache."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from turboquant_server.config import ServerConfig
from turboquant_server.engine.request import EngineDeadError, RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_loader import find_eos_token_ids
from turboquant_server.model_manager import ModelLoadError, ModelManager

pytestmark = pytest.mark.usefixtures("no_variables")

Loaded = Callable[..., AbstractContextManager[ModelManager]]
SaveModel = Callable[..., Path]

GREEDY = SamplingParams(max_tokens=30, temperature=0)
IGNORING_EOS = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
MIB = 2**20
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def manager(tiny_model_dir: Path, loaded: Loaded) -> Iterator[ModelManager]:
    with loaded(tiny_model_dir) as manager:
        yield manager


async def outputs_of(manager: ModelManager, prompt: list[int], params: SamplingParams) -> list[RequestOutput]:
    outputs = manager.engine.generate(prompt, params, f"request-{next(NUMBERS)}")
    return [output async for output in outputs]


async def generate(manager: ModelManager, prompt: list[int], params: SamplingParams) -> list[int]:
    return [token_id for output in await outputs_of(manager, prompt, params) for token_id in output.token_ids]


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


def test_a_long_prompt_lies_in_blocks_and_a_second_one_finds_them(manager: ModelManager) -> None:
    prompt = [number % 290 + 3 for number in range(1500)]
    num_free = manager._cache_manager.num_free_blocks[0]
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    held = []

    async def main() -> list[RequestOutput]:
        outputs = []
        async for output in manager.engine.generate(prompt, params, "long"):
            held.append(num_free - manager._cache_manager.num_free_blocks[0])
            outputs.append(output)
        return outputs

    first = asyncio.run(main())
    # Blocks are made of 2 segments of 512 tokens, and then of what is older than the newest 128.
    assert held[0] == 21
    assert manager._cache_manager.num_free_blocks[0] == num_free
    second = asyncio.run(outputs_of(manager, prompt, params))
    assert [output.token_ids for output in second] == [output.token_ids for output in first]
    assert {output.num_cached_tokens for output in first} == {0}
    assert {output.num_cached_tokens for output in second} == {4 + 2 * 512}
    manager.check_integrity()


def test_blocks_and_slots_add_up_after_traffic(manager: ModelManager) -> None:
    async def main() -> None:
        params = [
            SamplingParams(max_tokens=5 + 3 * index, n=index % 3 + 1, seed=index, ignore_eos=True)
            for index in range(12)
        ]
        prompts = [[index + 3] * (40 + 150 * (index % 5)) for index in range(12)]
        tasks = [
            asyncio.ensure_future(outputs_of(manager, prompt, one))
            for prompt, one in zip(prompts, params, strict=True)
        ]
        left = asyncio.ensure_future(outputs_of(manager, [7] * 700, IGNORING_EOS))
        await asyncio.sleep(0.05)
        left.cancel()
        for outputs, one in zip(await asyncio.gather(*tasks), params, strict=True):
            assert len(outputs) == one.n * one.max_tokens

    asyncio.run(main())
    deadline = time.monotonic() + 20
    while manager.engine.num_running or manager.engine.num_waiting:  # the aborted one
        assert time.monotonic() < deadline
        time.sleep(0.01)
    manager.check_integrity()
    assert manager._cache_manager.num_running == 0
    assert manager._cache_manager.num_free_blocks == list(manager._cache_size.num_blocks)


@pytest.mark.parametrize(
    ("options", "bits", "text"),
    [
        ({"bits": 2}, (2, 2), "2-bit codes"),
        ({"bits": 8}, (8, 8), "8-bit codes"),
        ({"kv_bits": "4,3"}, (4, 3), "keys in 4-bit codes, values in 3-bit codes"),
    ],
    ids=str,
)
def test_the_cache_has_the_configured_bits_and_the_measured_transforms(
    tiny_model_dir: Path, options: dict[str, Any], bits: tuple[int, int], text: str, loaded: Loaded
) -> None:
    with loaded(tiny_model_dir, **options) as manager:
        assert f"  {text}, " in manager.startup_report()
        store = manager.engine._engine._model_runner._store
        assert store.layers.keys() == manager._cache_plan.transforms.keys() == {0, 1}
        for layer_idx, transforms in manager._cache_plan.transforms.items():
            keys, values = store.layers[layer_idx].codec._quantizers  # type: ignore[union-attr]
            assert (keys.bits, values.bits) == bits
            assert keys.transform is transforms.keys and values.transform is transforms.values
        prompt = [number % 290 + 3 for number in range(900)]
        assert len(asyncio.run(generate(manager, prompt, IGNORING_EOS))) == 30


def test_the_report_names_the_model_and_what_its_cache_takes(
    manager: ModelManager, tiny_model_dir: Path
) -> None:
    lines = manager.startup_report().splitlines()
    labels = ["model", "loaded in", "context", "KV cache", "memory", "requests", "answers"]
    assert [line.split("  ")[0] for line in lines] == labels
    assert lines[0] == f"model      {tiny_model_dir} (llama, 471K parameters, float32 on cpu)"
    assert lines[2] == "context    2,048 tokens"
    # 4 bits, a 64th of a 16-bit norm and a 64th of the bits of a mean, 8 and a 64th of 16; and padding.
    compressed_bits = 4 + 16 / 64 + (8 + 16 / 64) / 64
    assert compressed_bits <= float(lines[3].split(", ")[1].split(" ")[0]) < 1.01 * compressed_bits
    store = manager.engine._engine._model_runner._store
    assert lines[4].startswith(f"memory     {store.num_bytes / MIB:.2f} MiB for ")
    # 2 layers of 2 heads with keys and values of 64 numbers
    assert lines[4].endswith(f" it would hold {store.num_bytes // (2 * 2 * 2 * 64 * 2):,}")


def test_a_server_with_a_budget_answers_within_it(tiny_model_dir: Path, loaded: Loaded) -> None:
    with loaded(tiny_model_dir, kv_budget_bits=3.6) as manager:
        prompt = manager.tokenizer.encode("The access code of the harbour is") * 60
        assert len(prompt) > 300  # longer than what stays uncompressed
        assert len(asyncio.run(generate(manager, prompt, IGNORING_EOS))) == 30
        lines = manager.startup_report().splitlines()
        assert lines[3].split("  ")[-1].startswith("codes of 2 to 8 bits by layer, ")
        spent = float(lines[3].split(", ")[1].split(" ")[0])
        # 8 bits more for one part of the 4 would not fit; anything less would have been bought. A record is
        # padded, by less than a hundredth.
        assert 3.6 - 8 / 4 < spent <= 3.6 * 1.01
        widths = [[int(word) for word in line.split()[2:4]] for line in lines[4:6]]
        layers = manager.engine._engine._model_runner._store.layers
        codes = [[q.bits for q in layers[index].codec._quantizers] for index in (0, 1)]  # type: ignore[union-attr]
        assert codes == [list(pair) for pair in zip(*widths, strict=True)]


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


def test_heads_that_are_too_small_are_refused_in_one_sentence(save_model: SaveModel, loaded: Loaded) -> None:
    path = save_model("llama", num_attention_heads=8, head_dim=8)
    with pytest.raises(ModelLoadError) as caught, loaded(path):
        pass
    assert str(caught.value) == (
        f"{path} cannot be served with a turboquant KV cache: its heads are too small (dim must be at least "
        "16, got 8); choose another --model"
    )


def test_a_model_that_cannot_use_the_cache_is_refused_in_one_sentence(
    save_model: SaveModel, loaded: Loaded
) -> None:
    path = save_model("openai-gpt", n_positions=256)
    with pytest.raises(ModelLoadError) as caught, loaded(path, max_model_len=200):
        pass
    assert str(caught.value) == (
        f"{path} cannot be served with a turboquant KV cache: it gives nothing to its cache; "
        "choose another --model"
    )


@torch.inference_mode()
def test_a_model_of_longrope_turns_short_texts_as_long_ones(save_model: SaveModel, loaded: Loaded) -> None:
    path = save_model("phi3_longrope")
    prompt = [11, 50, 7, 120, 64, 3]
    with loaded(path) as manager:
        answer = asyncio.run(generate(manager, prompt, SamplingParams(max_tokens=6, temperature=0)))
    # Plain transformers takes the factors of long texts where one is longer than 16 tokens.
    model = architectures.AutoModelForCausalLM.from_pretrained(path)
    for position, token_id in enumerate(answer, start=len(prompt)):
        padded = [*prompt, *answer][:position] + [0] * 30
        logits = model(torch.tensor([padded]), use_cache=False).logits[0, position - 1]
        assert int(logits.argmax()) == token_id


def test_unload_stops_the_engine_and_frees_the_model(tiny_model_dir: Path) -> None:
    manager = ModelManager(ServerConfig(model=str(tiny_model_dir), device="cpu", kv_cache_memory=MIB))
    manager.load()
    store = manager.engine._engine._model_runner._store
    tensors = [store.records[0], store.exact[1][0], manager._cache_plan.transforms[0].keys]
    released = [weakref.ref(one) for one in (manager._model, store, *tensors)]
    del store, tensors

    async def main() -> None:
        engine = manager.engine
        params = SamplingParams(max_tokens=500, temperature=0, ignore_eos=True)
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
    assert [reference() for reference in released] == [None] * 5


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
    manager = ModelManager(ServerConfig(device="cpu", kv_cache_memory=32 * MIB))
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
