"""A configuration is checked when it is made, and says what a token costs."""

from __future__ import annotations

import dataclasses

import pytest

from turboquant_core.config import KVCacheConfig, vector_bytes


def test_defaults() -> None:
    expected = KVCacheConfig(key_bits=4, value_bits=4, residual_length=128, num_sinks=4, seed=0)
    assert KVCacheConfig() == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_norms_and_means_cost_a_quarter_of_a_bit_at_head_dim_128(bits: int) -> None:
    """And a step for each mean, 0.002 bits."""
    config = KVCacheConfig(key_bits=bits, value_bits=bits)
    assert config.bits_per_value(128, 128) == bits + 0.251953125
    assert config.bytes_per_token(128, 128) == 2 * (16 * bits + 2 + (128 + 2) / 64)
    assert config.bytes_per_token(128, 128) == 2 * vector_bytes(128, bits)


def test_keys_and_values_are_counted_apart() -> None:
    config = KVCacheConfig(key_bits=4, value_bits=3)
    key_bytes = 192 * 4 / 8 + 2 + (192 + 2) / 64
    value_bytes = 128 * 3 / 8 + 2 + (128 + 2) / 64
    assert config.bytes_per_token(192, 128) == key_bytes + value_bytes
    assert config.bits_per_value(192, 128) == 8 * (key_bytes + value_bytes) / 320


@pytest.mark.parametrize("bits", [0, 1, 5, 16, 4.5, "4", None])
@pytest.mark.parametrize("name", ["key_bits", "value_bits"])
def test_other_bits_are_refused(name: str, bits: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 2, 3, 4 or 8"):
        KVCacheConfig(**{name: bits})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["residual_length", "num_sinks"])
def test_a_negative_number_of_tokens_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
        KVCacheConfig(**{name: -1})  # type: ignore[arg-type]


def test_a_configuration_cannot_change() -> None:
    config = KVCacheConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.key_bits = 3  # type: ignore[misc]
