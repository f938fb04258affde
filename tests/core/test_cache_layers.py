"""Each cache layer against transformers' own, over random updates and crops."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ExactBlocks
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from turboquant_core import KVCacheConfig, cache_layers, compressed_states
from turboquant_core.cache_layers import TurboQuantHybridLayer, TurboQuantLayer, TurboQuantSlidingLayer

# Numbers of new tokens, and how many of them a crop takes back: none, some or all.
STEPS = st.lists(st.tuples(st.integers(1, 11), st.floats(0, 1)), min_size=1, max_size=12)


@pytest.fixture(autouse=True, scope="module")
def exact_small_blocks() -> Any:
    """Make blocks exact and 4 tokens long, so that any difference is one of the plumbing."""
    with (
        patch.object(cache_layers, "BlockQuantizer", ExactBlocks),
        patch.object(compressed_states, "BLOCK_SIZE", 4),
    ):
        yield


def tokens(start: int, count: int) -> tuple[Tensor, Tensor]:
    """Return keys and values, of different sizes, that carry their position."""
    positions = torch.arange(start, start + count, dtype=torch.float32).view(1, 1, -1, 1)
    return positions.expand(2, 3, -1, 24), -positions.expand(2, 3, -1, 16)


def assert_same_update(layer: TurboQuantLayer, stock: DynamicLayer, count: int) -> None:
    """Check that both layers return the same tokens for the next `count`, as many as they had announced."""
    announced, offset = layer.get_mask_sizes(count)
    assert (announced, offset) == stock.get_mask_sizes(count)
    new = tokens(stock.get_seq_length(), count)
    for got, want in zip(layer.update(*new), stock.update(*new), strict=True):
        assert got.shape[2] == announced
        assert torch.equal(got, want[:, :, -announced:])  # some versions return more than announced
    assert layer.get_seq_length() == stock.get_seq_length()


@settings(deadline=None, derandomize=True, max_examples=100)
@given(STEPS, st.integers(0, 9), st.integers(0, 12))
def test_full_attention_returns_what_the_stock_layer_returns(
    steps: list[tuple[int, float]], residual_length: int, num_sinks: int
) -> None:
    config = KVCacheConfig(residual_length=residual_length, num_sinks=num_sinks)
    layer, stock = TurboQuantLayer(config), DynamicLayer()
    was_cropped = False
    for count, fraction in steps:
        assert_same_update(layer, stock, count)
        for states in layer.states:
            assert states.sinks.shape[2] == min(num_sinks, stock.get_seq_length())
            num_exact = states.residual.shape[2]
            assert num_exact < residual_length + 4
            # Only a crop, which takes the newest tokens, can leave less than residual_length beside blocks.
            assert num_exact >= residual_length or was_cropped or states.num_blocks == 0
        num_cropped = int(fraction * min(stock.get_seq_length() - 1, 25))
        was_cropped |= num_cropped > 0
        layer.crop(-num_cropped)
        stock.crop(-num_cropped)
        assert layer.get_seq_length() == stock.get_seq_length()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(STEPS, st.integers(0, 9), st.integers(2, 20))
def test_sliding_window_returns_what_the_stock_layer_returns(
    steps: list[tuple[int, float]], residual_length: int, window: int
) -> None:
    layer = TurboQuantSlidingLayer(KVCacheConfig(residual_length=residual_length), window)
    stock = DynamicSlidingWindowLayer(window)
    for count, _ in steps:
        assert_same_update(layer, stock, count)
        for states in layer.states:
            assert states.sinks.shape[2] == 0  # the first tokens leave the window
            assert states.num_tokens <= window - 1 + 3


@settings(deadline=None, derandomize=True, max_examples=60)
@given(STEPS, st.integers(0, 9), st.integers(2, 20))
def test_sliding_window_that_records_the_past_can_take_back_what_it_returned(
    steps: list[tuple[int, float]], residual_length: int, window: int
) -> None:
    layer = TurboQuantSlidingLayer(KVCacheConfig(residual_length=residual_length), window)
    stock = DynamicSlidingWindowLayer(window)
    layer.activate_past_recording()
    stock.activate_past_recording()
    for count, fraction in steps:
        assert_same_update(layer, stock, count)
        num_cropped = int(fraction * min(count, stock.get_seq_length() - 1))
        layer.crop(-num_cropped)
        stock.crop(-num_cropped)
        assert layer.get_mask_sizes(1) == stock.get_mask_sizes(1)
        for states in layer.states:
            assert states.num_tokens <= window - 1 + 3


def test_sliding_window_refuses_a_crop_that_it_cannot_undo() -> None:
    layer = TurboQuantSlidingLayer(KVCacheConfig(residual_length=0), 8)
    layer.update(*tokens(0, 20))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-1)
    layer.activate_past_recording()
    layer.update(*tokens(20, 2))
    with pytest.raises(RuntimeError, match="not recorded"):
        layer.crop(-9)
    assert layer.get_seq_length() == 22


def test_a_window_beside_states_is_recorded_with_them_and_until_generate_says_stop() -> None:
    layer = TurboQuantHybridLayer(TurboQuantSlidingLayer(KVCacheConfig(residual_length=0), 8))
    layer.activate_past_recording()
    layer.update_conv_state(torch.zeros(2, 3, 20), conv_kernel_size=4)
    layer.update(*tokens(0, 20))
    layer.crop(-6)
    assert layer.get_seq_length() == 14
    assert torch.equal(layer.update(*tokens(14, 1))[0], tokens(7, 8)[0])
    layer.record_past = False  # as generate() does on the layers that it knows
    layer.update(*tokens(15, 9))
    assert layer.attention.states[0].num_tokens < 7 + 4


def test_a_positive_crop_keeps_that_many_tokens() -> None:
    for layer in (TurboQuantLayer(KVCacheConfig()), TurboQuantSlidingLayer(KVCacheConfig(), 30)):
        layer.update(*tokens(0, 20))
        layer.crop(25)
        assert layer.get_seq_length() == 20
        layer.crop(7)
        keys, values = layer.update(*tokens(7, 1))
        assert torch.equal(keys, tokens(0, 8)[0])
        assert torch.equal(values, tokens(0, 8)[1])
        layer.crop(-100)
        assert layer.get_seq_length() == 0
        assert torch.equal(layer.update(*tokens(0, 2))[0], tokens(0, 2)[0])


@pytest.mark.parametrize("window", [None, 30])
def test_copies_moves_and_new_orders_of_the_batch_keep_every_token(window: int | None) -> None:
    """The first, the quantized and the newest."""
    config = KVCacheConfig(residual_length=3)
    layer = TurboQuantLayer(config) if window is None else TurboQuantSlidingLayer(config, window)
    rows = torch.arange(3.0).view(3, 1, 1, 1)
    keys, values = (x[:1] + 100 * rows for x in tokens(0, 40))
    layer.update(keys[:, :, :39], values[:, :, :39])
    expected = [x[[2, 2, 0]] for x in copy.deepcopy(layer).update(keys[:, :, 39:], values[:, :, 39:])]

    layer.offload()
    layer.prefetch()
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    got = layer.update(keys[[2, 2, 0], :, 39:], values[[2, 2, 0], :, 39:])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_layer_that_was_reset_takes_another_batch_and_an_unused_one_takes_any_call() -> None:
    for layer in (TurboQuantLayer(KVCacheConfig()), TurboQuantSlidingLayer(KVCacheConfig(), 5)):
        for _ in range(2):
            layer.crop(-1)
            layer.reorder_cache(torch.tensor([0]))
            layer.offload()
            layer.prefetch()
            assert layer.get_seq_length() == 0
            assert layer.get_mask_sizes(4) == (4, 0)
            layer.update(*tokens(0, 40))
            layer.reset()
        keys, _ = layer.update(*(x[:1] for x in tokens(0, 4)))
        assert keys.shape == (1, 3, 4, 24)
