"""Frozen rotary embeddings: what transformers computes for the longest sequence, whatever the batch holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from turboquant_server.rope import freeze_rope

ORIGINAL = 64  # tokens that the models were made for, before their rotary embeddings were stretched
LONGEST = 150
SHORT = 20
BASE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
LAYERS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}


def build(model_type: str, rope: dict[str, Any], positions: int = 256, **options: Any) -> PreTrainedModel:
    """Return a random model; the same each time."""
    torch.manual_seed(0)
    rope = {
        name: {"rope_theta": 10000.0, **value} if isinstance(value, dict) else value
        for name, value in rope.items()
    }
    if "rope_type" in rope:
        rope["rope_theta"] = 10000.0
    config = AutoConfig.for_model(
        model_type, **{**BASE, "max_position_embeddings": positions, "rope_parameters": rope, **options}
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def build_phi3() -> PreTrainedModel:
    # Its configuration has the original length a second time, and takes it from there.
    return build("phi3", LONGROPE, original_max_position_embeddings=ORIGINAL)


def build_gemma3(full: dict[str, Any], sliding: dict[str, Any]) -> PreTrainedModel:
    rope = {"full_attention": full, "sliding_attention": sliding}
    return build("gemma3_text", rope, positions=ORIGINAL, **LAYERS)


CHANGING: dict[str, Callable[[], PreTrainedModel]] = {
    "phi3 longrope": build_phi3,
    "phimoe longrope": lambda: build(
        "phimoe", {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4}, **EXPERTS
    ),
    "llama dynamic": lambda: build("llama", DYNAMIC, positions=ORIGINAL),
    "gemma3 longrope and default": lambda: build_gemma3(LONGROPE, {"rope_type": "default"}),
    "gemma3 dynamic and longrope": lambda: build_gemma3(DYNAMIC, LONGROPE),
}
FIXED: dict[str, Callable[[], PreTrainedModel]] = {
    "default": lambda: build("llama", {"rope_type": "default"}),
    "linear": lambda: build("llama", {"rope_type": "linear", "factor": 4.0}),
    "yarn": lambda: build("llama", YARN),
    "llama3": lambda: build("llama", LLAMA3),
    "two types of layers": lambda: build_gemma3(YARN, {"rope_type": "default"}),
    "no rotary embedding": lambda: build("gpt2", {}, n_embd=64, n_layer=2, n_head=4, n_positions=256),
}
changing = pytest.mark.parametrize("build_model", CHANGING.values(), ids=CHANGING)


@torch.inference_mode()
def logits(model: PreTrainedModel, *prompts: Tensor) -> Tensor:
    """Return the logits of the first prompt in a batch with the others, padded behind."""
    length = max(map(len, prompts))
    padded = torch.stack([torch.nn.functional.pad(prompt, (0, length - len(prompt))) for prompt in prompts])
    output: Tensor = model(padded, use_cache=False).logits
    return output[0, : len(prompts[0])]


@pytest.fixture
def long_prompt() -> Tensor:
    return torch.randint(3, 64, (LONGEST,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def short_prompt(long_prompt: Tensor) -> Tensor:
    """Return the start of the long prompt; what comes behind changes nothing else in a causal model."""
    return long_prompt[:SHORT]


def inverse_frequencies(model: PreTrainedModel) -> dict[str, Tensor]:
    return {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    }


@changing
def test_the_models_of_these_tests_do_depend_on_the_longest_sequence(
    build_model: Callable[[], PreTrainedModel], long_prompt: Tensor, short_prompt: Tensor
) -> None:
    alone = logits(build_model(), short_prompt)
    beside = logits(build_model(), short_prompt, long_prompt)
    assert (alone - beside).abs().max() > 1e-3 * alone.abs().max()


@changing
def test_every_sequence_has_the_logits_of_the_longest_one(
    build_model: Callable[[], PreTrainedModel], long_prompt: Tensor, short_prompt: Tensor
) -> None:
    plain = logits(build_model(), long_prompt)
    model = build_model()
    freeze_rope(model, LONGEST)
    assert torch.equal(logits(model, long_prompt), plain)
    torch.testing.assert_close(logits(model, short_prompt), plain[:SHORT], rtol=0, atol=1e-5)


@changing
@pytest.mark.parametrize("max_model_len", [SHORT, ORIGINAL])
def test_within_the_original_length_every_sequence_has_the_logits_of_a_short_one(
    build_model: Callable[[], PreTrainedModel], long_prompt: Tensor, short_prompt: Tensor, max_model_len: int
) -> None:
    plain = logits(build_model(), long_prompt[:ORIGINAL])
    model = build_model()
    freeze_rope(model, max_model_len)
    assert torch.equal(logits(model, long_prompt[:ORIGINAL]), plain)
    torch.testing.assert_close(logits(model, short_prompt), plain[:SHORT], rtol=0, atol=1e-5)


@changing
@pytest.mark.parametrize("max_model_len", [ORIGINAL, LONGEST])
def test_no_sequence_changes_another_one_beside_or_after_it(
    build_model: Callable[[], PreTrainedModel], long_prompt: Tensor, short_prompt: Tensor, max_model_len: int
) -> None:
    model = build_model()
    freeze_rope(model, max_model_len)
    alone = logits(model, short_prompt)
    beside = logits(model, short_prompt, long_prompt)
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-5)
    assert torch.equal(logits(model, short_prompt), alone)


@changing
def test_what_ran_before_freezing_does_not_count(
    build_model: Callable[[], PreTrainedModel], long_prompt: Tensor, short_prompt: Tensor
) -> None:
    fresh, used = build_model(), build_model()
    logits(used, long_prompt)
    freeze_rope(fresh, ORIGINAL)
    freeze_rope(used, ORIGINAL)
    assert torch.equal(logits(used, short_prompt), logits(fresh, short_prompt))


@changing
def test_a_second_time_changes_nothing_and_the_configuration_stays(
    build_model: Callable[[], PreTrainedModel], long_prompt: Tensor
) -> None:
    model = build_model()
    weights, config = set(model.state_dict()), model.config.to_dict()
    freeze_rope(model, LONGEST)
    before, logits_before = inverse_frequencies(model), logits(model, long_prompt)
    assert before
    freeze_rope(model, LONGEST)
    torch.testing.assert_close(inverse_frequencies(model), before, rtol=0, atol=0)
    assert torch.equal(logits(model, long_prompt), logits_before)
    assert (set(model.state_dict()), model.config.to_dict()) == (weights, config)


def test_the_frequencies_of_one_model_are_its_own() -> None:
    config = build_phi3().config
    models: list[PreTrainedModel] = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
    freeze_rope(models[0], LONGEST)
    freeze_rope(models[1], ORIGINAL)
    [long], [short] = (inverse_frequencies(model).values() for model in models)
    factors = torch.tensor(LONGROPE["long_factor"]) / torch.tensor(LONGROPE["short_factor"])
    torch.testing.assert_close(short / long, factors)


@pytest.mark.parametrize("build_model", FIXED.values(), ids=FIXED)
def test_frequencies_that_do_not_change_are_left_as_they_are(
    build_model: Callable[[], PreTrainedModel], long_prompt: Tensor
) -> None:
    plain, model = build_model(), build_model()
    freeze_rope(model, LONGEST)
    assert torch.equal(logits(model, long_prompt), logits(plain, long_prompt))
    for module, unchanged in zip(model.modules(), plain.modules(), strict=True):
        assert getattr(module, "rope_type", None) == getattr(unchanged, "rope_type", None)
