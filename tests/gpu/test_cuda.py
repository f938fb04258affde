"""What needs a GPU: the codec's CUDA results against the CPU's, memory in `generate`, the server on CUDA."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from turboquant_core import BlockQuantizer, TurboQuantCache, TurboQuantMSE, measure_transforms
from turboquant_server.config import ServerConfig
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_manager import ModelManager

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

DEMO = Path(__file__).resolve().parents[2] / "turboquant_server" / "demo"
LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131_072,
    eos_token_id=2,
)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_cuda_codes_are_the_cpu_codes(dim: int, bits: int) -> None:
    x = torch.randn(1024, dim, generator=torch.Generator().manual_seed(0))
    cpu, gpu = TurboQuantMSE(dim, bits), TurboQuantMSE(dim, bits, device="cuda")
    codes, norms = cpu.quantize(x)
    gpu_codes, gpu_norms = gpu.quantize(x.cuda())
    # Only a coordinate within a float32 rounding error of a boundary may fall on its other side.
    different = codes != gpu_codes.cpu()
    assert different.float().mean() < 1e-4
    same = ~different.any(-1)
    torch.testing.assert_close(gpu_norms.cpu()[same], norms[same], rtol=1e-3, atol=0)
    torch.testing.assert_close(gpu.dequantize(codes.cuda(), norms.cuda()).cpu(), cpu.dequantize(codes, norms))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_cuda_blocks_dequantize_as_on_the_cpu(bits: int) -> None:
    quantizer = BlockQuantizer(128, bits, scale="unbiased")
    x = torch.randn(2, 8, 4, 64, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    blocks = quantizer.quantize(x)
    on_gpu = type(blocks)(*(tensor.cuda() for tensor in blocks))
    torch.testing.assert_close(quantizer.dequantize(on_gpu).cpu(), quantizer.dequantize(blocks))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_cuda_blocks_are_the_cpu_blocks_under_measured_transforms(bits: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    input_ids = torch.randint(3, 4000, (1, 512), generator=torch.Generator().manual_seed(0))
    transforms = measure_transforms(model.cuda(), input_ids.cuda())
    x = torch.randn(2, 2, 4, 64, 128, generator=torch.Generator().manual_seed(0))
    for layer in transforms.values():
        quantizer = BlockQuantizer(128, bits, scale="norm_corrected", transform=layer.keys)
        cpu, gpu = quantizer.quantize(x), quantizer.quantize(x.cuda())
        assert (cpu.codes != gpu.codes.cpu()).float().mean() < 1e-3
        # Where two trial lengths are as good, rounding decides between them: other codes, the same error.
        error, gpu_error = ((quantizer.dequantize(blocks).cpu() - x).norm() for blocks in (cpu, gpu))
        torch.testing.assert_close(gpu_error, error, rtol=1e-4, atol=0)


def _held_bytes(model: LlamaForCausalLM, prompt: torch.Tensor, cache: Cache) -> int:
    """Return how much more memory is allocated once `generate` has filled the cache."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    model.generate(prompt, past_key_values=cache, max_new_tokens=4, do_sample=False, prefill_chunk_size=2048)
    gc.collect()
    return torch.cuda.memory_allocated() - before


def test_generate_at_8k_tokens_holds_a_third_of_the_memory_of_a_dynamic_cache() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16).cuda()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer.backend_tokenizer.encode((DEMO / "held_out.txt").read_text("utf-8")).ids[:8000]
    prompt = torch.tensor([ids], device="cuda")
    # Warms up: what libraries and codebooks keep from their first use is not the cache's.
    _held_bytes(model, prompt, DynamicCache(config=model.config))
    _held_bytes(model, prompt, TurboQuantCache(bits=4, config=model.config))
    dynamic_cache = DynamicCache(config=model.config)
    dynamic = _held_bytes(model, prompt, dynamic_cache)
    cache = TurboQuantCache(bits=4, config=model.config)
    compressed = _held_bytes(model, prompt, cache)
    footprint = cache.memory_footprint()
    print(f"8,000 tokens: {dynamic:,} bytes in DynamicCache, {compressed:,} in TurboQuantCache {footprint}")
    # The allocator rounds each tensor up.
    assert abs(compressed - footprint.total_bytes) < 0.05 * footprint.total_bytes
    assert abs(dynamic - footprint.bf16_bytes) < 0.05 * footprint.bf16_bytes
    assert compressed < dynamic / 3


def _answer(manager: ModelManager, prompt: list[int], params: SamplingParams) -> tuple[str, int]:
    async def collect() -> tuple[str, int]:
        text, count = "", 0
        async for output in manager.engine.generate(prompt, params, "request"):
            text, count = text + output.text, output.num_output_tokens
        return text, count

    return asyncio.run(collect())


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_the_server_answers_on_cuda_with_the_demo_model(quantize: str) -> None:
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    manager = ModelManager(ServerConfig(quantize=quantize))
    manager.load()
    try:
        text = (DEMO / "held_out.txt").read_text("utf-8")[:20_000].replace("<|endoftext|>", "\n")
        question = f"The access code of Velmora is 917354. {text}\n\nWhat is the access code of Velmora?"
        prompt = manager.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        print(manager.startup_report())
        assert _answer(manager, prompt, SamplingParams(max_tokens=16, temperature=0.0))[0] == "917354"
    finally:
        manager.unload()


def test_the_server_answers_on_cuda_with_an_8b_model_of_random_weights(tmp_path: Path) -> None:
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(LLAMA_8B)
        finally:
            torch.set_default_dtype(torch.float32)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(tmp_path)
    del model
    torch.cuda.empty_cache()
    manager = ModelManager(ServerConfig(model=str(tmp_path), kv_budget_bits=3.5))
    manager.load()
    try:
        print(manager.startup_report())
        prompt = torch.randint(3, 4000, (4096,), generator=torch.Generator().manual_seed(0)).tolist()
        _, count = _answer(manager, prompt, SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True))
        assert count == 32
    finally:
        manager.unload()
