"""States of recurrent layers wait in their slots for requests that are cut, batched or forked."""

from __future__ import annotations

import architectures
import pytest
import torch
from no_attention import NoAttention
from torch import Tensor
from transformers import PreTrainedModel

from turboquant_core.attention import PassThroughCache, forward_context, use_paged_attention
from turboquant_core.cache import cache_argument
from turboquant_core.state_pool import StatePool

# States of two kinds, several a layer, beside attention in one layer, and of one kind only.
NAMES = ["qwen3_next", "falcon_h1", "lfm2", "mamba2", "kimi_linear"]


def build(name: str) -> PreTrainedModel:
    model = architectures.build(name)
    assert use_paged_attention(model)
    return model


@torch.inference_mode()
def run(
    model: PreTrainedModel, token_ids: Tensor, pool: StatePool | None, slots: list[int], start: int
) -> Tensor:
    """Return logits of tokens ``[num_rows, num_tokens]`` that start at a position of their requests."""
    cache = PassThroughCache(model.config)
    if pool is not None and start > 0:
        pool.load(cache, torch.tensor(slots))
    with forward_context(NoAttention()):
        logits: Tensor = model(input_ids=token_ids, use_cache=True, **{cache_argument(model): cache}).logits
    if pool is not None:
        pool.store(cache, torch.tensor(slots))
    return logits


def random_tokens(num_rows: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, architectures.VOCAB_SIZE, (num_rows, num_tokens), generator=generator)


def assert_close(logits: Tensor, expected: Tensor) -> None:
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_requests_go_on_from_their_slots(name: str) -> None:
    """Each in two chunks, the first shorter than a convolution, and then token by token side by side."""
    model = build(name)
    token_ids = random_tokens(3, 30)
    expected = run(model, token_ids, None, [], 0)
    pool = StatePool(4)
    slots = [2, 0, 3]
    for start, end in ((0, 2), (2, 24)):
        for row, slot in enumerate(slots):
            logits = run(model, token_ids[row : row + 1, start:end], pool, [slot], start)
            assert_close(logits[0], expected[row, start:end])
    for position in range(24, 30):
        order = [1, 2, 0] if position % 2 else [0, 1, 2]
        new = token_ids[order, position : position + 1]
        logits = run(model, new, pool, [slots[row] for row in order], position)
        assert_close(logits[:, 0], expected[order, position])


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_slot_goes_on_by_itself(name: str) -> None:
    model = build(name)
    token_ids = random_tokens(2, 12)
    token_ids[1, :8] = token_ids[0, :8]
    expected = run(model, token_ids, None, [], 0)
    pool = StatePool(3)
    run(model, token_ids[:1, :8], pool, [2], 0)
    pool.copy_slot(2, 1)
    for row, slot in ((0, 2), (1, 1)):
        logits = run(model, token_ids[row : row + 1, 8:], pool, [slot], 8)
        assert_close(logits[0], expected[row, 8:])


@pytest.mark.parametrize("name", NAMES)
def test_a_new_request_starts_from_nothing_in_a_used_slot(name: str) -> None:
    model = build(name)
    token_ids = random_tokens(2, 8)
    pool = StatePool(1)
    run(model, token_ids[:1], pool, [0], 0)
    logits = run(model, token_ids[1:, :5], pool, [0], 0)
    logits = torch.cat([logits, run(model, token_ids[1:, 5:], pool, [0], 5)], 1)
    assert_close(logits, run(model, token_ids[1:], None, [], 0))


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_nobody_leaves_all_slots_alone(name: str) -> None:
    model = build(name)
    token_ids = random_tokens(3, 9)
    pool = StatePool(3)
    for slot in range(2):
        run(model, token_ids[slot : slot + 1, :8], pool, [slot], 0)
    kept = [state.clone() for state in pool.of_slot(1)]
    expected = run(model, token_ids[:1], None, [], 0)[:, 8]
    logits = run(model, token_ids[:, 8:], pool, [0, -1, -1], 8)
    assert_close(logits[:1, 0], expected)
    assert all(map(torch.equal, pool.of_slot(1), kept))
    assert not any(state.any() for state in pool.of_slot(2))


def test_bytes_are_those_of_a_slot() -> None:
    model = architectures.build("lfm2")
    assert use_paged_attention(model)
    pool = StatePool(5)
    assert pool.slot_bytes == 0
    run(model, random_tokens(1, 3), pool, [0], 0)
    config = model.config
    num_layers = config.layer_types.count("conv")
    assert pool.slot_bytes == num_layers * config.hidden_size * config.conv_L_cache * 4
