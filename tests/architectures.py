"""Tiny random models of the causal language models that transformers has, and how each can be served.

Knows transformers only: no part of this repository, and no file but its own. More than 300 lines, because it
is one table.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPTJForCausalLM, PreTrainedModel

Options = dict[str, Any]
Serving = Literal["interface", "dense", "one_shot", "unsupported"]

VOCAB_SIZE = 128
NUM_POSITIONS = 256
WINDOW = 8
# fmt: off
BASE: Options = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": NUM_POSITIONS,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
GPT2: Options = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": NUM_POSITIONS}
HEADS_OF_16: Options = {"head_dim": 16}
HEADS_OF_32: Options = {"head_dim": 32}
SLIDING: Options = {
    "head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2,
}
EXPERTS: Options = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1,
}
LATENT: Options = {  # keys of 32, values of 16
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "num_key_value_heads": 4,
}
INDEXER: Options = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
LINEAR: Options = {
    "head_dim": 32, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
MAMBA2: Options = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 16,
    "mamba_expand": 2,
}
GEMMA4: Options = {
    **SLIDING, "model_type": "gemma4_text", "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}


@dataclass(frozen=True)
class Architecture:
    """Describe one entry of the table.

    Attributes:
        options: Options of its configuration, over `BASE`; "model_type" where its name is not one.
        serving: "interface": its attention, if any, goes through transformers' AttentionInterface. "dense":
            its attention is its own and needs keys and values as tensors. "one_shot": as "interface", but
            its states can be computed over a whole prompt or one token, not from where a chunk ended.
        reason: Why it cannot be served.
    """

    options: Options
    serving: Serving = "interface"
    reason: str = ""


def each(names: str, options: Options) -> dict[str, Options]:
    return dict.fromkeys(names.split(), options)


def with_rope(rope_type: str, **options: object) -> Options:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **options}}


FULL_ATTENTION: dict[str, Options] = {
    **each("apertus arcee biogpt bitnet cohere fuyu gpt_neox hyperclovax jais2 llama nanochat nemotron", {}),
    **each("olmo olmo2 persimmon phi", {}),
    **each("ernie4_5 glm glm4 helium hunyuan_v1_dense ministral3 seed_oss", HEADS_OF_16),
    **each("gemma qwen3", HEADS_OF_32),
    **each("gpt2 gpt_bigcode", GPT2),
    "ctrl": {**GPT2, "dff": 96},
    "granite": {"attention_multiplier": 0.3},
    "hrm_text": {**HEADS_OF_16, "num_hidden_layers": 2, "H_cycles": 2, "L_cycles": 2, "prefix_lm": False},
    "llama_dynamic": {"model_type": "llama", **with_rope("dynamic", factor=2.0)},
    "llama_llama3": {
        "model_type": "llama",
        **with_rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=128,
        ),
    },
    "llama_yarn": {
        "model_type": "llama", **with_rope("yarn", factor=2.0, original_max_position_embeddings=128),
    },
    "moshi": {**HEADS_OF_16, "ffn_dim": 96, "sliding_window": NUM_POSITIONS},  # a window only its cache has
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3_longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 16,  # a forward of shorter sequences turns by other angles
        **with_rope(
            "longrope", factor=16.0, original_max_position_embeddings=16, short_factor=[1.0] * 8,
            long_factor=[2.0] * 8,
        ),
    },
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "stablelm": {"partial_rotary_factor": 0.25},
}

WINDOWS: dict[str, Options] = {  # and soft caps, and keys and values of other layers
    **each("cohere2 cwm exaone4 granite_swa ministral olmo3", SLIDING),
    **each("mistral starcoder2", {"sliding_window": WINDOW}),
    "cohere_compass_text": {
        **SLIDING,
        "rope_parameters": {
            layer_type: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for layer_type in ("sliding_attention", "full_attention")
        },
    },
    "gemma2": {**SLIDING, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 16},
    "gemma3n_text": {
        **SLIDING, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE, "altup_num_inputs": 2, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [96] * 4,
    },
    "gemma4_text": {**GEMMA4, "num_kv_shared_layers": 0, "global_head_dim": 32, "attention_k_eq_v": True},
    "gemma4_text_shared": {**GEMMA4, "num_kv_shared_layers": 2, "global_head_dim": 64},
    "modernbert-decoder": {"local_attention": 2 * WINDOW},
    "phi3": {"sliding_window": WINDOW, "original_max_position_embeddings": NUM_POSITIONS},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "vaultgemma": {**SLIDING, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
}

MIXTURES: dict[str, Options] = {
    **each("aria_text flex_olmo granitemoe olmoe qwen2_moe", EXPERTS),
    **each("glm4_moe hy_v3 minimax_m2 solar_open", {**EXPERTS, **HEADS_OF_16}),
    **each("afmoe cohere2_moe exaone_moe gpt_oss granitemoe_swa laguna mellum", {**SLIDING, **EXPERTS}),
    **each("mixtral phimoe", {**EXPERTS, "sliding_window": WINDOW}),
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": NUM_POSITIONS,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {**EXPERTS, "routed_scaling_factor": 1.0},
    "ernie4_5_moe": {**EXPERTS, **HEADS_OF_16, "moe_num_experts": 4, "moe_k": 2},
    "granitemoeshared": {**EXPERTS, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {**EXPERTS, **HEADS_OF_16, "moe_topk": 2},
    "jetmoe": {**EXPERTS, "kv_channels": 16},
    "llama4_text": {
        **EXPERTS, **HEADS_OF_16, "intermediate_size_mlp": 96, "attention_chunk_size": WINDOW,
        "no_rope_layers": [1, 0, 1, 0], "layer_types": ["chunked_attention", "full_attention"] * 2,
    },
    "mimo_v2_flash": {**SLIDING, **EXPERTS, "v_head_dim": 24},  # 4 kv heads in the windows, 2 elsewhere
    "qwen2_moe_sliding": {
        "model_type": "qwen2_moe", **EXPERTS, "use_sliding_window": True, "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "qwen3_moe": {**EXPERTS, **HEADS_OF_32},
}

LATENTS: dict[str, Options] = {
    **each("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite", {**EXPERTS, **LATENT}),
    **each("minicpm3 youtu", LATENT),
    "longcat_flash": {
        **LATENT, **HEADS_OF_16, "num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
    },
}

STATES: dict[str, Options] = {  # in layers of their own, beside keys and values, or alone
    "bamba": {**MAMBA2, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA2, **HEADS_OF_16, "mamba_d_ssm": 128},
    "granitemoehybrid": {
        **EXPERTS, **MAMBA2, "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 32,
    },
    "kimi_linear": {
        **EXPERTS, **LATENT, "layer_types": LINEAR["layer_types"], "linear_head_dim": 16,
        "linear_num_heads": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": [1, 3]},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
    "nemotron_h": {
        **EXPERTS, **HEADS_OF_16, "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo_hybrid": {"layer_types": LINEAR["layer_types"]},
    "qwen3_5_moe_text": {**LINEAR, **EXPERTS},
    "qwen3_5_text": LINEAR,
    "qwen3_next": {**LINEAR, **EXPERTS},
    "zamba2": {
        "attention_head_dim": 32, "layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 2,
        "mamba_d_state": 16, "chunk_size": 16,
    },
    "zaya": {
        **EXPERTS, **HEADS_OF_16, "num_experts_per_tok": 1, "sliding_window": WINDOW,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    },
}

MAMBA1: dict[str, Options] = {
    "falcon_mamba": {"state_size": 8},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8,
    },
    "mamba": {"state_size": 8},
    "zamba": {
        "attention_head_dim": 32, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8,
        "initializer_range": 0.1,
    },
}

GPTJ_ATTENTION: dict[str, Options] = {  # older releases of transformers compute it in the models
    "codegen": {**GPT2, "rotary_dim": 8},
    "gptj": {**GPT2, "rotary_dim": 8},
}

OWN_ATTENTION: dict[str, Options] = {
    "bloom": {},
    "diffllama": {},
    "doge": {},  # adds a bias of each key
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon_alibi": {
        "model_type": "falcon", "new_decoder_architecture": False, "multi_query": True, "alibi": True,
    },
    "gpt_neo": {
        "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]],
        "window_size": WINDOW,
    },
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "inkling_text": {  # adds a bias of each position
        **EXPERTS, **HEADS_OF_16, "swa_head_dim": 16, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "sliding_window_size": WINDOW, "local_layer_ids": [0, 2],
        "rel_extent": 16,
    },
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": NUM_POSITIONS},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 4, "attention_heads": 4},
}

CHOOSES_KEYS = "an indexer with a cache of its own chooses the keys of each query"
UNSUPPORTED: dict[str, tuple[str, Options]] = {
    "axk2": (CHOOSES_KEYS, {**EXPERTS, **LATENT, **INDEXER}),
    "cpmant": ("puts tokens of its own before the prompt", {"dim_head": 16}),
    "deepseek_v32": (CHOOSES_KEYS, {**EXPERTS, **LATENT, **INDEXER}),
    "deepseek_v4": (
        "its layers compress keys in caches of their own",
        {**EXPERTS, **HEADS_OF_32, **INDEXER, "q_lora_rank": 32, "sliding_window": WINDOW},
    ),
    "glm_moe_dsa": (CHOOSES_KEYS, {**EXPERTS, **LATENT, **INDEXER}),
    "hy_v4": (CHOOSES_KEYS, {**EXPERTS, **LATENT, **INDEXER}),
    "minimax": (
        "accepts no cache but one of its own class",
        {**EXPERTS, **HEADS_OF_16, "layer_types": LINEAR["layer_types"]},
    ),
    "minimax_m3_vl_text": (
        CHOOSES_KEYS,
        {
            **EXPERTS, **HEADS_OF_16, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
            "index_block_size": 4, "index_topk_blocks": 2,
        },
    ),
    "openai-gpt": ("has no cache", GPT2),
    "qwen4_exp_text": (
        CHOOSES_KEYS,
        {
            **LINEAR, **EXPERTS, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32,
            "indexer_budget": 16, "indexer_compress_ratio": 4,
        },
    ),
    "recurrent_gemma": (
        "keeps its states in its modules",
        {
            **HEADS_OF_16, "attention_window_size": WINDOW, "lru_width": 64,
            "block_types": ["recurrent", "attention"],
        },
    ),
    "rwkv": ("keeps its states in a list", {"attention_hidden_size": 64}),
    "xlstm": ("accepts no cache but one of its own class", {"num_heads": 4}),
}
# fmt: on
# In older releases of transformers: no soft caps, no causal mask.
WRONG_WITH_SDPA = {"doge", "gemma2", "vaultgemma"}

SERVED: list[tuple[Serving, dict[str, Options]]] = [
    ("interface", {**FULL_ATTENTION, **WINDOWS, **MIXTURES, **LATENTS, **STATES}),
    ("one_shot", MAMBA1),
    ("interface" if GPTJForCausalLM._supports_attention_backend else "dense", GPTJ_ATTENTION),
    ("dense", OWN_ATTENTION),
]
ARCHITECTURES: dict[str, Architecture] = {
    name: Architecture(options, serving) for serving, table in SERVED for name, options in table.items()
} | {name: Architecture(options, "unsupported", reason) for name, (reason, options) in UNSUPPORTED.items()}


def build(name: str) -> PreTrainedModel:
    """Return a random float32 model whose attention is far from uniform."""
    options = copy.deepcopy(ARCHITECTURES[name].options)  # configurations change what they are given
    config = AutoConfig.for_model(**{"model_type": name, **BASE, **options})
    implementation = "eager" if name in WRONG_WITH_SDPA else "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        except ValueError:  # it has attention sinks, or attention of its own
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                scale = 1.0 if "sinks" in parameter_name else 0.08
                parameter.add_(torch.randn(parameter.shape) * scale)
    return model.eval()
