"""A server takes the memory that it was told to take, and promises no request that does not fit into it."""

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
from fastapi import FastAPI

from turboquant_server.app import build_app
from turboquant_server.config import ServerConfig
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_manager import ModelLoadError, ModelManager

pytestmark = pytest.mark.usefixtures("no_variables")

Loaded = Callable[..., AbstractContextManager[ModelManager]]
SaveModel = Callable[..., Path]
Serve = Callable[[FastAPI], AbstractContextManager[str]]

MIB = 2**20
# The tiny model, for which 2,048 tokens take 29 blocks: room for a slot and 17 of them.
TOO_LITTLE = "700KiB"


def generate(manager: ModelManager, num_prompt_tokens: int, max_tokens: int) -> int:
    """Return the number of tokens that a request gets."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)

    async def count() -> int:
        outputs = manager.engine.generate([5] * num_prompt_tokens, params, f"{num_prompt_tokens}")
        return sum([len(output.token_ids) async for output in outputs])

    return asyncio.run(count())


def test_a_given_length_that_does_not_fit_is_refused_with_one_that_does(
    tiny_model_dir: Path, loaded: Loaded
) -> None:
    with (
        pytest.raises(ModelLoadError) as caught,
        loaded(tiny_model_dir, kv_cache_memory=TOO_LITTLE, max_model_len=2048),
    ):
        pass
    sentence = str(caught.value)
    longest = int(sentence.partition("; give ")[2].split()[0])
    assert sentence.startswith("--max-model-len 2048 does not fit: the cache of ")
    assert sentence.endswith(
        f" holds {longest} tokens of a request; give {longest} or less, more memory, fewer --bits or a "
        "smaller --max-num-seqs"
    )
    with loaded(tiny_model_dir, kv_cache_memory=TOO_LITTLE, max_model_len=longest) as manager:
        assert manager.max_model_len == longest


def test_a_length_of_our_choice_is_what_fits_and_the_log_says_so(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture, loaded: Loaded
) -> None:
    with caplog.at_level(logging.WARNING), loaded(tiny_model_dir, kv_cache_memory=TOO_LITTLE) as manager:
        longest = manager.max_model_len
        assert 600 < longest < 2048
        [record] = caplog.records
        assert record.getMessage().startswith(
            f"a request may have {longest:,} tokens, as many as the cache of "
        )
        assert record.getMessage().endswith("the model was made for 2,048")
        # It does fit, however much of it is the prompt.
        for num_prompt_tokens in (longest - 1, longest - 150):
            assert generate(manager, num_prompt_tokens, longest) == longest - num_prompt_tokens
        manager.check_integrity()


def test_a_prompt_that_is_too_long_for_the_memory_is_refused(
    tiny_model_dir: Path, loaded: Loaded, serve: Serve
) -> None:
    with (
        loaded(tiny_model_dir, kv_cache_memory=TOO_LITTLE) as manager,
        serve(build_app(manager)) as url,
        httpx.Client(base_url=url) as http,
    ):
        longest = manager.max_model_len
        assert http.get("/v1/models").json()["data"][0]["max_model_len"] == longest
        body: dict[str, Any] = {"prompt": [5] * longest, "ignore_eos": True}
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert f"maximum context length is {longest} tokens" in error["message"]
        response = http.post("/v1/completions", json={**body, "prompt": [5] * (longest - 1)})
        assert response.json()["usage"]["total_tokens"] == longest


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_cache_memory": 1000}, "0.98 KiB are too few for a cache of even one request, "),
        (
            {"kv_cache_memory": "1MiB", "max_num_seqs": 50},
            "1.00 MiB are too few for a cache of 50 requests at a time, ",
        ),
        ({"kv_cache_memory": "1000TiB", "max_num_seqs": 10**7}, "--kv-cache-memory asks for "),
    ],
    ids=str,
)
def test_too_little_memory_is_told_in_one_sentence(
    tiny_model_dir: Path, options: dict[str, Any], sentence: str, loaded: Loaded
) -> None:
    with pytest.raises(ModelLoadError, match=rf"^{sentence}[^\n]+$"), loaded(tiny_model_dir, **options):
        pass


@pytest.mark.parametrize(("bits", "num_mib"), [(2, 5), (8, 10)])
def test_the_cache_takes_the_memory_that_it_was_given(
    tiny_model_dir: Path, bits: int, num_mib: int, loaded: Loaded
) -> None:
    memory = f"{num_mib}MiB"
    with loaded(tiny_model_dir, kv_cache_memory=memory, bits=bits, max_num_seqs=8) as manager:
        store = manager.engine._engine._model_runner._store
        assert 0.95 * num_mib * MIB < store.num_bytes <= num_mib * MIB


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "llama4_text"])
def test_one_slot_is_enough_for_layers_that_see_a_window(
    save_model: SaveModel, name: str, loaded: Loaded
) -> None:
    # A step reads more of the prompt than the window's blocks would hold.
    with loaded(save_model(name), max_num_seqs=1) as manager:
        assert generate(manager, 4000, 30) == 30
        manager.check_integrity()


def test_a_cache_is_opened_while_there_is_room(tiny_model_dir: Path, loaded: Loaded) -> None:
    with loaded(tiny_model_dir, max_num_seqs=2) as manager:
        caches = [manager.open_cache([5] * 700, 700) for _ in range(3)]
        assert [cache is None for cache in caches] == [False, False, True]
        for cache in caches[:2]:
            assert cache is not None
            cache.release()
        manager.check_integrity()


@pytest.mark.parametrize("step", ["find_attention", "plan_cache", "size_cache", "build_store"])
def test_a_gpu_that_the_weights_fill_is_told(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"turboquant_server.model_manager.{step}", out_of_memory)
    with pytest.raises(ModelLoadError, match="leaves no memory for a cache on cpu; try --quantize"):
        ModelManager(ServerConfig(model=str(tiny_model_dir), device="cpu")).load()
