"""The stress models predict what the demo model predicts, and are as hard to compress as they claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stress_models import STRESS_MODELS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

DEMO = Path(__file__).resolve().parents[2] / "turboquant_server" / "demo"
NUM_TOKENS = 384
SINK_FIRST_TOKEN = 0


@pytest.fixture(scope="module")
def demo() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(DEMO).backend_tokenizer
    return torch.tensor([tokenizer.encode((DEMO / "held_out.txt").read_text("utf-8")).ids[:NUM_TOKENS]])


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, **options: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Return the output and each layer's keys and values, ``[num_kv_heads, num_tokens, head_dim]``."""
    cache = DynamicCache(config=model.config)
    # The cache goes by position: transformers gave the argument another name in 5.24.
    output = model(ids, None, None, cache, **options)
    return output, [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers]


def with_first(token: int, ids: Tensor) -> Tensor:
    return torch.cat([torch.full((1, 1), token), ids], dim=1)


def spread(states: Tensor) -> Tensor:
    """Return each head's root mean square distance of tokens from their mean."""
    return (states - states.mean(1, keepdim=True)).square().sum(-1).mean(-1).sqrt()


def mean_norm(states: Tensor) -> Tensor:
    return states.mean(1).norm(dim=-1)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("key bias 200", 1e-4),
        ("key bias 600", 5e-4),
        ("outlier channels", 1e-9),
        ("sinks", 5e-4),
        ("common mean", 5e-3),
    ],
)
def test_predictions_are_those_of_the_demo_model(
    demo: PreTrainedModel, ids: Tensor, name: str, limit: float
) -> None:
    model = STRESS_MODELS[name](demo)
    theirs = ours = ids
    if name == "sinks":
        theirs, ours = with_first(SINK_FIRST_TOKEN, ids), with_first(model.config.vocab_size - 1, ids)
    expected = run(demo, theirs)[0].logits.double().log_softmax(-1)
    logits = run(model, ours)[0].logits[..., : demo.config.vocab_size]  # without the token that sinks add
    divergence = (expected.exp() * (expected - logits.double().log_softmax(-1))).sum(-1)
    assert -1e-12 < divergence.mean() < limit


@pytest.mark.parametrize("norm", [200, 600])
def test_key_bias_is_in_the_first_and_last_layer_and_far_larger_than_what_tells_tokens_apart(
    demo: PreTrainedModel, ids: Tensor, norm: int
) -> None:
    _, keys, values = run(STRESS_MODELS[f"key bias {norm}"](demo), ids)
    _, old_keys, old_values = run(demo, ids)
    for layer in (0, -1):
        torch.testing.assert_close(
            keys[layer].norm(dim=-1), torch.tensor(float(norm)).expand(2, NUM_TOKENS), rtol=0.2, atol=0
        )
        assert (mean_norm(keys[layer]) > 0.9 * norm).all()
        torch.testing.assert_close(spread(keys[layer]), spread(old_keys[layer]), rtol=0.01, atol=0)
    torch.testing.assert_close(keys[1:-1], old_keys[1:-1], rtol=0, atol=0.5)
    torch.testing.assert_close(values, old_values, rtol=0, atol=0.5)


def test_outlier_channels_are_four_of_each_head_and_eight_times_as_large(
    demo: PreTrainedModel, ids: Tensor
) -> None:
    _, keys, values = run(STRESS_MODELS["outlier channels"](demo), ids)
    _, old_keys, old_values = run(demo, ids)
    for states, old in zip(keys + values, old_keys + old_values, strict=True):
        factors = states.std(1) / old.std(1)
        assert (factors > 7.99).sum(-1).tolist() == [4, 4]
        assert ((factors > 0.99) & (factors < 1.01)).sum(-1).tolist() == [124, 124]
        energy = states.var(1)
        assert (energy.topk(4, dim=-1).values.sum(-1) > 0.5 * energy.sum(-1)).all()


def test_sink_heads_attend_to_the_first_token_alone_and_get_nothing_from_it(
    demo: PreTrainedModel, ids: Tensor
) -> None:
    model = STRESS_MODELS["sinks"](demo)
    model.set_attn_implementation("eager")
    output, _, values = run(model, with_first(model.config.vocab_size - 1, ids), output_attentions=True)
    num_added = model.config.num_attention_heads - demo.config.num_attention_heads
    assert num_added == demo.config.num_attention_heads // demo.config.num_key_value_heads
    for attention, layer_values in zip(output.attentions, values, strict=True):
        assert attention[0, -num_added:, :, 0].min() > 0.999
        norms = layer_values[-1].norm(dim=-1)
        assert norms[0] < 1e-4 * norms[1:].mean()
        torch.testing.assert_close(layer_values[-1, 1:], layer_values[-2, 1:])


def test_common_mean_is_several_times_what_tells_tokens_apart(demo: PreTrainedModel, ids: Tensor) -> None:
    _, keys, values = run(STRESS_MODELS["common mean"](demo), ids)
    _, old_keys, old_values = run(demo, ids)
    for states, old in zip(keys + values, old_keys + old_values, strict=True):
        torch.testing.assert_close(mean_norm(states), torch.tensor([104.0, 104.0]), rtol=0.2, atol=0)
        torch.testing.assert_close(spread(states), spread(old), rtol=0.01, atol=0)
        assert (mean_norm(states) > 3.5 * spread(states)).all()
