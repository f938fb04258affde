"""Tiny random models of every kind of layer, and a quantizer that loses nothing."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from turboquant_core.block_quantizer import QuantizedBlocks

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {**SLIDING, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 16},
    "gemma3n_text": {  # the last two layers use the keys and values of the first two
        **SLIDING,
        "num_hidden_layers": 4,
        "layer_types": SLIDING["layer_types"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 64,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [64] * 4,
    },
    "gpt_oss": {**SLIDING, **EXPERTS},
    "llama4_text": {
        **EXPERTS,
        "head_dim": 16,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": 8,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "deepseek_v3": {  # keys and values of different sizes
        "kv_lora_rank": 48,
        "q_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    "qwen3_next": {  # layers of states, layers of keys and values
        **EXPERTS,
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 32,
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128, "head_dim": 16},  # both in each layer, the states first
    "zamba2": {  # both in one layer, keys and values first
        "num_hidden_layers": 2,
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "mamba_ngroups": 2,
        "chunk_size": 16,
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "num_mem_blocks": 1,
        "attention_head_dim": 32,
    },
    "nemotron_h": {  # a layer of neither kind between them
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "moe", "attention", "mamba"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
        "chunk_size": 16,
        "head_dim": 16,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},  # states that can be cropped
}
STATEFUL = {"qwen3_next", "falcon_h1", "zamba2", "nemotron_h"}  # generate() refuses to assist them


class ExactBlocks:
    """Takes the place of BlockQuantizer and loses nothing, so that any difference is one of the plumbing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def quantize(self, x: Tensor) -> QuantizedBlocks:
        return QuantizedBlocks(x.clone(), x[..., 0].clone(), x[..., 0, :].clone(), x[..., 0, 0].clone())

    def dequantize(self, blocks: QuantizedBlocks, dtype: torch.dtype) -> Tensor:
        return blocks.codes.to(dtype)


@functools.lru_cache(maxsize=1)
def build(architecture: str) -> Any:
    """Return a random model whose attention is far from uniform."""
    options = {**BASE, **ARCHITECTURES[architecture]}
    config = AutoConfig.for_model(architecture, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        except ValueError:  # attention sinks
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 or "sinks" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model.eval()
