"""The other schemes are what their authors wrote, and the cache shows them as decoding does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from alternatives import (
    ALTERNATIVES,
    Part,
    Scheme,
    SchemeCache,
    kivi_scheme,
    quantize_fp8,
    quantize_kivi_keys,
    quantize_kivi_values,
    quantize_q4_0,
    quantize_q8_0,
    quantize_vllm_values,
)
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

NUM_LAYERS = 3
HEAD_DIM = 64
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    initializer_range=0.2,
)


def random_states(num_tokens: int, head_dim: int = HEAD_DIM) -> Tensor:
    return torch.randn(2, 2, num_tokens, head_dim, generator=torch.Generator().manual_seed(0))


def block(*numbers: float) -> Tensor:
    """Return one block of 32 channels: these numbers, then zeros."""
    return torch.tensor([*numbers, *[0.0] * (32 - len(numbers))])[None, None, None]


def seen(scheme: Scheme, keys: Tensor, values: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Return what the last token sees in layer 1 after all before it came in chunks."""
    cache = SchemeCache(CONFIG, scheme)
    *chunks, last = (*range(0, keys.shape[2] - 1, chunk), keys.shape[2] - 1)
    for start in chunks:
        part = slice(start, min(start + chunk, last))
        cache.update(keys[:, :, part], values[:, :, part], 1)
    return cache.update(keys[:, :, last:], values[:, :, last:], 1)


# What the formats are


def test_q8_0_rounds_ties_away_from_zero_and_clips_nothing() -> None:
    x = block(127, -127, 0.5, -0.5, 0.49, 2.5, -126.5, 63.4)
    assert torch.equal(quantize_q8_0(x), block(127, -127, 1, -1, 0, 3, -127, 63))


def test_q8_0_keeps_its_scale_in_float16() -> None:
    scale = 2**-7 + 8 * 2**-17  # the float16 number next to 1 / 127
    assert torch.equal(quantize_q8_0(block(1, -1, 0.5)), block(127 * scale, -127 * scale, 64 * scale))


def test_q4_0_has_eight_levels_on_the_side_of_its_largest_number_and_seven_on_the_other() -> None:
    x = block(-8, 8, 7.5, 0.5, 0.49, -0.5, -0.51, -7.5, 3.2)
    assert torch.equal(quantize_q4_0(x), block(-8, 7, 7, 1, 0, 0, -1, -7, 3))


def test_q4_0_takes_the_sign_of_the_first_of_the_largest_numbers() -> None:
    assert torch.equal(quantize_q4_0(block(8, -8)), block(8, -7))


@pytest.mark.parametrize("quantize", [quantize_q8_0, quantize_q4_0])
def test_llama_cpp_blocks_do_not_depend_on_each_other_and_may_be_zero(quantize) -> None:
    x = torch.cat([block(), block(1, -0.3, 0.2), block(-1e4, 70)], dim=-1)
    assert torch.equal(quantize(x), torch.cat([quantize(part) for part in x.split(32, dim=-1)], dim=-1))
    assert torch.equal(quantize(block()), block())


def test_fp8_rounds_to_e4m3_and_saturates() -> None:
    x = torch.tensor([0.3, 1.06, 1.07, -17, 449, 1e5, -1e5])
    assert quantize_fp8(x).tolist() == [0.3125, 1, 1.125, -16, 448, 448, -448]


def test_kivi_gives_constant_channels_and_its_own_levels_back_exactly() -> None:
    keys = torch.tensor([600.0, -3.25, 0.0, 17.5]).expand(1, 2, 64, 4)
    assert torch.equal(quantize_kivi_keys(keys, 2), keys)
    levels = 5 + 0.75 * (torch.arange(64) % 4)
    assert torch.equal(quantize_kivi_keys(levels.view(1, 1, 64, 1), 2).flatten(), levels)
    assert torch.equal(quantize_kivi_values(levels.view(1, 1, 1, 64), 2).flatten(), levels)


def test_kivi_groups_keys_by_channel_and_values_by_token() -> None:
    x = random_states(64)
    outlier = x.clone()
    outlier[0, 0, 40, 3] = 1e4
    changed = (quantize_kivi_keys(outlier, 4) != quantize_kivi_keys(x, 4)).nonzero()
    assert {tuple(row) for row in changed[:, [0, 1, 3]].tolist()} == {(0, 0, 3)}
    assert changed[:, 2].min() >= 32
    changed = (quantize_kivi_values(outlier, 4) != quantize_kivi_values(x, 4)).nonzero()
    assert {tuple(row) for row in changed[:, :3].tolist()} == {(0, 0, 40)}
    assert changed[:, 3].max() < 32


def test_vllm_values_come_back_exactly_where_they_are_levels() -> None:
    levels = 5 + 0.75 * (torch.arange(HEAD_DIM) % 8).view(1, 1, 1, HEAD_DIM)
    assert torch.equal(quantize_vllm_values(levels, 3), levels)
    assert torch.equal(quantize_vllm_values(torch.full_like(levels, 1.5), 3), torch.full_like(levels, 1.5))


@pytest.mark.parametrize(
    ("name", "key_error", "value_error"),
    [
        # measured on the package; Lloyd-Max levels would have 0.116, 0.034 and 0.0093
        ("seed 2 bits", 0.129, 0.129),
        ("seed 3 bits", 0.049, 0.049),
        ("seed 4 bits", 0.0195, 0.0195),
        # measured with other code
        ("q4_0", 0.0074, 0.0074),
        ("vLLM 4bit_nc", 0.00917, 0.00997),
        ("vLLM 3bit_nc", 0.0338, 0.0458),
    ],
)
def test_mean_squared_error_on_normal_numbers(name: str, key_error: float, value_error: float) -> None:
    x = random_states(1000, head_dim=128)
    for part, error in (
        (ALTERNATIVES[name].keys, key_error),
        (ALTERNATIVES[name].values, value_error),
    ):
        measured = (part.quantize(x) - x).square().sum() / x.square().sum()
        assert measured.item() == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("seed 4 bits", 4.25),
        ("seed 3 bits", 3.25),
        ("seed 2 bits", 2.25),
        ("q8_0", 8.5),
        ("q4_0", 4.5),
        ("fp8 e4m3", 8),
        ("KIVI 4", 5),
        ("KIVI 2", 3),
        ("vLLM 4bit_nc", 134 * 8 / 256),
        ("vLLM 3bit_nc", 102 * 8 / 256),
        ("vLLM 4bit_nc, one bf16 layer at each end", (2 * 16 + 4 * 4.1875) / 6),
        ("vLLM 3bit_nc, one bf16 layer at each end", (2 * 16 + 4 * 3.1875) / 6),
    ],
)
def test_bits_per_value_count_scales_and_exact_layers(name: str, bits: float) -> None:
    config = LlamaConfig(num_hidden_layers=6, hidden_size=512, num_attention_heads=4)
    assert SchemeCache(config, ALTERNATIVES[name]).bits_per_value == bits


# What the cache shows


@pytest.mark.parametrize(
    ("name", "exact_keys", "exact_values"),
    [("seed 4 bits", 128, 128), ("q8_0", 0, 0), ("KIVI 4", 301 - 256, 129), ("vLLM 3bit_nc", 0, 0)],
)
@pytest.mark.parametrize("chunk", [1, 7, 64, 300])
def test_tokens_are_quantized_once_when_they_are_no_longer_exact(
    name: str, exact_keys: int, exact_values: int, chunk: int
) -> None:
    scheme = ALTERNATIVES[name]
    counting = [replace(part, quantize=lambda x: x + 1) for part in (scheme.keys, scheme.values)]
    states = torch.arange(301.0).view(1, 1, 301, 1).expand(2, 2, 301, HEAD_DIM)
    keys, values = seen(Scheme("counting", *counting), states, -states, chunk)
    for times, num_exact in ((keys - states, exact_keys), (values + states, exact_values)):
        assert (times[:, :, : 301 - num_exact] == 1).all()
        assert (times[:, :, 301 - num_exact :] == 0).all()


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("name", ["q8_0", "fp8 e4m3", "KIVI 4", "KIVI 2"])
def test_chunks_do_not_matter(name: str, chunk: int) -> None:
    keys = random_states(300)
    values = keys.flip(2)
    at_once = seen(ALTERNATIVES[name], keys, values, 299)
    for chunked, whole in zip(seen(ALTERNATIVES[name], keys, values, chunk), at_once, strict=True):
        assert torch.equal(chunked, whole)


def test_kivi_quantizes_keys_only_when_128_are_there() -> None:
    cache = SchemeCache(CONFIG, kivi_scheme(2))
    states = random_states(130)
    for length, num_quantized in ((127, 0), (128, 0), (129, 128), (130, 128)):
        new = states[:, :, cache.get_seq_length() : length]
        keys, _ = cache.update(new, new, 0)
        same = (keys == states[:, :, :length]).all(-1)[0, 0]
        assert same.tolist() == [False] * num_quantized + [True] * (length - num_quantized)


def test_layers_at_the_ends_stay_as_they_came() -> None:
    scheme = ALTERNATIVES["vLLM 3bit_nc, one bf16 layer at each end"]
    cache = SchemeCache(CONFIG, scheme)
    states = random_states(200)
    for layer in range(NUM_LAYERS):
        keys, values = cache.update(states, states, layer)
        is_exact = layer != 1
        assert torch.equal(keys, states) is is_exact
        assert torch.equal(values, states) is is_exact


def test_length_and_mask_are_those_of_transformers() -> None:
    ours, theirs = SchemeCache(CONFIG, ALTERNATIVES["KIVI 4"]), DynamicCache(config=CONFIG)
    states = random_states(12)
    for cache in (ours, theirs):
        for layer in range(NUM_LAYERS):
            cache.update(states, states, layer)
    for layer in range(NUM_LAYERS):
        assert ours.get_seq_length(layer) == theirs.get_seq_length(layer) == 12
        assert ours.get_mask_sizes(3, layer) == theirs.get_mask_sizes(3, layer)
        assert ours.layers[layer].get_max_length() == theirs.layers[layer].get_max_length()
    ours.reset()
    assert ours.get_seq_length() == 0


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(CONFIG).eval()


@torch.no_grad()
def logits(llama: LlamaForCausalLM, cache: Cache) -> Tensor:
    """Return the logits of 2 rows of 200 tokens that come in chunks of very different sizes."""
    ids = torch.randint(64, (2, 200), generator=torch.Generator().manual_seed(0))
    # The cache goes by position: transformers gave the argument another name in 5.24.
    return torch.cat(
        [llama(part, None, None, cache).logits for part in ids.split([150, 1, 30, 19], dim=1)], 1
    )


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_a_model_runs_and_notices(llama: LlamaForCausalLM, name: str) -> None:
    measured = logits(llama, SchemeCache(CONFIG, ALTERNATIVES[name]))
    assert measured.isfinite().all()
    assert not torch.allclose(measured, logits(llama, DynamicCache(config=CONFIG)), atol=1e-4)


@pytest.mark.parametrize(("num_exact", "step"), [(0, 1), (1, 1), (1, 128), (128, 1)])
def test_a_quantizer_that_loses_nothing_changes_nothing(
    llama: LlamaForCausalLM, num_exact: int, step: int
) -> None:
    lossless = Part(lambda x: x.clone(), 16, num_exact=num_exact, step=step)
    measured = logits(llama, SchemeCache(CONFIG, Scheme("lossless", lossless, lossless)))
    torch.testing.assert_close(measured, logits(llama, DynamicCache(config=CONFIG)), rtol=0, atol=1e-5)
