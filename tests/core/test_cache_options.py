"""What TurboQuantCache holds, and what each of its options does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import BASE, build
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from turboquant_core import (
    BlockQuantizer,
    KVCacheConfig,
    LayerTransforms,
    MemoryFootprint,
    Transform,
    TurboQuantCache,
    measure_transforms,
)
from turboquant_core.config import vector_bytes
from turboquant_core.transform import balanced, rotation


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reachable(thing: object, kind: type, seen: set[int]) -> Iterator[Any]:
    """Yield every object of a kind that an object holds; transforms, which caches share, are not entered."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, kind):
        yield thing
    elif isinstance(thing, dict):
        for item in thing.values():
            yield from reachable(item, kind, seen)
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from reachable(item, kind, seen)
    elif hasattr(thing, "__dict__") and not isinstance(thing, Transform):
        yield from reachable(vars(thing), kind, seen)


def tensors_of(cache: TurboQuantCache) -> list[Tensor]:
    return list(reachable(cache, Tensor, set()))


def storage_bytes(cache: TurboQuantCache) -> int:
    """Sum the storages behind a cache's tensors: a small view of a large tensor counts as large."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(cache)}
    return sum(storages.values())


def test_footprint_at_4_bits_is_what_codes_norms_means_and_exact_tokens_take() -> None:
    cache = TurboQuantCache(bits=4)
    for layer_idx in range(3):
        states = torch.randn(1, 2, 4096, 128, dtype=torch.bfloat16)
        cache.update(states, states, layer_idx)
    heads = 3 * 2 * 2  # layers, kv heads, keys and values
    num_blocks = (4096 - 4 - 128) // 64
    num_compressed = 64 * num_blocks
    footprint = cache.memory_footprint()
    assert footprint == MemoryFootprint(
        compressed_bytes=heads * (num_compressed * (64 + 2) + num_blocks * (128 + 2)),
        exact_bytes=heads * (4096 - num_compressed) * 128 * 2,
        other_bytes=0,
        num_compressed_values=heads * num_compressed * 128,
        num_values=heads * 4096 * 128,
    )
    assert footprint.bf16_bytes == heads * 4096 * 128 * 2
    assert footprint.total_bytes == storage_bytes(cache)
    assert footprint.bits_per_value == 8 * footprint.total_bytes / (heads * 4096 * 128)
    assert footprint.bits_per_compressed_value == KVCacheConfig().bits_per_value(128, 128) == 4.251953125


def test_an_unused_cache_takes_nothing() -> None:
    footprint = TurboQuantCache(config=LlamaConfig(**BASE)).memory_footprint()
    assert footprint == MemoryFootprint(0, 0, 0, 0, 0)
    assert footprint.bits_per_value == footprint.bits_per_compressed_value == 0


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "falcon_h1"])
def test_nothing_as_long_as_the_past_survives_a_step_but_codes(architecture: str) -> None:
    """Neither a dequantized copy nor a view that keeps one alive, whatever happened to the cache."""
    model = build(architecture)
    cache = TurboQuantCache(bits=4, residual_length=16, config=model.config)
    ids = torch.randint(3, 64, (2, 230), generator=torch.Generator().manual_seed(3))
    model(ids[:, :200], past_key_values=cache)
    for step in range(200, 230):
        model(ids[:, step : step + 1], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    if architecture == "llama":
        cache.crop(-60)
        assert cache.get_seq_length() == 170
    assert storage_bytes(cache) == cache.memory_footprint().total_bytes
    longest = max(x.shape[2] for x in tensors_of(cache) if x.dtype == torch.float32 and x.dim() == 4)
    assert longest < 16 + 64


def test_full_layers_keep_the_first_tokens_and_sliding_ones_do_not() -> None:
    model = build("gemma2")
    ids = torch.randint(3, 64, (2, 100), generator=torch.Generator().manual_seed(3))
    for num_sinks in (0, 4, 7):
        cache = TurboQuantCache(residual_length=16, num_sinks=num_sinks, config=model.config)
        model(ids, past_key_values=cache)
        held = [[states.sinks.shape[2] for states in layer.states] for layer in cache.layers]
        assert held == [[0, 0], [num_sinks, num_sinks]]
        # No block of 64 fits a window of 8, so the rest of it is exact.
        window, full = 7, 100 - 64
        assert cache.memory_footprint().exact_bytes == 2 * 2 * 2 * 16 * 4 * (window + full)


def test_key_and_value_bits_are_separate_and_default_to_bits() -> None:
    cache = TurboQuantCache(8, value_bits=2, residual_length=0, num_sinks=0)
    states = torch.randn(1, 1, 64, 32)
    cache.update(states, states, 0)
    mean_bytes = 32 + 2
    assert cache.memory_footprint().compressed_bytes == 64 * (32 + 2 + 8 + 2) + 2 * mean_bytes


@pytest.mark.parametrize("with_config", [True, False], ids=["config", "lazy"])
def test_a_layer_may_have_bits_of_its_own(with_config: bool) -> None:
    config = LlamaConfig(**BASE)
    config.layer_types = ["full_attention", "sliding_attention", "hybrid"]
    config.num_hidden_layers, config.sliding_window = 3, 200
    cache = TurboQuantCache(
        3,
        layer_bits={1: (2, 8), 2: (8, 4)},
        residual_length=0,
        num_sinks=0,
        config=config if with_config else None,
    )
    states, before = torch.randn(1, 2, 128, 64), 0
    for layer_idx, (key_bits, value_bits) in enumerate([(3, 3), (2, 8), (8, 4)]):
        if layer_idx == 2:  # states first, as some hybrid layers have it
            cache.update_conv_state(torch.zeros(1, 8, 4), 2)
        cache.update(states, states, layer_idx)
        compressed_bytes = cache.memory_footprint().compressed_bytes
        expected = 2 * 128 * (vector_bytes(64, key_bits) + vector_bytes(64, value_bits))
        assert compressed_bytes - before == expected
        before = compressed_bytes


def own_transforms(num_heads: int, dim: int, seed: int) -> LayerTransforms:
    roots = gaussian(3, num_heads, dim, dim, seed=seed).double()
    moments = roots @ roots.mT
    return LayerTransforms(balanced(moments[0], moments[1], seed), balanced(moments[2], None, seed))


def assert_quantized_with(cache: TurboQuantCache, layer_idx: int, transforms: tuple[Transform, ...]) -> None:
    """Check that keys keep their length and values their projection, the rules that lose least in attention.

    And that each is multiplied by its transform.
    """
    states = gaussian(2, 3, 128, 32, seed=4)
    cache.update(states, states, layer_idx)
    got = cache.update(states[:, :, :0], states[:, :, :0], layer_idx)
    for x, scale, transform in zip(got, ("norm_corrected", "unbiased"), transforms, strict=True):
        quantizer = BlockQuantizer(32, 2, scale=scale, transform=transform)
        expected = quantizer.dequantize(quantizer.quantize(states.unflatten(2, (2, 64)))).flatten(2, 3)
        torch.testing.assert_close(x, expected)


def test_keys_keep_their_length_and_values_their_projection_under_the_seeds_rotation() -> None:
    cache = TurboQuantCache(bits=2, residual_length=0, num_sinks=0)
    assert_quantized_with(cache, 0, (rotation(32, 0),) * 2)
    cache = TurboQuantCache(bits=2, residual_length=0, num_sinks=0, seed=3)
    assert_quantized_with(cache, 0, (rotation(32, 3),) * 2)


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention", "hybrid", None])
def test_each_layer_has_its_own_transforms(kind: str | None) -> None:
    """Its keys, its values or both; what has none is rotated."""
    config = None if kind is None else LlamaConfig(**BASE, sliding_window=200)
    if config is not None:
        config.layer_types, config.num_hidden_layers = [kind] * 4, 4
    both, keys, values = (
        own_transforms(3, 32, 1),
        own_transforms(3, 32, 2).keys,
        own_transforms(3, 32, 3).values,
    )
    transforms = {0: both, 2: LayerTransforms(keys, None), 3: LayerTransforms(None, values)}
    cache = TurboQuantCache(2, residual_length=0, num_sinks=0, transforms=transforms, config=config)
    rotated = rotation(32, 0)
    expected = [both, (rotated, rotated), (keys, rotated), (rotated, values)]
    for layer_idx, pair in enumerate(expected):
        assert_quantized_with(cache, layer_idx, pair)
    cache.reset()
    assert_quantized_with(cache, 0, both)


def test_copies_share_the_transforms_and_the_footprint_counts_none() -> None:
    states, transforms = torch.randn(2, 3, 200, 32), own_transforms(3, 32, 1)
    cache = TurboQuantCache(transforms={0: transforms})
    cache.update(states, states, 0)
    twin = copy.deepcopy(cache)
    assert {id(x) for x in reachable(twin, Transform, set())} == {id(x) for x in transforms}
    assert storage_bytes(twin) == twin.memory_footprint().total_bytes == cache.memory_footprint().total_bytes


@pytest.mark.parametrize(("num_heads", "dim"), [(2, 32), (3, 16)])
def test_transforms_of_another_model_are_refused(num_heads: int, dim: int) -> None:
    cache = TurboQuantCache(transforms={0: own_transforms(num_heads, dim, 1)})
    states = torch.zeros(1, 3, 5, 32)
    message = f"the transforms are for {num_heads} heads of {dim} and the model has 3 of 32: measure them"
    with pytest.raises(ValueError, match=message):
        cache.update(states, states, 0)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_measured_transforms_lower_the_error_of_a_model_with_outlier_channels(bits: int) -> None:
    """Keys 8 times as large, and queries as small, in two pairs of channels that turn together."""
    config = LlamaConfig(
        **{**BASE, "head_dim": 64, "initializer_range": 0.15, "max_position_embeddings": 512}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        for channel in (3, 3 + 32, 20, 20 + 32):
            layer.self_attn.k_proj.weight[channel::64] *= 8
            layer.self_attn.q_proj.weight[channel::64] /= 8
    ids = torch.randint(3, 64, (2, 321), generator=torch.Generator().manual_seed(2))
    text = torch.randint(3, 64, (2, 512), generator=torch.Generator().manual_seed(5))
    transforms = measure_transforms(model, text)

    def logits(cache: Any) -> Tensor:
        model(ids[:, :300], past_key_values=cache)
        return model(ids[:, 300:], past_key_values=cache).logits

    expected = logits(DynamicCache())
    caches = (
        TurboQuantCache(bits, residual_length=0, transforms=transforms),
        TurboQuantCache(bits, residual_length=0),
    )
    balanced_error, error = ((logits(cache) - expected).square().mean().sqrt() for cache in caches)
    assert balanced_error < error / 1.65


def test_numbers_are_checked_at_once_and_heads_below_16_at_the_first_forward() -> None:
    for options in ({"bits": 5}, {"key_bits": 1}, {"layer_bits": {7: (4, 5)}}):
        with pytest.raises(ValueError, match="2, 3, 4 or 8"):
            TurboQuantCache(**options)
    for name in ("residual_length", "num_sinks"):
        with pytest.raises(ValueError, match=f"{name} must not be negative"):
            TurboQuantCache(**{name: -1})
    cache = TurboQuantCache()
    states = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="head_dim of at least 16 and this model has 8"):
        cache.update(states, states, 0)
