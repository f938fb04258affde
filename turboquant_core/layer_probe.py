"""What a model's layers store and see, found out by running it on one token. Knows no store."""
# mypy: disable-error-code="no-untyped-call"
# (transformers' own methods)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from turboquant_core.attention import PassThroughCache, UnsupportedAttentionError, forward_context
from turboquant_core.cache import cache_argument
from turboquant_core.reference import AttentionOptions
from turboquant_core.request_cache import Visibility


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores of a token.

    Attributes:
        num_kv_heads: Heads of keys and values.
        key_dim: Numbers of a key.
        value_dim: Numbers of a value.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass
class _Recorder:
    """Note the shapes that layers attend with; what they get back is zero."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)

    def attend(
        self,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        options: AttentionOptions,
        writes: bool,
    ) -> Tensor:
        if writes:
            if layer_idx in self.shapes:
                raise UnsupportedAttentionError(f"layer {layer_idx} stores keys and values twice")
            self.shapes[layer_idx] = LayerShape(keys.shape[1], keys.shape[2], values.shape[2])
        return queries.new_zeros(*queries.shape[:2], values.shape[2])


class _RecordingCache(PassThroughCache):
    """Note the shapes that a model of its own attention gives to the cache."""

    def __init__(self, config: PreTrainedConfig, shapes: dict[int, LayerShape]) -> None:
        super().__init__(config)
        self._shapes = shapes

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._shapes[layer_idx] = LayerShape(key_states.shape[1], key_states.shape[3], value_states.shape[3])
        return key_states, value_states


@torch.inference_mode()
def probe_paged_layers(model: PreTrainedModel) -> dict[int, LayerShape]:
    """Return the shapes of a model that attends on the store, see `use_paged_attention`."""
    recorder = _Recorder()
    with forward_context(recorder):
        _run(model, PassThroughCache(model.config))
    return recorder.shapes


@torch.inference_mode()
def probe_dense_layers(model: PreTrainedModel) -> dict[int, LayerShape]:
    """Return the shapes of a model that attends by itself."""
    shapes: dict[int, LayerShape] = {}
    _run(model, _RecordingCache(model.config, shapes))
    return shapes


def _run(model: PreTrainedModel, cache: PassThroughCache) -> None:
    model(
        input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device),
        use_cache=True,
        **{cache_argument(model): cache},
    )


def layer_visibilities(config: PreTrainedConfig) -> dict[int, Visibility]:
    """Return which keys a query sees, by the index of the cache layer."""
    types: Any = getattr(config.get_text_config(decoder=True), "layer_types", None)
    layers: list[Any] = DynamicCache(config=config).layers
    visibilities = {}
    for index, layer in enumerate(layers):
        window = layer.sliding_window if getattr(layer, "is_sliding", False) else None
        is_chunked = window is not None and (
            types[index] == "chunked_attention" if types else _is_all_chunked(config)
        )
        visibilities[index] = Visibility(chunk=window) if is_chunked else Visibility(window=window)
    return visibilities


def _is_all_chunked(config: PreTrainedConfig) -> bool:
    text_config = config.get_text_config(decoder=True)
    return (
        getattr(text_config, "sliding_window", None) is None
        and getattr(text_config, "attention_chunk_size", None) is not None
    )
