"""TurboQuantCache against transformers' DynamicCache, on tiny random models of every kind of layer."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, BASE, STATEFUL, ExactBlocks, build
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from turboquant_core import TurboQuantCache, cache_layers, compressed_states

SCENARIOS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 12},
    "sampling": {"max_new_tokens": 12, "do_sample": True},
    "beams": {"max_new_tokens": 10, "num_beams": 3},
    "chunked prefill": {"max_new_tokens": 4, "prefill_chunk_size": 16},
    "prompt lookup": {"max_new_tokens": 16, "prompt_lookup_num_tokens": 4},
}
CASES = [
    (architecture, scenario)
    for architecture, scenario in itertools.product(ARCHITECTURES, SCENARIOS)
    if not (scenario == "prompt lookup" and architecture in STATEFUL)
]


@pytest.fixture
def exact_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks exact and 4 tokens long, so that a short prompt fills many."""
    monkeypatch.setattr(cache_layers, "BlockQuantizer", ExactBlocks)
    monkeypatch.setattr(compressed_states, "BLOCK_SIZE", 4)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def prompts(scenario: str) -> tuple[Tensor, Tensor]:
    """Return token ids and mask: three left-padded prompts, or one that repeats itself."""
    ids = torch.randint(3, 64, (3, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if scenario == "prompt lookup":
        return ids[:1].repeat(1, 2), mask[:1].repeat(1, 2)
    mask[1, :7] = 0
    mask[2, :20] = 0
    return ids.masked_fill(mask == 0, 0), mask


def generate(model: Any, ids: Tensor, mask: Tensor, cache: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the token ids and the logits of every step, ``[steps, batch, vocabulary]``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    return output.sequences, torch.stack(output.logits)


@functools.lru_cache(maxsize=len(SCENARIOS))
def reference(architecture: str, scenario: str) -> tuple[Tensor, Tensor]:
    model = build(architecture)
    return generate(model, *prompts(scenario), DynamicCache(config=model.config), **SCENARIOS[scenario])


@pytest.mark.parametrize("with_config", [True, False], ids=["config", "lazy"])
@pytest.mark.parametrize(("architecture", "scenario"), CASES)
def test_exact_blocks_give_the_tokens_and_logits_of_dynamic_cache(
    architecture: str, scenario: str, with_config: bool, exact_small_blocks: None
) -> None:
    model = build(architecture)
    cache = TurboQuantCache(residual_length=3, config=model.config if with_config else None)
    expected_ids, expected_logits = reference(architecture, scenario)
    ids, logits = generate(model, *prompts(scenario), cache, **SCENARIOS[scenario])
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    assert cache.memory_footprint().compressed_bytes > 0


@pytest.mark.parametrize("with_config", [True, False], ids=["config", "lazy"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_turns_copies_and_reset_give_the_logits_of_dynamic_cache(
    architecture: str, with_config: bool, exact_small_blocks: None
) -> None:
    model = build(architecture)
    ids, mask = prompts("greedy")
    ids, mask = ids[:1], mask[:1]

    def turns(cache: Any, second_cache: Any) -> list[Tensor]:
        """Two turns, the second also on a copy of the first's cache; then another on the used cache."""
        first, logits = generate(model, ids, mask, cache, max_new_tokens=6)
        longer = torch.cat([first, ids[:, :9]], 1)
        mask_of_longer = torch.ones_like(longer)
        branch = copy.deepcopy(cache)
        _, second = generate(model, longer, mask_of_longer, cache, max_new_tokens=6)
        _, other = generate(model, longer, mask_of_longer, branch, max_new_tokens=6, do_sample=True)
        if second_cache is cache:
            cache.reset()
        _, fresh = generate(model, ids[:, 5:], mask[:, 5:], second_cache, max_new_tokens=6)
        return [logits, second, other, fresh]

    expected = turns(DynamicCache(config=model.config), DynamicCache(config=model.config))
    cache = TurboQuantCache(residual_length=3, config=model.config if with_config else None)
    for got, want in zip(turns(cache, cache), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """A model with heads of 64, wide enough logits and 4,096 positions."""
    config = LlamaConfig(
        **{**BASE, "head_dim": 64, "initializer_range": 0.15, "max_position_embeddings": 4096}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.009), (4, 0.11), (3, 0.25), (2, 0.5)])
@pytest.mark.parametrize("num_sinks", [0, 4])
def test_logits_stay_near_those_of_dynamic_cache(
    llama: LlamaForCausalLM, bits: int, bound: float, num_sinks: int
) -> None:
    """RMS error of the logits after 300 tokens, most of them quantized, over the logits' RMS."""
    ids = torch.randint(3, 64, (2, 321), generator=torch.Generator().manual_seed(2))
    logits = []
    for cache in (DynamicCache(), TurboQuantCache(bits, residual_length=0, num_sinks=num_sinks)):
        llama(ids[:, :300], past_key_values=cache)
        logits.append(llama(ids[:, 300:], past_key_values=cache).logits)
    error = (logits[1] - logits[0]).square().mean().sqrt() / logits[0].square().mean().sqrt()
    assert error < bound


@pytest.mark.parametrize("seed", [2, 5, 6])
def test_8_bits_give_the_greedy_text_of_dynamic_cache(llama: LlamaForCausalLM, seed: int) -> None:
    """Up to the first token that leads the second best by less than 1/20 of the logits' spread."""
    ids = torch.randint(3, 64, (2, 200), generator=torch.Generator().manual_seed(seed))
    cache = TurboQuantCache(bits=8, residual_length=16, config=llama.config)
    expected, logits = generate(llama, ids, torch.ones_like(ids), DynamicCache(), max_new_tokens=24)
    got, _ = generate(llama, ids, torch.ones_like(ids), cache, max_new_tokens=24)
    best, second = logits.topk(2).values.unbind(-1)  # [steps, batch]
    is_clear = (best - second > logits.std() / 20).long().cumprod(0).bool().T
    assert torch.equal(got[:, 200:][is_clear], expected[:, 200:][is_clear])
    assert is_clear.sum() >= 24  # of 48
    assert cache.get_seq_length() == 223


def test_rows_of_the_batch_can_be_repeated_and_selected_in_every_kind_of_layer() -> None:
    model = build("falcon_h1")
    ids = torch.randint(3, 64, (2, 150), generator=torch.Generator().manual_seed(3))
    cache = TurboQuantCache(residual_length=16)
    model(ids[:, :140], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([True, False, True, True]))
    cache.batch_select_indices(torch.tensor([2, 0]))
    swapped = model(ids[[1, 0], 140:], past_key_values=cache).logits

    cache = TurboQuantCache(residual_length=16)
    model(ids[:, :140], past_key_values=cache)
    expected = model(ids[:, 140:], past_key_values=cache).logits[[1, 0]]
    torch.testing.assert_close(swapped, expected)


def test_without_a_config_a_layer_in_the_middle_of_a_forward_knows_its_own_length() -> None:
    cache = TurboQuantCache()
    states = torch.zeros(1, 1, 5, 16)
    for _ in range(2):
        assert (cache.get_seq_length(1), cache.get_mask_sizes(5, 1)) == (0, (5, 0))
        cache.update(states, states, 0)
        assert (cache.get_seq_length(0), cache.get_seq_length(1)) == (5, 0)
        cache.update(states, states, 1)
        cache.update(states, states, 0)
        assert (cache.get_seq_length(0), cache.get_seq_length(1)) == (10, 5)
        cache.reset()


def test_without_a_config_a_layer_that_has_had_no_states_yet_has_none() -> None:
    cache = TurboQuantCache()
    states = torch.zeros(1, 1, 5, 16)
    cache.update(states, states, 0)
    assert not cache.has_previous_state()
    assert not cache.has_previous_state(0)
    cache.update_conv_state(torch.ones(1, 8, 4), 0)
    assert cache.has_previous_state(0)
    assert cache.get_seq_length() == 5


def test_layers_of_states_beside_keys_and_values_keep_their_number_of_states_and_window() -> None:
    config = LlamaConfig(**BASE, sliding_window=8)
    config.layer_types = ["hybrid", "hybrid_sliding"]
    config.number_of_conv_states = 3
    cache = TurboQuantCache(config=config)
    assert [layer.number_of_states for layer in cache.layers] == [3, 3]
    assert cache.is_sliding == [False, True]
    assert cache.layers[1].attention.sliding_window == 8


def test_a_cache_that_needs_the_config_says_so() -> None:
    with pytest.raises(ValueError, match=r"config=model\.config"):
        TurboQuantCache().update_conv_state(torch.zeros(1, 8, 4), 0, state_idx=1)
