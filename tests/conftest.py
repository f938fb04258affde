"""Fixtures that every test may use: a tiny random chat model, the wheel, and a server run from it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which transformers does

from server_process import running_server
from tiny_tokenizer import VOCAB_SIZE, build_tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Keep torch on one thread: small operations on shared cores are several times slower with more."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def kept_default_dtype() -> Iterator[None]:
    """Fail a test that leaves torch's default dtype changed."""
    yield
    assert torch.get_default_dtype() is torch.float32


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random float32 Llama (2 layers, 4 query and 2 kv heads of 64) with its tokenizer."""
    path = tmp_path_factory.mktemp("tiny-model")
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        # Wide enough that the next-token distribution is neither flat nor a repetition of one token.
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    ]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Path) -> PreTrainedModel:
    """Load the tiny model as plain transformers does."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="sdpa")
    assert isinstance(model, PreTrainedModel)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerFast:
    """Load the tiny model's tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def wheel_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that holds the files of the built wheel and nothing else."""
    build, files = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", build],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    [wheel] = build.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(files)
    return files


@pytest.fixture(scope="session")
def demo_server_url(wheel_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of the wheel's server, which runs outside the checkout and serves the bundled model."""
    with running_server(tmp_path_factory.mktemp("elsewhere"), {"PYTHONPATH": str(wheel_dir)}) as url:
        yield url
