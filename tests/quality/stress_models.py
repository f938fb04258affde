"""The demo model made as hard to compress as large models are, without changing what it computes.

Large models have keys with an offset hundreds of times larger than what tells tokens apart (Qwen2.5: norms
of 600 to 900 against 22), channels with far more energy than others, and a first token that draws the
attention of heads which have nothing to say. Each function here returns a new model that has one of these
properties. Its predictions are those of the model it was made from; offsets of keys are turned a little by
the rotary embeddings and change them a little.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2ForCausalLM

BIAS_PAIRS = 4
OUTLIER_PAIRS = 2
SINK_SCORE = 24.0
SINK_DIMS = 8


def _directions(generator: torch.Generator, *shape: int) -> Tensor:
    """Return random unit vectors."""
    return nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def _slow_channels(head_dim: int, num_pairs: int) -> Tensor:
    """Return the channels of the rotary pairs that turn most slowly."""
    pairs = torch.arange(head_dim // 2 - num_pairs, head_dim // 2)
    return torch.cat([pairs, pairs + head_dim // 2])


def _add_key_bias(layer: Any, norm: float, num_pairs: int, generator: torch.Generator) -> None:
    head_dim = layer.self_attn.head_dim
    bias = layer.self_attn.k_proj.bias.view(-1, head_dim)
    directions = _directions(generator, bias.shape[0], 2 * num_pairs)
    bias[:, _slow_channels(head_dim, num_pairs)] += norm * directions.to(bias)


@torch.no_grad()
def with_key_bias(model: PreTrainedModel, norm: float) -> PreTrainedModel:
    """Give the keys of the first and last layer a bias of this norm in 8 slow channels, as in Qwen2.5."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for layer in (model.model.layers[0], model.model.layers[-1]):
        _add_key_bias(layer, norm, BIAS_PAIRS, generator)
    return model


@torch.no_grad()
def with_common_mean(model: PreTrainedModel, spreads: float = 8.0) -> PreTrainedModel:
    """Move all keys and values of every layer by so many times a norm of 13, the spread of most heads.

    The values' offset reaches every output with weight 1 and is taken off again behind the output projection.
    """
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    norm = 13 * spreads
    for layer in model.model.layers:
        _add_key_bias(layer, norm, 4 * BIAS_PAIRS, generator)
        attention = layer.self_attn
        bias = attention.v_proj.bias.view(-1, attention.head_dim)
        offset = norm * _directions(generator, *bias.shape).to(bias)
        bias += offset
        moved = offset.repeat_interleave(attention.num_key_value_groups, dim=0).flatten()
        attention.o_proj.bias = nn.Parameter(-attention.o_proj.weight @ moved)
    return model


@torch.no_grad()
def with_outlier_channels(model: PreTrainedModel, factor: float = 8.0) -> PreTrainedModel:
    """Multiply four channels of each head's keys and values; queries and output projection divide again."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        attention = layer.self_attn
        head_dim, groups = attention.head_dim, attention.num_key_value_groups
        num_kv_heads = attention.k_proj.out_features // head_dim
        factors = torch.ones(2, num_kv_heads, head_dim)  # keys, values
        for head in range(num_kv_heads):
            pairs = torch.randperm(head_dim // 2, generator=generator)[:OUTLIER_PAIRS]
            factors[0, head, pairs] = factors[0, head, pairs + head_dim // 2] = factor
            factors[1, head, torch.randperm(head_dim, generator=generator)[: 2 * OUTLIER_PAIRS]] = factor
        keys, values = factors.to(attention.k_proj.weight).unbind()
        for projection, scale in (
            (attention.q_proj, 1 / keys.repeat_interleave(groups, dim=0)),
            (attention.k_proj, keys),
            (attention.v_proj, values),
        ):
            projection.weight *= scale.reshape(-1, 1)
            projection.bias *= scale.flatten()
        attention.o_proj.weight /= values.repeat_interleave(groups, dim=0).flatten()
    return model


@torch.no_grad()
def with_sinks(model: PreTrainedModel, first_token: int) -> PreTrainedModel:
    """Add a kv head to each layer whose queries attend to the first token and to nothing else.

    The vocabulary gets one token more, to be put in front of every text. It does what `first_token` does, and
    is told from it by hidden dimensions of its own. In the added heads it has the key that all queries look
    for and a value of zero, where all others have values like those of the head before: so the added heads
    say nothing, exactly, as long as that zero is kept.
    """
    old_config = model.config
    config = copy.deepcopy(old_config)
    hidden, head_dim = old_config.hidden_size, old_config.head_dim
    groups = old_config.num_attention_heads // old_config.num_key_value_heads
    config.hidden_size = hidden + SINK_DIMS
    config.num_key_value_heads += 1
    config.num_attention_heads += groups
    config.vocab_size += 1
    with torch.random.fork_rng():
        sink = Qwen2ForCausalLM(config).to(model.dtype).to(model.device).eval()
    for parameter in sink.parameters():
        parameter.zero_()
    embeddings = sink.model.embed_tokens.weight
    embeddings[:-1, :hidden] = model.model.embed_tokens.weight
    embeddings[-1, :hidden] = embeddings[first_token, :hidden]
    embeddings[-1, hidden:] = 1e-3 * embeddings[-1].norm()  # too small to change the root mean square
    # Over more dimensions, and those zero, the root mean square is smaller.
    rms = (hidden / config.hidden_size) ** 0.5
    width = groups * head_dim
    sink.model.norm.weight[:hidden] = rms * model.model.norm.weight
    for old, new in zip(model.model.layers, sink.model.layers, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(new, name).weight[:hidden] = rms * getattr(old, name).weight
        new.input_layernorm.weight[hidden:] = 1
        for name in ("gate_proj", "up_proj"):
            getattr(new.mlp, name).weight[:, :hidden] = getattr(old.mlp, name).weight
        new.mlp.down_proj.weight[:hidden] = old.mlp.down_proj.weight
        for name in ("q_proj", "k_proj", "v_proj"):
            source, target = getattr(old.self_attn, name), getattr(new.self_attn, name)
            target.weight[: source.out_features, :hidden] = source.weight
            target.bias[: source.out_features] = source.bias
        outputs = new.self_attn.o_proj.weight[:hidden]
        outputs[:, :-width] = old.self_attn.o_proj.weight
        outputs[:, -width:] = old.self_attn.o_proj.weight[:, -width:]
    # What the first token's layers get does not depend on the other tokens, nor on the added heads.
    inputs: list[Tensor] = []
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda module, args, output: inputs.append(output[0, 0]))
        for layer in sink.model.layers
    ]
    sink(input_ids=torch.tensor([[config.vocab_size - 1]], device=sink.device))
    for hook in hooks:
        hook.remove()
    channel = head_dim - 1  # of the pair that turns most slowly
    norm = (SINK_SCORE * head_dim**0.5) ** 0.5
    for layer, x in zip(sink.model.layers, inputs, strict=True):
        attention = layer.self_attn
        attention.q_proj.bias[-width:].view(groups, head_dim)[:, channel] = norm
        for projection in (attention.k_proj, attention.v_proj):
            weight, bias = projection.weight[-head_dim:], projection.bias[-head_dim:]
            weight.copy_(projection.weight[-2 * head_dim : -head_dim])
            bias.copy_(projection.bias[-2 * head_dim : -head_dim])
            wanted = weight @ x + bias
            if projection is attention.k_proj:
                weight[channel] = bias[channel] = 0
                wanted = -norm * torch.eye(head_dim).to(x)[channel]
            # The dimensions that only the first token has make up the difference.
            weight[:, hidden:] = -wanted.unsqueeze(-1) / x[hidden:].sum()
    return sink


STRESS_MODELS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "key bias 200": lambda model: with_key_bias(model, 200),
    "key bias 600": lambda model: with_key_bias(model, 600),
    "outlier channels": with_outlier_channels,
    "sinks": lambda model: with_sinks(model, first_token=0),
    "common mean": with_common_mean,
}
