"""CompressedStates with the real quantizer: what is exact, what is quantized once, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant_core import BlockQuantizer
from turboquant_core.compressed_states import CompressedStates


def random_states(
    num_tokens: int, *, batch: int = 2, head_dim: int = 48, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    # Strides as a model gives them: the heads lie side by side in each token.
    return torch.randn(batch, num_tokens, 3, head_dim, generator=generator).to(dtype).transpose(1, 2)


def empty(
    states: Tensor, *, bits: int = 4, residual_length: int = 16, num_sinks: int = 0
) -> CompressedStates:
    quantizer = BlockQuantizer(states.shape[-1], bits, scale="norm_corrected")
    return CompressedStates(states, quantizer, residual_length=residual_length, num_sinks=num_sinks)


def assert_same_codes(got: Tensor, want: Tensor) -> None:
    """Allow a mean to round the other way, and a code with it; quantizing twice would differ by 10%."""
    assert (got - want).norm() <= 0.01 * want.norm()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=6),
    st.sampled_from([0, 16, 65]),
    st.sampled_from([0, 4, 70]),
)
def test_the_first_and_the_newest_tokens_are_exact_and_each_block_between_is_quantized_once(
    counts: list[int], residual_length: int, num_sinks: int
) -> None:
    states = random_states(sum(counts), batch=1)
    held = empty(states, residual_length=residual_length, num_sinks=num_sinks)
    quantizer = BlockQuantizer(48, 4, scale="norm_corrected")
    num_seen = 0
    for count in counts:
        num_quantized = 64 * max(0, (num_seen - num_sinks - residual_length) // 64)
        full = held.append(states[:, :, num_seen : num_seen + count])
        num_seen += count
        assert held.num_tokens == full.shape[2] == num_seen
        start = min(num_sinks, num_seen)
        end = start + num_quantized
        assert torch.equal(full[:, :, :start], states[:, :, :start])
        assert torch.equal(held.sinks, states[:, :, :start])
        blocks = states[:, :, start:end].unflatten(2, (-1, 64))
        assert_same_codes(
            full[:, :, start:end], quantizer.dequantize(quantizer.quantize(blocks)).flatten(2, 3)
        )
        assert torch.equal(full[:, :, end:], states[:, :, end:num_seen])


def test_a_long_prompt_in_pieces_equals_the_same_in_one() -> None:
    """2,048 tokens of 3 heads of 256 are several pieces of the quantizer's work."""
    states = random_states(2048, head_dim=256)
    held = empty(states, residual_length=0)
    held.append(states)
    quantizer = BlockQuantizer(256, 4, scale="norm_corrected")
    blocks = quantizer.quantize(states.unflatten(2, (32, 64)))
    full = held.append(states[:, :, :1])
    assert_same_codes(full[:, :, :-1], quantizer.dequantize(blocks).flatten(2, 3))


def test_a_crop_inside_a_block_returns_its_tokens_to_the_residual_as_they_were_stored() -> None:
    states = random_states(200)
    held = empty(states)
    held.append(states)
    stored = held.append(states[:, :, :1])[:, :, :200]
    assert held.num_blocks == 2
    held.crop(201 - 100)
    assert (held.num_blocks, held.residual.shape[2]) == (1, 36)
    full = held.append(states[:, :, :3])
    torch.testing.assert_close(full[:, :, :100], stored[:, :, :100])
    held.crop(103)
    assert held.num_tokens == 0


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.sampled_from([0, 4, 70]), st.sampled_from([0, 16]), st.integers(0, 201), st.integers(1, 150))
def test_a_crop_anywhere_keeps_the_older_tokens_as_they_were_stored(
    num_sinks: int, residual_length: int, num_left: int, num_more: int
) -> None:
    states = random_states(400, batch=1)
    held = empty(states, residual_length=residual_length, num_sinks=num_sinks)
    held.append(states[:, :, :200])
    stored = held.append(states[:, :, 200:201])
    held.crop(201 - num_left)
    assert held.num_tokens == num_left
    assert held.sinks.shape[2] == min(num_sinks, num_left)
    for tensor in (held.sinks, held.residual, *held.blocks):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    new = states[:, :, 201 : 201 + num_more]
    full = held.append(new)
    torch.testing.assert_close(full[:, :, :num_left], stored[:, :, :num_left])
    assert torch.equal(full[:, :, num_left:], new)
    # Tokens that take the place of first ones are exact as well.
    again = held.append(states[:, :, :1])
    num_first = min(num_sinks, num_left + num_more)
    assert torch.equal(again[:, :, :num_first], full[:, :, :num_first])
    assert held.sinks.shape[2] == min(num_sinks, num_left + num_more + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_states_come_back_in_the_models_dtype(dtype: torch.dtype) -> None:
    states = random_states(150, dtype=dtype)
    held = empty(states, bits=8, num_sinks=4)
    assert held.append(states).dtype == dtype
    full = held.append(states[:, :, :1])
    assert full.dtype == held.sinks.dtype == held.residual.dtype == dtype
    torch.testing.assert_close(full[:, :, :150], states, atol=0.05, rtol=0)


def test_a_window_forgets_before_it_quantizes() -> None:
    states = random_states(1000)
    held = empty(states, residual_length=16)
    assert held.append(states, window=170).shape[2] == 1000
    assert (held.num_blocks, held.residual.shape[2]) == (2, 42)
    held.trim(100)
    assert (held.num_blocks, held.residual.shape[2]) == (1, 42)
    assert held.blocks.codes.untyped_storage().nbytes() == held.blocks.codes.nbytes
    held.trim(5)
    assert (held.num_blocks, held.residual.shape[2]) == (0, 5)


def test_what_is_held_carries_no_gradient_and_what_is_returned_does() -> None:
    states = random_states(100).requires_grad_()
    held = empty(states, residual_length=0, num_sinks=4)
    held.append(states)
    assert held.append(states[:, :, :2]).requires_grad
    assert held.sinks.shape[2] == 4
    assert not held.sinks.requires_grad
    assert not held.residual.requires_grad
    assert not any(x.requires_grad for x in held.blocks)


@pytest.mark.parametrize("other", [(1, 3, 48), (2, 1, 48), (2, 3, 32)])
def test_tokens_of_another_shape_are_refused_not_broadcast(other: tuple[int, int, int]) -> None:
    states = random_states(100)
    held = empty(states)
    held.append(states)
    batch, num_heads, head_dim = other
    with pytest.raises(ValueError, match="use a new cache"):
        held.append(torch.zeros(batch, num_heads, 1, head_dim))
    assert held.num_tokens == 100
