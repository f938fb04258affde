"""A model loads as the flags say, and whatever is wrong with it is told in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, LlamaConfig

from turboquant_server import memory, model_loader
from turboquant_server.config import ServerConfig
from turboquant_server.load_error import ModelLoadError
from turboquant_server.model_loader import load_model


@pytest.fixture
def checkpoint(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Copy the tiny model, so that a test may break it."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "checkpoint"))


def change_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def failure(model: Path | str | None, **options: Any) -> str:
    """Return the sentence with which loading fails."""
    with pytest.raises(ModelLoadError) as caught:
        load_model(ServerConfig(model=None if model is None else str(model), device="cpu", **options))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 350
    return sentence.replace(str(model), "MODEL")


def test_the_weights_are_those_of_the_checkpoint(tiny_model_dir: Path) -> None:
    loaded = load_model(ServerConfig(model=str(tiny_model_dir)))
    weights = load_file(tiny_model_dir / "model.safetensors")
    assert torch.equal(loaded.model.get_parameter("model.norm.weight").cpu(), weights["model.norm.weight"])
    assert not loaded.model.training
    assert loaded.max_model_len == 2048
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("The access code")) == "The access code"


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        ("float32", "auto", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", "auto", torch.float32),
        ("bfloat16", "bfloat16", torch.bfloat16),
        ("bfloat16", "float16", torch.float16),
    ],
)
def test_the_dtype_is_as_asked_and_auto_is_float32_on_a_cpu(
    checkpoint: Path, stored: str, dtype: Any, expected: torch.dtype
) -> None:
    change_weights(
        checkpoint,
        lambda weights: weights.update({name: w.to(getattr(torch, stored)) for name, w in weights.items()}),
    )
    change_config(checkpoint, dtype=stored)
    model = load_model(ServerConfig(model=str(checkpoint), device="cpu", dtype=dtype)).model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize(
    ("num_available", "utilization", "dtype"),
    [
        (1000, None, torch.bfloat16),
        (3_000_000, None, torch.bfloat16),
        (3_000_000, 0.9, torch.float32),
        (5_000_000, None, torch.float32),
        (5_000_000, 0.1, torch.bfloat16),
    ],
)
def test_auto_keeps_16_bits_on_a_cpu_where_float32_has_no_room(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_available: int,
    utilization: float | None,
    dtype: torch.dtype,
) -> None:
    change_weights(checkpoint, lambda weights: weights.update({k: w.bfloat16() for k, w in weights.items()}))
    change_config(checkpoint, dtype="bfloat16")
    monkeypatch.setattr(memory, "available_bytes", lambda: num_available)
    config = ServerConfig(model=str(checkpoint), device="cpu", gpu_memory_utilization=utilization)
    assert load_model(config).model.dtype == dtype


def test_a_missing_directory_is_named() -> None:
    assert failure("/no/such/dir") == (
        "there is no directory MODEL; give an existing one or a Hugging Face model id for --model"
    )
    assert failure("./nowhere").startswith("there is no directory MODEL;")
    assert failure("~/nowhere").startswith("there is no directory MODEL;")


def test_a_file_is_no_checkpoint(checkpoint: Path) -> None:
    assert failure(checkpoint / "config.json").startswith("MODEL is a file; give the directory")


def test_a_directory_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    assert failure(tmp_path) == "the directory MODEL has no config.json; give the directory of a checkpoint"


def test_a_missing_demo_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_loader, "DEMO_DIRECTORY", tmp_path)
    assert failure(None) == "the demo model is not part of this installation; give --model"


def test_a_name_that_is_no_id_is_told() -> None:
    assert failure("bad name!") == "MODEL is neither a directory nor a Hugging Face model id; check --model"


def test_an_id_that_is_not_cached_needs_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "neither a directory nor in the local cache" in failure("some-org/some-model")
    assert "neither a directory nor in the local cache" in failure("some-org/some-model", revision="v2")


def test_a_damaged_config_is_told(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": ')
    assert failure(checkpoint) == "the config.json of MODEL is not valid JSON; download the model again"


@pytest.mark.parametrize("config", [{}, {"model_type": "nonsense"}])
def test_an_unknown_architecture_is_told(checkpoint: Path, config: dict[str, str]) -> None:
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert failure(checkpoint).startswith("the architecture of MODEL is unknown to transformers 5.")


def test_a_model_with_its_own_code_asks_for_trust(checkpoint: Path) -> None:
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "nonsense", "auto_map": auto_map}))
    assert failure(checkpoint) == (
        "MODEL brings its own Python code; read it and, if you trust it, give --trust-remote-code"
    )


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    ],
)
def test_a_model_that_generates_no_text_is_refused(checkpoint: Path, config: dict[str, Any]) -> None:
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert failure(checkpoint) == (
        f"MODEL is a {config['model_type']} model, which does not generate text; choose another --model"
    )


def test_missing_weights_are_told(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert (
        failure(checkpoint) == "MODEL has no weights; give a checkpoint with safetensors or PyTorch weights"
    )


def test_damaged_weights_are_told(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert failure(checkpoint) == "the weights of MODEL are damaged; download the model again"


def test_incomplete_weights_are_refused_and_not_made_up(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.pop("lm_head.weight"))  # type: ignore[arg-type, return-value]
    assert failure(checkpoint) == (
        "MODEL lacks 1 of the model's weights, lm_head.weight for one; "
        "give a complete checkpoint of a language model"
    )


def test_weights_of_another_shape_are_told_in_one_line(checkpoint: Path) -> None:
    change_config(checkpoint, intermediate_size=128)
    assert failure(checkpoint).startswith("the weights of MODEL do not fit its config.json;")


def test_a_tokenizer_that_knows_no_text_is_told(checkpoint: Path) -> None:
    shutil.copytree(model_loader.DEMO_DIRECTORY, checkpoint, dirs_exist_ok=True)
    for path in checkpoint.glob("token*.json"):
        path.unlink()
    assert failure(checkpoint).startswith("MODEL has no usable tokenizer;")


def test_a_missing_tokenizer_is_told(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").unlink()
    assert failure(checkpoint).startswith("MODEL has no usable tokenizer;")


def test_quantized_weights_need_a_gpu(checkpoint: Path) -> None:
    assert failure(checkpoint, quantize="int8") == (
        "--quantize int8 needs an NVIDIA GPU; start without --quantize on cpu"
    )


def test_quantized_weights_need_bitsandbytes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(model_loader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"int4 needs the package bitsandbytes; install it with: pip"):
        load_model(ServerConfig(model=str(checkpoint), device="cuda:0", quantize="int4"))


def test_weights_are_not_quantized_twice(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    monkeypatch.setattr(model_loader, "_check_quantize", lambda quantize, device: None)
    assert failure(checkpoint, quantize="int8") == (
        "the weights of MODEL are quantized already; start without --quantize"
    )


@pytest.mark.parametrize(
    ("device", "num_gpus", "sentence"),
    [
        ("cuda", 0, "--device cuda needs an NVIDIA GPU and PyTorch sees none; use --device cpu"),
        ("cuda:3", 2, "there is no device cuda:3; the last one is cuda:1"),
        ("tpu", 0, "there is no device tpu; give --device cpu, cuda or cuda:N"),
        ("mps", 0, "there is no device mps; give --device cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_told(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, device: str, num_gpus: int, sentence: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ModelLoadError) as caught:
        load_model(ServerConfig(model=str(checkpoint), device=device))
    assert str(caught.value) == sentence


def test_max_model_len_may_be_shorter_but_not_longer_than_the_model(checkpoint: Path) -> None:
    assert load_model(ServerConfig(model=str(checkpoint), device="cpu", max_model_len=99)).max_model_len == 99
    assert failure(checkpoint, max_model_len=2049) == (
        "--max-model-len 2049 is more than the 2048 tokens that MODEL was made for; give 2048 or less"
    )


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "linear", "factor": 2.0}, 4096),
        ({"rope_type": "default"}, 2048),
    ],
)
def test_max_model_len_may_be_as_long_as_rope_scaling_allows(rope: dict[str, Any], longest: int) -> None:
    config = LlamaConfig(max_position_embeddings=2048, rope_parameters={"rope_theta": 10000.0, **rope})
    assert model_loader.find_max_model_len("x", config, longest) == longest
    assert model_loader.find_max_model_len("x", config, None) == 2048
    with pytest.raises(ModelLoadError, match=f"give {longest} or less"):
        model_loader.find_max_model_len("x", config, longest + 1)


@pytest.mark.parametrize(("max_model_len", "stretch"), [(2048, 1.0), (None, 1.0), (4096, 3.0)])
def test_rotary_embeddings_are_those_of_max_model_len(
    checkpoint: Path, max_model_len: int | None, stretch: float
) -> None:
    change_config(checkpoint, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    config = ServerConfig(model=str(checkpoint), device="cpu", max_model_len=max_model_len)
    model = load_model(config).model
    inv_freq = dict(model.named_buffers())["model.rotary_emb.inv_freq"]
    base = 10000.0 * stretch ** (64 / 62)
    torch.testing.assert_close(inv_freq, base ** (-torch.arange(0, 64, 2) / 64))
    model(torch.tensor([[3]]), position_ids=torch.tensor([[5000]]))
    assert torch.equal(dict(model.named_buffers())["model.rotary_emb.inv_freq"], inv_freq)


def test_a_model_that_does_not_tell_its_length_needs_the_flag() -> None:
    config = BloomConfig()
    assert model_loader.find_max_model_len("x", config, 77) == 77
    with pytest.raises(ModelLoadError, match="give --max-model-len"):
        model_loader.find_max_model_len("x", config, None)
