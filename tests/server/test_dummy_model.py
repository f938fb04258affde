"""--load-format dummy: weights that training could begin with, of any configuration; the configs here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from turboquant_server.config import ServerConfig
from turboquant_server.dummy_model import build_dummy_model
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.load_error import ModelLoadError
from turboquant_server.model_loader import DEMO_DIRECTORY, LoadedModel, load_model
from turboquant_server.model_manager import ModelManager

CONFIGS = Path(__file__).resolve().parents[2] / "scripts/configs"
CPU = torch.device("cpu")


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., Path]:
    """Save nothing but a configuration: the demo model's in small, with changes."""

    def save(**changes: Any) -> Path:
        config = json.loads((DEMO_DIRECTORY / "config.json").read_text())
        small = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": False}
        (tmp_path / "config.json").write_text(json.dumps({**config, **small, **changes}))
        return tmp_path

    return save


def load(directory: Path, **options: Any) -> LoadedModel:
    return load_model(ServerConfig(model=str(directory), device="cpu", load_format="dummy", **options))


def test_weights_are_those_that_training_begins_with(bare: Callable[..., Path]) -> None:
    model = load(bare(initializer_range=0.05)).model
    assert not model.training
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all(), name
        elif name.endswith("bias"):
            assert (weight == 0).all(), name
        else:
            error = 5 * 0.05 / (2 * weight.numel()) ** 0.5
            assert float(weight.detach().double().std()) == pytest.approx(0.05, abs=error), name


def test_weights_are_the_same_each_time_and_no_other_random_number_is(bare: Callable[..., Path]) -> None:
    directory = bare()
    torch.manual_seed(1)
    expected = torch.rand(5)
    torch.manual_seed(1)
    first = load(directory).model.state_dict()
    assert torch.equal(torch.rand(5), expected)
    second = load(directory).model.state_dict()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_as_asked_and_buffers_are_those_of_a_loaded_model(
    bare: Callable[..., Path], dtype: Any
) -> None:
    directory = bare(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    model = load(directory, dtype=dtype).model
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}
    inv_freq = dict(model.named_buffers())["model.rotary_emb.inv_freq"]
    assert inv_freq.dtype == torch.float32
    torch.testing.assert_close(inv_freq, 1e4 ** (-torch.arange(0, 128, 2) / 128) / 2)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), (None, torch.float32)])
def test_auto_is_the_dtype_of_the_configuration(
    bare: Callable[..., Path], dtype: str | None, expected: torch.dtype
) -> None:
    config = AutoConfig.from_pretrained(bare(dtype=dtype))
    assert build_dummy_model(config, "auto", CPU).dtype == expected


@pytest.mark.parametrize("name", sorted(architectures.ARCHITECTURES))
def test_a_model_of_any_architecture_is_one_that_a_checkpoint_gives(name: str, tmp_path: Path) -> None:
    original = architectures.build(name)
    model = build_dummy_model(original.config, "float32", CPU)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in original.state_dict().items()
    }
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    expected = dict(original.named_buffers())
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[key]), key


def test_a_bare_configuration_is_served_with_the_tokenizer_of_the_demo_model(
    bare: Callable[..., Path],
    loaded: Callable[..., contextlib.AbstractContextManager[ModelManager]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Most tokens that such a model generates are unknown to the tokenizer.
    directory = bare(vocab_size=50_000)
    with caplog.at_level(logging.WARNING), loaded(directory, load_format="dummy") as manager:
        assert f"{directory} has no tokenizer; that of the demo model takes its place" in caplog.messages

        async def generate() -> list[int]:
            prompt = manager.tokenizer("The access code")["input_ids"]
            params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
            return [t async for o in manager.engine.generate(prompt, params, "r") for t in o.token_ids]

        assert len(asyncio.run(generate())) == 8
        assert "random weights" in manager.startup_report()


def test_a_tokenizer_of_its_own_is_kept(tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load(tiny_model_dir).tokenizer
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_model_dir).get_vocab()
    assert not caplog.messages


def test_a_vocabulary_too_small_for_the_tokenizer_of_the_demo_model_is_told(
    bare: Callable[..., Path],
) -> None:
    with pytest.raises(ModelLoadError, match="has no usable tokenizer; add"):
        load(bare(vocab_size=4095))


def test_weights_are_not_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_model_dir, tmp_path / "checkpoint")
    (checkpoint / "model.safetensors").write_bytes(b"damaged")
    assert load(checkpoint).model.num_parameters() > 0


def test_quantized_weights_are_not_made(bare: Callable[..., Path]) -> None:
    with pytest.raises(ModelLoadError, match="--quantize int8 needs weights to read"):
        load(bare(), quantize="int8")
    directory = bare(quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        ModelLoadError, match="are quantized, and --load-format dummy makes none of that kind"
    ):
        load(directory)


@pytest.mark.parametrize(
    ("name", "num_parameters", "kv_numbers"),
    [
        ("llama-3.1-8b", 8_030_261_248, 32 * 2 * 8 * 128),
        ("qwen2.5-0.5b", 494_032_768, 24 * 2 * 2 * 64),
        ("qwen2.5-3b", 3_085_938_688, 36 * 2 * 2 * 128),
        ("qwen2.5-7b", 7_615_616_512, 28 * 2 * 4 * 128),
        ("stablelm-2-1_6b", 1_644_515_328, 24 * 2 * 32 * 64),
    ],
)
def test_the_configurations_are_those_of_the_published_models(
    name: str, num_parameters: int, kv_numbers: int
) -> None:
    assert [path.name for path in (CONFIGS / name).iterdir()] == ["config.json"]
    config = AutoConfig.from_pretrained(CONFIGS / name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    assert model.num_parameters() == num_parameters
    head_dim = config.hidden_size // config.num_attention_heads
    assert 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim == kv_numbers
