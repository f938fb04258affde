"""TurboQuantCache: the KV cache that `model.generate(past_key_values=...)` takes, with its past quantized.

Knows which kind of layer each layer of a model needs; how one layer works is in `cache_layers.py`.
"""
# mypy: disable-error-code="no-untyped-call"
# (transformers' own methods)

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from turboquant_core.cache_layers import TurboQuantHybridLayer, TurboQuantLayer, TurboQuantSlidingLayer
from turboquant_core.config import KVCacheConfig
from turboquant_core.memory_footprint import MemoryFootprint
from turboquant_core.transform import LayerTransforms


class TurboQuantCache(Cache):
    """A KV cache for plain transformers that holds old tokens as TurboQuant codes (arXiv 2504.19874).

    Per kv head, the first ``num_sinks`` and the newest ``residual_length`` to ``residual_length + 63`` tokens
    stay in the model's dtype; those between are quantized in blocks of 64. Each forward dequantizes the past,
    layer by layer, and keeps no copy of it: the cache saves memory, not time. It carries no gradients.

    Without `config` it finds out what each layer needs as the model runs; with ``config=model.config``
    sliding-window layers also forget what has left their window. Encoder-decoder models are not supported.

        >>> cache = TurboQuantCache(bits=4, config=model.config)
        >>> model.generate(**inputs, past_key_values=cache)
        >>> cache.memory_footprint().total_bytes

    A model's transforms, measured once on any text, lower the error; its bit plan spreads bits over layers:

        >>> transforms = measure_transforms(model, input_ids)
        >>> plan = plan_bits(model, input_ids, 3.5, context=8192, transforms=transforms)
        >>> cache = TurboQuantCache(layer_bits=plan.layer_bits, transforms=transforms, config=model.config)

    Args:
        bits: Bits per number of keys and values: 2, 3, 4 or 8.
        key_bits: The same for keys alone.
        value_bits: The same for values alone.
        layer_bits: The bits of keys and values of single layers, by the layer's index.
        residual_length: Number of newest tokens that always stay in full precision.
        num_sinks: Number of first tokens that do. Models send much of their attention there, where a small
            error of a value counts for all tokens; sliding windows have none, and in a left-padded batch a
            row's padding counts as first.
        transforms: What keys and values are multiplied by before they are quantized, by the layer's index;
            rotations by default.
        config: The model's configuration.
        seed: Seed of the rotations.

    Raises:
        ValueError: If a number is out of range; in the first forward, if head_dim is below 16 or the
            transforms are of another model.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        key_bits: int | None = None,
        value_bits: int | None = None,
        layer_bits: Mapping[int, tuple[int, int]] | None = None,
        residual_length: int = 128,
        num_sinks: int = 4,
        transforms: Mapping[int, LayerTransforms] | None = None,
        config: PreTrainedConfig | None = None,
        seed: int = 0,
    ) -> None:
        self._kv_config = KVCacheConfig(
            key_bits=bits if key_bits is None else key_bits,
            value_bits=bits if value_bits is None else value_bits,
            residual_length=residual_length,
            num_sinks=num_sinks,
            seed=seed,
        )
        self._layer_configs = {
            index: dataclasses.replace(self._kv_config, key_bits=pair[0], value_bits=pair[1])
            for index, pair in (layer_bits or {}).items()
        }
        self._transforms = transforms or {}
        self._grows = config is None
        self._records_past = False
        plain_layers = [] if config is None else DynamicCache(config=config).layers
        super().__init__(layers=[self._compressed(i, layer) for i, layer in enumerate(plain_layers)])

    def memory_footprint(self) -> MemoryFootprint:
        """Count the bytes that the cache holds now."""
        compressed_bytes = exact_bytes = other_bytes = num_compressed_values = num_values = 0
        for layer in self.layers:
            attention = _attention(layer)
            if attention is not None:
                num_tokens, _ = attention.get_mask_sizes(0)
                for states in attention.states:
                    batch, num_heads, _, head_dim = states.residual.shape
                    compressed_bytes += sum(x.nbytes for x in states.blocks)
                    exact_bytes += states.sinks.nbytes + states.residual.nbytes
                    num_compressed_values += states.blocks.norms.numel() * head_dim
                    num_values += batch * num_heads * num_tokens * head_dim
            other_bytes += sum(x.nbytes for x in _plain_tensors(layer))
        return MemoryFootprint(compressed_bytes, exact_bytes, other_bytes, num_compressed_values, num_values)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: -n removes n; n > 0, transformers' older convention, keeps n.

        Raises:
            RuntimeError: If a layer has dropped what it would need again, see `activate_past_recording`.
        """
        super().crop(int(tokens_to_remove))  # assisted decoding may pass a tensor

    def reset(self) -> None:
        """Forget everything; the cache is as new."""
        self._records_past = False
        if self._grows:
            self.layers.clear()
        super().reset()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch (row numbers, or a mask)."""
        rows: Any = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times, in place."""
        rows: Any = torch.arange(self._num_rows()).repeat_interleave(repeats)
        self.reorder_cache(rows)

    def _num_rows(self) -> int:
        for layer in self.layers:
            attention = _attention(layer)
            held = [states.residual for states in attention.states] if attention is not None else []
            for tensor in (*held, *_plain_tensors(layer)):
                return tensor.shape[0]
        return 0

    def _compressed(self, layer_idx: int, layer: Any) -> Any:
        """Return our counterpart of one of transformers' layers; one without plain keys and values stays."""
        kind = type(layer)
        if kind is DynamicLayer:
            return self._full_layer(layer_idx)
        if kind is DynamicSlidingWindowLayer:
            return self._sliding_layer(layer_idx, layer.sliding_window)
        if kind is LinearAttentionAndFullAttentionLayer:
            return TurboQuantHybridLayer(self._full_layer(layer_idx), layer.number_of_states)
        if kind is LinearAttentionAndSlidingWindowAttentionLayer:
            attention = self._sliding_layer(layer_idx, layer.sliding_window)
            return TurboQuantHybridLayer(attention, layer.number_of_states)
        return layer

    def _full_layer(self, layer_idx: int) -> TurboQuantLayer:
        return TurboQuantLayer(self._layer_config(layer_idx), self._transforms.get(layer_idx))

    def _sliding_layer(self, layer_idx: int, window: int) -> TurboQuantSlidingLayer:
        return TurboQuantSlidingLayer(self._layer_config(layer_idx), window, self._transforms.get(layer_idx))

    def _layer_config(self, layer_idx: int) -> KVCacheConfig:
        return self._layer_configs.get(layer_idx, self._kv_config)

    # Without a config, every layer up to the highest used so far exists. It starts as full attention; its
    # first state makes it linear (no keys yet) or hybrid; one that has neither, an MLP block, stays empty.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values of a layer and return its past and new ones."""
        if self._grows:
            layer = self._grown(layer_idx)
            if type(layer) is LinearAttentionLayer:
                hybrid = TurboQuantHybridLayer(self._full_layer(layer_idx))
                vars(hybrid).update(vars(layer))
                self.layers[layer_idx] = hybrid
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Store a layer's convolution state and return what its convolution needs."""
        self._prepare_state(layer_idx, state_idx)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Store a layer's recurrent state and return it."""
        self._prepare_state(layer_idx, state_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return a layer's convolution state, or None before the first forward."""
        return super().get_conv_state(layer_idx, state_idx) if self._may_have_state(layer_idx) else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return a layer's recurrent state, or None before the first forward."""
        return super().get_recurrent_state(layer_idx, state_idx) if self._may_have_state(layer_idx) else None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether a layer (the last that has states, if None) holds states of earlier tokens."""
        return self._may_have_state(layer_idx) and super().has_previous_state(layer_idx, state_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens that an attention layer has seen."""
        return super().get_seq_length(self._attention_index(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return (number of keys that `update` will return, position of the first of them)."""
        return super().get_mask_sizes(query_length, self._attention_index(layer_idx))

    def activate_past_recording(self) -> None:
        """Let layers that drop or overwrite old tokens keep them until the next `crop`."""
        self._records_past = True
        super().activate_past_recording()

    def _grown(self, layer_idx: int) -> Any:
        while len(self.layers) <= layer_idx:
            self.layers.append(self._full_layer(len(self.layers)))
        return self.layers[layer_idx]

    def _prepare_state(self, layer_idx: int, state_idx: int) -> None:
        if not self._grows:
            return
        if state_idx > 0:
            raise ValueError(
                "this model has several states per layer: use TurboQuantCache(config=model.config)"
            )
        layer = self._grown(layer_idx)
        if isinstance(layer, TurboQuantLayer):
            state_layer = TurboQuantHybridLayer(layer) if layer.is_initialized else LinearAttentionLayer()
            state_layer.record_past = self._records_past
            self.layers[layer_idx] = state_layer

    def _may_have_state(self, layer_idx: int | None) -> bool:
        if not self._grows:
            return True
        layers = self.layers if layer_idx is None else self.layers[layer_idx : layer_idx + 1]
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)

    def _attention_index(self, layer_idx: int) -> int:
        """Return `layer_idx`, or the first layer with keys in place of one that turned out to have none."""
        if not self._grows or layer_idx >= len(self.layers):
            return layer_idx
        attentions = [_attention(layer) for layer in self.layers]
        with_keys = [i for i, attention in enumerate(attentions) if attention and attention.is_initialized]
        return layer_idx if layer_idx in with_keys or not with_keys else with_keys[0]


def cache_argument(model: nn.Module) -> str:
    """Return what a model's forward calls its cache: ``cache`` since transformers 5.24."""
    parameters = inspect.signature(model.forward).parameters
    names = ("cache", "cache_params", "past_key_values")
    return next((name for name in names if name in parameters), names[-1])


def _attention(layer: Any) -> TurboQuantLayer | None:
    """Return the part of a layer that holds compressed keys and values, if it has one."""
    part = layer.attention if isinstance(layer, TurboQuantHybridLayer) else layer
    return part if isinstance(part, TurboQuantLayer) else None


def _plain_tensors(layer: Any) -> Iterator[Tensor]:
    """Yield the tensors that a layer holds uncompressed, as attributes or in dicts of states."""
    for value in vars(layer).values():
        for item in value.values() if isinstance(value, dict) else (value,):
            if isinstance(item, Tensor):
                yield item
