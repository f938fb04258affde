"""With `--kv-cache-dtype bf16` the server computes what transformers does, and all else is as it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import architectures
import pytest
import torch
from transformers import PreTrainedModel

from turboquant_server import cache_plan
from turboquant_server.cli import parse_config
from turboquant_server.engine.request import RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_manager import ModelLoadError, ModelManager

pytestmark = pytest.mark.usefixtures("no_variables")

Loaded = Callable[..., AbstractContextManager[ModelManager]]

# Its last block is made while the answer grows.
PROMPT = [(7 * number * number + number) % 290 + 3 for number in range(950)]
NUM_TOKENS = 40
# In standard deviations of the logits: what rounding to 8 bits may turn around.
TIE = 0.02


@pytest.fixture(scope="module")
def manager(tiny_model_dir: Path, loaded: Loaded) -> Iterator[ModelManager]:
    with loaded(tiny_model_dir, dtype="float32", kv_cache_dtype="bf16") as manager:
        yield manager


def generate(manager: ModelManager, prompt: list[int] = PROMPT) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)

    async def outputs() -> list[RequestOutput]:
        return [output async for output in manager.engine.generate(prompt, params, "request")]

    return asyncio.run(outputs())


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


@torch.inference_mode()
def gaps(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Return how far each token's logit is below the highest, in float32 and standard deviations."""
    logits = model(torch.tensor([PROMPT + token_ids]), use_cache=False).logits[0, len(PROMPT) - 1 : -1]
    return (logits.amax(-1) - logits[torch.arange(len(token_ids)), token_ids]) / logits.std()


def test_tokens_are_those_of_transformers_in_float32_but_for_ties(
    manager: ModelManager, tiny_model: PreTrainedModel
) -> None:
    token_ids = tokens_of(generate(manager))
    assert len(token_ids) == NUM_TOKENS
    assert gaps(tiny_model, token_ids).max() < TIE


def test_a_prompt_is_found_again_and_gives_the_same_tokens(manager: ModelManager) -> None:
    prompt = [token_id + 1 for token_id in PROMPT]
    first, second = generate(manager, prompt), generate(manager, prompt)
    assert tokens_of(first) == tokens_of(second)
    assert [outputs[0].num_cached_tokens for outputs in (first, second)] == [0, 4 + 512]
    manager.check_integrity()


def test_the_report_tells_the_type_and_nothing_is_measured(
    tiny_model_dir: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cache_plan, "measure_transforms")
    for dtype in ("bfloat16", "float16"):
        with loaded(tiny_model_dir, dtype=dtype, kv_cache_dtype="bf16") as manager:
            lines = manager.startup_report().splitlines()
            assert lines[3] == f"KV cache   {dtype}, not compressed, 16.000 bits per value"
            # 2 layers of 2 heads with keys and values of 64 numbers of 2 bytes.
            num_tokens = manager.cache_bytes // (2 * 2 * 2 * 64 * 2)
            assert lines[4] == f"memory     {manager.cache_bytes / 2**20:.2f} MiB for {num_tokens:,} tokens"
            assert len(tokens_of(generate(manager))) == NUM_TOKENS


@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v3", "falcon"])
def test_windows_latent_attention_and_attention_of_its_own_are_served(
    name: str, save_model: Callable[..., Path], loaded: Loaded
) -> None:
    path = save_model(name)
    with loaded(path, kv_cache_dtype="bf16") as manager:
        token_ids = tokens_of(generate(manager))
    assert len(token_ids) == NUM_TOKENS
    assert gaps(architectures.AutoModelForCausalLM.from_pretrained(path), token_ids).max() < TIE


def test_heads_that_are_too_small_for_codes_are_served(
    save_model: Callable[..., Path], loaded: Loaded
) -> None:
    with loaded(save_model("llama", num_attention_heads=8, head_dim=8), kv_cache_dtype="bf16") as manager:
        assert ", 32.000 bits per value" in manager.startup_report()  # a head of 8 is padded to 16
        assert len(tokens_of(generate(manager))) == NUM_TOKENS


def test_a_length_that_does_not_fit_is_refused_with_a_remedy_that_there_is(
    tiny_model_dir: Path, loaded: Loaded
) -> None:
    options = {"kv_cache_memory": "700KiB", "max_model_len": 2048, "kv_cache_dtype": "bf16"}
    with (
        pytest.raises(
            ModelLoadError, match="more memory, --kv-cache-dtype turboquant or a smaller --max-num"
        ),
        loaded(tiny_model_dir, **options),
    ):
        pass


def test_bits_beside_it_end_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--bits", "4", "--kv-cache-dtype", "bf16"])
    assert capsys.readouterr().err == (
        "turboquant-server: error: choose one of --bits and --kv-cache-dtype bf16 "
        "(see turboquant-server --help)\n"
    )
