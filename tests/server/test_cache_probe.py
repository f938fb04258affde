"""The probe measures what a cache takes and refuses models whose cache is not kept as it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from turboquant_core import TurboQuantCache
from turboquant_server.cache_probe import (
    CacheMeasurement,
    CacheSize,
    UnsupportedCacheError,
    check_cache,
    measure_cache,
)

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """Make weights so large that a wrong cache shows."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def measure(model: PreTrainedModel, max_model_len: int, **bits: int) -> CacheMeasurement:
    """Check a model and measure its caches of so many bits."""
    return measure_cache(
        lambda: TurboQuantCache(**bits, config=model.config), check_cache(model), max_model_len
    )


@pytest.mark.parametrize(("bits", "bytes_per_head"), [(2, 16), (3, 24), (4, 32), (8, 64)])
def test_the_bytes_are_those_of_codes_norms_means_and_exact_tokens(
    tiny_model: PreTrainedModel, bits: int, bytes_per_head: int
) -> None:
    measured = measure(tiny_model, 2048, bits=bits)
    num_vectors = 2 * 2 * 2  # layers, kv heads, keys and values
    # Codes, a float16 norm, and a 32nd of an int8 mean with its float16 step.
    per_token = num_vectors * (bytes_per_head + 2 + (64 + 2) / 32)
    # Of 1,024 tokens the first 4 stay exact; of the others, whole blocks of 64 leave the newest 128: 13.
    exact = num_vectors * (1024 - 13 * 64) * 64 * 4
    assert measured.compressed == CacheSize(1024, int(13 * 64 * per_token) + exact, per_token)
    assert measured.bf16 == CacheSize(1024, num_vectors * 1024 * 64 * 2, num_vectors * 64 * 2)
    assert measured.bits_per_value == pytest.approx(
        8 * measured.compressed.num_bytes / (num_vectors * 1024 * 64)
    )
    assert measured.bits_per_further_value == pytest.approx(bits + (16 + (8 * 64 + 16) / 32) / 64)


def test_keys_and_values_of_different_bits_are_counted_apart(tiny_model: PreTrainedModel) -> None:
    measured = measure(tiny_model, 2048, key_bits=4, value_bits=3)
    assert measured.compressed.bytes_per_token == 2 * 2 * ((32 + 24) + 2 * (2 + 66 / 32))


def test_a_short_context_is_measured_at_its_own_length(tiny_model: PreTrainedModel) -> None:
    measured = measure(tiny_model, 100)
    assert measured.compressed.num_tokens == 100
    assert measured.bits_per_value == 32  # all of them are first or newest tokens, in the model's float32


def test_the_bf16_bytes_are_those_of_a_dynamic_cache(tiny_model: PreTrainedModel) -> None:
    cache = DynamicCache(config=tiny_model.config)
    with torch.inference_mode():
        tiny_model(torch.arange(256)[None], past_key_values=cache)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert measure(tiny_model, 256).bf16.num_bytes == 2 * held


def test_sliding_window_layers_take_no_more_beyond_their_window() -> None:
    model = randomized(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=200)))
    measured = measure(model, 4096)
    assert measured.compressed.bytes_per_token == measured.bf16.bytes_per_token == 0
    assert measured.compressed.count_tokens(10**9) is None


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)),
        Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=8, query_pre_attn_scalar=64)),
    ],
    ids=["gpt2", "gemma3"],
)
def test_common_families_pass(model: PreTrainedModel) -> None:
    assert measure(randomized(model), 256).compressed.num_tokens == 256


def test_the_states_are_those_of_every_layer(tiny_model: PreTrainedModel) -> None:
    states = check_cache(tiny_model)
    assert {index: [tuple(x.shape) for x in pair] for index, pair in states.items()} == {
        index: [(1, 2, 1, 64)] * 2 for index in (0, 1)
    }


def test_a_model_without_attention_is_refused() -> None:
    config = Mamba2Config(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=1,
        state_size=16,
        num_heads=8,
        head_dim=16,
        n_groups=2,
    )
    with pytest.raises(UnsupportedCacheError, match="0 of 0 attention layers use it"):
        check_cache(Mamba2ForCausalLM(config).eval())


def test_a_model_that_looks_ahead_is_refused() -> None:
    config = BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    with pytest.raises(UnsupportedCacheError, match="its tokens differ from those without one"):
        check_cache(randomized(BertLMHeadModel(config)))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_model_gets_its_cache_by_the_name_that_it_has_for_it(name: str) -> None:
    class Newer(GPT2LMHeadModel):
        def forward(self, input_ids: Any, cache: Any = None, use_cache: bool = False) -> Any:
            return GPT2LMHeadModel.forward(self, input_ids, past_key_values=cache, use_cache=use_cache)

    class Older(GPT2LMHeadModel):
        def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = False) -> Any:
            return GPT2LMHeadModel.forward(self, input_ids, past_key_values, use_cache=use_cache)

    kind = Newer if name == "cache" else Older
    model = kind(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4))
    assert set(check_cache(randomized(model))) == {0, 1}


def test_a_model_that_cannot_continue_a_prompt_is_refused() -> None:
    class Forgetful(GPT2LMHeadModel):
        def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **options: Any) -> Any:
            if past_key_values is not None and input_ids.shape[1] > 1:
                past_key_values.reset()
            return super().forward(input_ids, past_key_values=past_key_values, **options)

    model = Forgetful(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4))
    with pytest.raises(UnsupportedCacheError, match="differ"):
        check_cache(randomized(model))


def test_a_model_that_leaves_a_layer_out_is_refused(tiny_model: PreTrainedModel) -> None:
    class HalfCached:
        config = tiny_model.config
        device = tiny_model.device
        dtype = tiny_model.dtype

        def get_input_embeddings(self) -> Any:
            return tiny_model.get_input_embeddings()

        def forward(self, *, past_key_values: Any = None, **options: Any) -> Any:
            outputs = tiny_model(**options)
            if past_key_values is not None:
                length = options["input_ids"].shape[1]
                past_key_values.update(torch.zeros(1, 2, length, 64), torch.zeros(1, 2, length, 64), 0)
            return outputs

        __call__ = forward

    with pytest.raises(UnsupportedCacheError, match="1 of 2 attention layers use it"):
        check_cache(HalfCached())  # type: ignore[arg-type]


def test_a_head_too_small_for_the_quantizer_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(UnsupportedCacheError, match=r"it fails with one \(ValueError: .*head_dim"):
        check_cache(model.eval())


def test_logits_that_are_not_finite_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=4)).eval()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.nan
    with pytest.raises(UnsupportedCacheError, match="its logits are not finite"):
        check_cache(model)


def test_tokens_are_counted_by_the_bytes_that_they_take() -> None:
    size = CacheSize(num_tokens=100, num_bytes=1000, bytes_per_token=2.5)
    assert [size.count_tokens(number) for number in (0, 500, 1000, 1002, 1005, 2000)] == [
        0,
        50,
        100,
        100,
        102,
        500,
    ]
