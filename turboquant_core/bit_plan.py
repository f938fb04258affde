"""BitPlan: bits for the keys and the values of each layer, so that the whole cache meets a budget.

What a layer's keys, or its values, need is measured on the model: the same tokens are predicted with these
in 2 bits and everything else exact. What more bits leave of the divergence goes with the squared error
(measured: 3 bits about a quarter of 2 bits', 4 bits a quarter of that) and divergences are taken to add up:
the plan starts at 2 bits everywhere and buys, time after time, what saves most divergence for a byte.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from turboquant_core.block_quantizer import KEY_SCALE, VALUE_SCALE, BlockQuantizer
from turboquant_core.cache import cache_argument
from turboquant_core.codebook import MIN_DIM
from turboquant_core.config import BLOCK_SIZE, SUPPORTED_BITS, KVCacheConfig, vector_bytes
from turboquant_core.transform import LayerTransforms

NUM_PREDICTED = 64
"""Tokens of each window that are predicted from those before, most of them quantized."""

_SCALES = {"keys": KEY_SCALE, "values": VALUE_SCALE}
_MEASURED_BITS = 2
_SQUARED_ERRORS = {2: 0.1175, 3: 0.032, 4: 0.0081, 8: 0.000042}  # of BlockQuantizer, head_dim 128
_ROUNDING = 1e-9  # of sums of bits
_NUM_SINKS, _EXACT_TOKENS = KVCacheConfig().num_sinks, KVCacheConfig().residual_length


class Part(NamedTuple):
    """The keys, or the values, of one layer."""

    layer_idx: int
    name: Literal["keys", "values"]


class _Option(NamedTuple):
    """What some bits for a part cost."""

    divergence: float
    num_bytes: float  # a token


@dataclass(frozen=True)
class BitPlan:
    """Bits for every layer.

    Attributes:
        layer_bits: Bits of keys and values by the index of the cache layer; layers that have none, or whose
            window is too short for any of it to be quantized, are absent.
        bits_per_value: What a number takes on average over the cache, with norms and means.
        divergence: What the plan is expected to cost: KL divergence per token, in nats.
    """

    layer_bits: Mapping[int, tuple[int, int]]
    bits_per_value: float
    divergence: float


@torch.inference_mode()
def plan_bits(
    model: PreTrainedModel,
    input_ids: Tensor,
    budget_bits: float,
    *,
    context: int,
    transforms: Mapping[int, LayerTransforms] | None = None,
) -> BitPlan:
    """Choose the bits of each layer's keys and values.

    The same model, text and hardware give the same plan.

    Args:
        model: On its device, in evaluation mode.
        input_ids: ``[num_windows, num_tokens]``, each window from the start of a text, special tokens
            included. The last 64 tokens are predicted; the others, but for the first 4 and the newest 128,
            are quantized. Some thousand tokens in all do.
        budget_bits: Bits that a number may take on average, norms and means included; the first and newest
            tokens, which stay exact, are not counted.
        context: Length of a request, in tokens, at which layers with a sliding window are weighed.
        transforms: Those that the cache will use.

    Raises:
        ValueError: If not even 2 bits everywhere meet the budget, the windows are too short, or the model
            has no keys and values that can be compressed.
    """
    minimum = _NUM_SINKS + BLOCK_SIZE + _EXACT_TOKENS + NUM_PREDICTED
    if input_ids.shape[-1] < minimum:
        raise ValueError(f"windows must have at least {minimum} tokens, got {input_ids.shape[-1]}")
    options, num_values = _measure_options(model, input_ids, context, transforms or {})
    if not options:
        raise ValueError("the model has no keys and values that can be compressed")
    chosen = _choose(options, budget_bits * num_values / 8)
    taken = [options[part][bits] for part, bits in chosen.items()]
    bits_per_value = 8 * sum(option.num_bytes for option in taken) / num_values
    if bits_per_value > budget_bits + _ROUNDING:
        raise ValueError(
            f"2 bits everywhere take {bits_per_value:.3f} per value, with norms and means, and the budget "
            f"is {budget_bits:g}"
        )
    layers = sorted({part.layer_idx for part in chosen})
    return BitPlan(
        {index: (chosen[Part(index, "keys")], chosen[Part(index, "values")]) for index in layers},
        bits_per_value,
        sum(option.divergence for option in taken),
    )


def _measure_options(
    model: PreTrainedModel, input_ids: Tensor, context: int, transforms: Mapping[int, LayerTransforms]
) -> tuple[dict[Part, dict[int, _Option]], float]:
    """Return what each number of bits costs for each part, and how many numbers a token's parts have."""
    past, newest = input_ids[:, :-NUM_PREDICTED], input_ids[:, -NUM_PREDICTED:]
    cache = DynamicCache(config=model.config)
    base: Any = model.base_model
    base(input_ids=past, use_cache=True, **{cache_argument(base): cache})
    expected = _log_probs(model, newest, copy.deepcopy(cache))
    options: dict[Part, dict[int, _Option]] = {}
    num_values = 0.0
    for layer_idx, layer in enumerate(cache.layers):
        if not _is_compressible(layer):
            continue
        window: int | None = getattr(layer, "sliding_window", None)
        if window is not None and window - 1 < _EXACT_TOKENS + BLOCK_SIZE:
            continue  # nothing of it is ever quantized
        share = 1.0 if window is None else min(1.0, window / context)
        for part in (Part(layer_idx, "keys"), Part(layer_idx, "values")):
            states: Tensor = getattr(layer, part.name)
            num_heads, head_dim = states.shape[1], states.shape[3]
            num_values += share * num_heads * head_dim
            transform = getattr(transforms.get(layer_idx), part.name, None)
            quantizer = BlockQuantizer(
                head_dim, _MEASURED_BITS, scale=_SCALES[part.name], transform=transform
            )
            trial = copy.deepcopy(cache)
            setattr(trial.layers[layer_idx], part.name, _quantized(states, quantizer, window is not None))
            difference = expected - _log_probs(model, newest, trial)
            measured = max(0.0, (expected.exp() * difference).sum(-1).mean().item())
            options[part] = {
                bits: _Option(
                    measured * error / _SQUARED_ERRORS[_MEASURED_BITS],
                    share * num_heads * vector_bytes(head_dim, bits),
                )
                for bits, error in _SQUARED_ERRORS.items()
            }
    return options, num_values


def _is_compressible(layer: Any) -> TypeGuard[DynamicLayer]:
    if not (isinstance(layer, DynamicLayer) and layer.is_initialized):
        return False
    heads: tuple[Any, Any] = layer.keys, layer.values
    return all(states.shape[-1] >= MIN_DIM for states in heads)


def _log_probs(model: PreTrainedModel, input_ids: Tensor, cache: DynamicCache) -> Tensor:
    outputs = model(input_ids=input_ids, use_cache=True, **{cache_argument(model): cache})
    log_probs: Tensor = outputs.logits.double().log_softmax(-1)
    return log_probs


def _quantized(states: Tensor, quantizer: BlockQuantizer, is_sliding: bool) -> Tensor:
    """Return ``[batch, num_kv_heads, num_tokens, head_dim]`` as a compressed cache would give them back."""
    start = 0 if is_sliding else _NUM_SINKS
    num_blocks = max(0, states.shape[2] - start - _EXACT_TOKENS) // BLOCK_SIZE
    end = start + num_blocks * BLOCK_SIZE
    blocks = quantizer.quantize(states[:, :, start:end].unflatten(2, (num_blocks, BLOCK_SIZE)))
    middle = quantizer.dequantize(blocks, states.dtype).flatten(2, 3)
    return torch.cat([states[:, :, :start], middle, states[:, :, end:]], dim=2)


def _choose(options: Mapping[Part, Mapping[int, _Option]], num_bytes: float) -> dict[Part, int]:
    """Return bits for every part: 2, and more where they save most for a byte, as long as bytes are left."""
    chosen = dict.fromkeys(options, min(SUPPORTED_BITS))
    left = num_bytes - sum(options[part][bits].num_bytes for part, bits in chosen.items())
    while True:
        best, best_rate = None, 0.0
        for part, bits in chosen.items():
            now = options[part][bits]
            for more, option in options[part].items():
                price = option.num_bytes - now.num_bytes
                if more <= bits or price > left:
                    continue
                rate = (now.divergence - option.divergence) / price
                if rate > best_rate:
                    best, best_rate = (part, more, price), rate
        if best is None:
            return chosen
        part, bits, price = best
        chosen[part] = bits
        left -= price
