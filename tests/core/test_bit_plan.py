"""A bit plan keeps its budget, spends it where the model loses most, and pays off on text it has not seen.

More than 300 lines, half of them the independent measurements and searches that plans are held against.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, build
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
)

from turboquant_core import TurboQuantCache, cache_argument, measure_transforms, plan_bits
from turboquant_core.bit_plan import Part, _choose, _Option

SERVER = Path(__file__).resolve().parents[2] / "turboquant_server"
DEMO = SERVER / "demo"
BITS = (2, 3, 4, 8)
Table = dict[Part, dict[int, _Option]]


def vector_bytes(dim: int, bits: int) -> float:
    """Codes, a float16 norm, and a 64th of an int8 mean with its float16 step."""
    return dim * bits / 8 + 2 + (dim + 2) / 64


def token_ids(num_windows: int, num_tokens: int, vocab_size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(vocab_size, (num_windows, num_tokens), generator=generator)


def cost(table: Mapping[Part, Mapping[int, _Option]], chosen: Mapping[Part, int]) -> float:
    return sum(table[part][bits].num_bytes for part, bits in chosen.items())


def loss(table: Mapping[Part, Mapping[int, _Option]], chosen: Mapping[Part, int]) -> float:
    return sum(table[part][bits].divergence for part, bits in chosen.items())


def least_loss(table: Mapping[Part, Mapping[int, _Option]], num_bytes: float) -> float:
    """Try everything: the least divergence that so many bytes can buy, infinity if none."""
    choices = (dict(zip(table, bits, strict=True)) for bits in itertools.product(BITS, repeat=len(table)))
    losses = (loss(table, chosen) for chosen in choices if cost(table, chosen) <= num_bytes)
    return min(losses, default=float("inf"))


def convex_table(rng: random.Random, num_layers: int) -> Table:
    """Return a table as models have them: each bit divides the divergence by 2.5 to 6."""
    table: Table = {}
    for part in (Part(i, name) for i in range(num_layers) for name in ("keys", "values")):
        losses = {2: rng.lognormvariate(-3, 1.5)}
        for bits in (3, 4):
            losses[bits] = losses[bits - 1] / rng.uniform(2.5, 6)
        losses[8] = 0.0052 * losses[4]
        table[part] = {bits: _Option(losses[bits], 4 * bits + 12) for bits in BITS}
    return table


def least_loss_of_many(table: Table, num_bytes: float) -> float:
    """The same as `least_loss` for tables of `convex_table`, whose prices are multiples of 4 bytes."""
    best = torch.zeros(int(num_bytes // 4) + 1, dtype=torch.float64)
    for options in table.values():
        shifted = []
        for option in options.values():
            loss = torch.full_like(best, torch.inf)
            units = int(option.num_bytes) // 4
            loss[units:] = best[: len(best) - units] + option.divergence
            shifted.append(loss)
        best = torch.stack(shifted).amin(0)
    return best[-1].item()


number = st.floats(0, 1, allow_subnormal=False)
any_table = st.lists(
    st.tuples(st.tuples(*[number] * 4), st.floats(0.01, 1)).map(
        lambda row: {
            bits: _Option(loss, row[1] * (4 * bits + 12)) for bits, loss in zip(BITS, row[0], strict=True)
        }
    ),
    min_size=1,
    max_size=8,
).map(lambda rows: {Part(i // 2, ("keys", "values")[i % 2]): row for i, row in enumerate(rows)})


@given(any_table, st.floats(0, 2))
def test_no_choice_costs_more_than_there_is_and_none_leaves_what_would_pay_a_gain(
    table: Table, share: float
) -> None:
    least, most = (cost(table, dict.fromkeys(table, bits)) for bits in (2, 8))
    num_bytes = least + share * (most - least)
    chosen = _choose(table, num_bytes)
    left = num_bytes - cost(table, chosen)
    assert left >= -1e-9
    for part, bits in chosen.items():
        now = table[part][bits]
        for more, option in table[part].items():
            is_gain = more > bits and option.divergence < now.divergence
            assert not is_gain or option.num_bytes - now.num_bytes > left - 1e-9


@given(st.randoms(use_true_random=False), st.floats(0, 1.1))
def test_no_combination_is_better_that_costs_a_largest_step_less(rng: random.Random, share: float) -> None:
    # Buying by the rate is exact until something does not fit; from 4 to 8 bits it is 16 bytes that do not.
    table = convex_table(rng, 2)
    least, most = (cost(table, dict.fromkeys(table, bits)) for bits in (2, 8))
    num_bytes = least + share * (most - least)
    assert loss(table, _choose(table, num_bytes)) <= least_loss(table, num_bytes - 16) * (1 + 1e-9)


def test_with_a_dozen_layers_the_choice_is_close_to_the_best_of_all() -> None:
    rng = random.Random(0)
    ratios = []
    for _ in range(50):
        table = convex_table(rng, 12)
        num_bytes = rng.uniform(20, 44) * len(table)
        ratios.append(loss(table, _choose(table, num_bytes)) / least_loss_of_many(table, num_bytes))
    assert min(ratios) > 1 - 1e-9
    assert sorted(ratios)[44] < 1.05 and max(ratios) < 1.15


def test_more_bits_are_not_bought_where_they_do_harm() -> None:
    table = {Part(0, "keys"): {2: _Option(1, 20), 3: _Option(2, 28), 4: _Option(0.5, 36), 8: _Option(3, 68)}}
    assert _choose(table, 35) == {Part(0, "keys"): 2}
    assert _choose(table, 1000) == {Part(0, "keys"): 4}


@torch.inference_mode()
def independent_table(model: PreTrainedModel, input_ids: Tensor, transforms: Any = None) -> Table:
    """Return divergences by a float64 model, from states that a TurboQuantCache gave back."""
    past, newest = input_ids[:, :-64], input_ids[:, -64:]
    exact = copy.deepcopy(model).double()
    states = DynamicCache(config=model.config)
    model(input_ids=past, use_cache=True, **{cache_argument(model): states})

    def log_probs(**replaced: Tensor) -> Tensor:
        cache = DynamicCache(config=model.config)
        for layer_idx, layer in enumerate(states.layers):
            keys, values = (
                replaced.get(f"{name}{layer_idx}", getattr(layer, name)) for name in ("keys", "values")
            )
            cache.update(keys.double(), values.double(), layer_idx)
        logits = exact(input_ids=newest, use_cache=True, **{cache_argument(exact): cache}).logits
        return logits.log_softmax(-1)

    expected = log_probs()
    table: Table = {}
    for layer_idx, layer in enumerate(states.layers):
        num_heads, dim = layer.keys.shape[1], layer.keys.shape[3]
        for i, name in enumerate(("keys", "values")):
            table[Part(layer_idx, name)] = {}
            for bits in BITS:
                cache = TurboQuantCache(bits, transforms=transforms, config=model.config)
                cache.update(layer.keys, layer.values, layer_idx)
                back = cache.update(layer.keys[:, :, :1], layer.values[:, :, :1], layer_idx)[i][:, :, :-1]
                difference = expected - log_probs(**{f"{name}{layer_idx}": back})
                divergence = (expected.exp() * difference).sum(-1).mean().item()
                price = num_heads * vector_bytes(dim, bits)
                table[Part(layer_idx, name)][bits] = _Option(divergence, price)
    return table


@pytest.mark.parametrize("has_transforms", [False, True])
def test_a_plan_is_what_an_independent_measurement_makes_best(
    tiny_model: PreTrainedModel, has_transforms: bool
) -> None:
    input_ids = token_ids(2, 384, 300)
    transforms = measure_transforms(tiny_model, input_ids) if has_transforms else None
    table = independent_table(tiny_model, input_ids, transforms)
    num_values = 2 * 2 * 2 * 64  # layers, kv heads, keys and values
    plans = {}
    for budget in (2.47, 2.87, 3.37, 3.87, 4.37, 4.87, 5.87, 7.87):
        plan = plan_bits(tiny_model, input_ids, budget, context=2048, transforms=transforms)
        plans[budget] = plan
        chosen = {part: plan.layer_bits[part.layer_idx][part.name == "values"] for part in table}
        assert plan.bits_per_value == pytest.approx(8 * cost(table, chosen) / num_values)
        assert plan.bits_per_value <= budget
        # The plan measures 2 bits; the others follow from the quantizer's squared error.
        errors = {2: 0.1175, 3: 0.032, 4: 0.0081, 8: 0.000042}
        expected = sum(table[part][2].divergence * errors[bits] / errors[2] for part, bits in chosen.items())
        assert plan.divergence == pytest.approx(expected, rel=0.02)
        assert loss(table, chosen) <= 1.1 * least_loss(table, budget * num_values / 8)
    assert len({str(plan.layer_bits) for plan in plans.values()}) == len(plans)


def test_divergences_go_with_the_squared_error(tiny_model: PreTrainedModel) -> None:
    for options in independent_table(tiny_model, token_ids(2, 384, 300)).values():
        three = options[3].divergence
        assert 2.5 < options[2].divergence / three < 5
        assert 0.17 < options[4].divergence / three < 0.4
        assert 0.0006 < options[8].divergence / three < 0.004


def compressed_layers(model: PreTrainedModel, layers: Iterable[int]) -> set[int]:
    """Return the layers of which something leaves the newest 128 tokens; windows of 8 tokens never fill."""
    held = DynamicCache(config=model.config).layers
    return {layer_idx for layer_idx in layers if getattr(held[layer_idx], "sliding_window", None) != 8}


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"mistral"}))
def test_every_architecture_has_a_plan_the_same_each_time(architecture: str) -> None:
    model = build(architecture)
    input_ids = token_ids(1, 260)
    transforms = measure_transforms(model, input_ids)
    plans = [plan_bits(model, input_ids, 4.5, context=260, transforms=transforms) for _ in range(2)]
    assert plans[0] == plans[1]
    assert set(plans[0].layer_bits) == compressed_layers(model, transforms)
    assert 0 < plans[0].bits_per_value <= 4.5


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3", "gemma3n_text", "qwen3_next"])
def test_a_budget_of_bfloat16_buys_eight_bits_everywhere(architecture: str) -> None:
    plan = plan_bits(build(architecture), token_ids(1, 260), 16, context=260)
    assert set(plan.layer_bits.values()) == {(8, 8)}


def test_a_model_whose_windows_are_all_short_has_nothing_to_plan() -> None:
    with pytest.raises(ValueError, match="the model has no keys and values that can be compressed"):
        plan_bits(build("mistral"), token_ids(1, 260), 4.5, context=260)


def sliding_model() -> PreTrainedModel:
    """Return a model of one layer with a window of 256 tokens and one without, alike otherwise."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            **sizes,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            query_pre_attn_scalar=16,
            initializer_range=0.15,
            sliding_window=256,
            layer_types=["sliding_attention", "full_attention"],
        )
        return Gemma3ForCausalLM(config).eval()


def test_a_sliding_window_weighs_what_it_holds_of_a_context() -> None:
    model, input_ids = sliding_model(), token_ids(1, 512)
    sliding_bits, full_bits = [], []
    for context in (256, 1024, 8192, 10**6):
        plan = plan_bits(model, input_ids, 5.0, context=context)
        share = 256 / context
        bits = [8 * sum(vector_bytes(16, bits) for bits in plan.layer_bits[i]) / 32 for i in (0, 1)]
        assert plan.bits_per_value == pytest.approx((share * bits[0] + bits[1]) / (share + 1))
        assert plan.bits_per_value <= 5.0
        sliding_bits.append(bits[0])
        full_bits.append(bits[1])
    assert sliding_bits == sorted(sliding_bits) and sliding_bits[-1] > sliding_bits[0]
    assert sliding_bits[-1] > full_bits[-1]


def test_a_budget_below_two_bits_everywhere_is_refused(tiny_model: PreTrainedModel) -> None:
    least = 8 * vector_bytes(64, 2) / 64
    plan = plan_bits(tiny_model, token_ids(1, 260, 300), least, context=2048)
    assert plan.layer_bits == {0: (2, 2), 1: (2, 2)} and plan.bits_per_value == least
    with pytest.raises(ValueError, match=r"2 bits everywhere take 2\.379 per value, .* the budget is 2\.3$"):
        plan_bits(tiny_model, token_ids(1, 260, 300), 2.3, context=2048)


def test_a_budget_of_exactly_two_bits_everywhere_is_met_at_every_context() -> None:
    model, least = sliding_model(), 8 * vector_bytes(16, 2) / 16
    for context in range(257, 1500, 29):
        plan = plan_bits(model, token_ids(1, 260), least, context=context)
        assert set(plan.layer_bits.values()) == {(2, 2)}


def test_windows_without_room_for_a_block_are_refused(tiny_model: PreTrainedModel) -> None:
    # 4 sinks, a block of 64, 128 newest tokens and 64 to be predicted.
    with pytest.raises(ValueError, match="windows must have at least 260 tokens, got 259"):
        plan_bits(tiny_model, token_ids(1, 259, 300), 4.0, context=2048)


def test_a_model_without_keys_and_values_is_refused() -> None:
    sizes = {"hidden_size": 64, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2}
    model = Mamba2ForCausalLM(Mamba2Config(vocab_size=64, num_hidden_layers=1, **sizes)).eval()
    with pytest.raises(ValueError, match="the model has no keys and values that can be compressed"):
        plan_bits(model, token_ids(1, 260), 4.0, context=2048)


@torch.inference_mode()
def predictions(model: PreTrainedModel, windows: Tensor, cache: Cache) -> Tensor:
    """Return log-probabilities in the second half of each window, every one with a past from the cache."""
    first, rest = windows.tensor_split([4], dim=1)
    name = cache_argument(model)
    logits = [
        model(input_ids=piece, use_cache=True, **{name: cache}).logits
        for piece in (first, *rest.split(64, dim=1))
    ]
    return torch.cat(logits, dim=1)[:, windows.shape[1] // 2 :].log_softmax(-1)


def test_a_plan_of_the_sample_text_pays_off_on_text_that_nobody_has_seen() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    sample, held_out = (
        tokenizer(path.read_text("utf-8")[:10_000], add_special_tokens=False)["input_ids"]
        for path in (SERVER / "sample_text.txt", DEMO / "held_out.txt")
    )
    window = torch.tensor([sample[:512]])
    transforms = measure_transforms(model, window)
    uniform_bits = 8 * vector_bytes(128, 3) / 128
    plan = plan_bits(model, window, 3.252, context=8192, transforms=transforms)
    assert uniform_bits <= 3.252 and plan.bits_per_value <= 3.252

    windows = torch.tensor(held_out[: 2 * 768]).view(2, 768)
    expected = predictions(model, windows, DynamicCache(config=model.config))
    divergences = []
    for layer_bits in (None, plan.layer_bits):
        cache = TurboQuantCache(3, layer_bits=layer_bits, transforms=transforms, config=model.config)
        found = predictions(model, windows, cache)
        divergences.append((expected.exp() * (expected - found)).sum(-1).mean().item())
        footprint = cache.memory_footprint()
        assert footprint.bits_per_compressed_value == pytest.approx(
            plan.bits_per_value if layer_bits else uniform_bits
        )
    # 0.31 of it when this was written; the other layers' errors add to those that were measured one by one.
    assert divergences[1] < 0.8 * divergences[0]
