"""The transforms of a model's layers, from what its queries, keys and values look like on a text.

Runs the model unchanged and watches what its layers give to the cache and ask of it. Knows no quantizer.
"""
# mypy: disable-error-code="no-untyped-call"
# (transformers' own methods)

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from turboquant_core.cache import cache_argument
from turboquant_core.codebook import MIN_DIM
from turboquant_core.config import BLOCK_SIZE
from turboquant_core.transform import LayerTransforms, balanced

_WATCHED = "turboquant_watched"


class _Moments:
    """Sums of ``x x^T`` of one layer, by what the x are, and the shape in which attention saw its keys."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.key_shape: torch.Size | None = None
        self.attention_key_shape: torch.Size | None = None

    def add(self, name: str, vectors: Tensor) -> None:
        """Add vectors ``[batch, num_heads, num_vectors, dim]``."""
        rows = vectors.float().transpose(0, 1).flatten(1, 2)
        moment = (rows.mT @ rows).div_(rows.shape[1]).cpu().double()
        self.sums[name] = self.sums[name] + moment if name in self.sums else moment

    def transforms(self, seed: int) -> LayerTransforms:
        sees_stored_keys = self.key_shape == self.attention_key_shape
        queries = self.sums.get("queries") if sees_stored_keys else None
        return LayerTransforms(
            balanced(self.sums["keys"], queries, seed), balanced(self.sums["values"], None, seed)
        )


@torch.inference_mode()
def measure_transforms(
    model: PreTrainedModel, input_ids: Tensor, *, seed: int = 0
) -> dict[int, LayerTransforms]:
    """Run a model over a text and return the transforms of each layer's keys and values.

    Keys are balanced against the queries of their own layer, values for the squared error, see
    :func:`~turboquant_core.transform.balanced`. Where a model does not use transformers' attention
    interface, or stores keys in another shape than attention sees (latent attention), keys are treated as
    values are. Any text of some thousand tokens does: these moments are the model's more than the subject's.

    Args:
        model: On its device, in evaluation mode.
        input_ids: ``[num_windows, num_tokens]``, each window from the start of a text, special tokens
            included.
        seed: Seed of the rotation.

    Returns:
        By the index of the cache layer; layers without keys and values, or with heads below 16, are absent.
    """
    moments: dict[int, _Moments] = {}
    base: Any = model.base_model
    with _watched_queries(model, moments):
        for window in input_ids.split(1):
            cache = _WatchedCache(moments, config=model.config)
            base(input_ids=window, use_cache=True, **{cache_argument(base): cache})
    layers = {
        layer_idx: layer
        for layer_idx, layer in sorted(moments.items())
        if {"keys", "values"} <= layer.sums.keys()
        and min(layer.sums[name].shape[-1] for name in ("keys", "values")) >= MIN_DIM
    }
    # Of many small matrices, each takes no less on several threads than on one. Measured for as many as an 8B
    # Llama has, on 2 cores: 0.9 s in place of 1.6, beside another busy process 1.7 in place of 5 to 20.
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            transforms = list(pool.map(lambda layer: layer.transforms(seed), layers.values()))
    finally:
        torch.set_num_threads(num_threads)  # of threads to come, too
    return dict(zip(layers, transforms, strict=True))


class _WatchedCache(DynamicCache):
    """Add what each layer gives to the cache to its moments."""

    def __init__(self, moments: dict[int, _Moments], **options: Any) -> None:
        super().__init__(**options)
        self._moments = moments

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self._moments.setdefault(layer_idx, _Moments())
        layer.key_shape = key_states.shape
        layer.add("keys", _centred(key_states))
        layer.add("values", _centred(value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@contextmanager
def _watched_queries(model: PreTrainedModel, moments: dict[int, _Moments]) -> Iterator[None]:
    """Let the model's attention add its queries to the moments."""
    implementation = model.config._attn_implementation

    def attention(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        num_heads, num_kv_heads = query.shape[1], key.shape[1]
        if hasattr(module, "layer_idx") and num_heads % num_kv_heads == 0:
            layer = moments.setdefault(module.layer_idx, _Moments())
            layer.attention_key_shape = key.shape
            # The queries of a kv head's group, one after another.
            layer.add("queries", query.unflatten(1, (num_kv_heads, -1)).flatten(2, 3))
        function = ALL_ATTENTION_FUNCTIONS.get(implementation) or _eager_attention(module)
        return function(module, query, key, *args, **kwargs)

    if not model._can_set_attn_implementation():  # attention of the model's own
        yield
        return
    ALL_ATTENTION_FUNCTIONS[_WATCHED] = attention
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(_WATCHED, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    try:
        model.set_attn_implementation(_WATCHED)
        yield
    finally:
        model.set_attn_implementation(implementation)
        del ALL_ATTENTION_FUNCTIONS[_WATCHED]  # and the moments with it


def _eager_attention(module: Any) -> Any:
    """Return the function that each model's file has for itself, or imports."""
    for kind in type(module).__mro__:
        function = vars(sys.modules[kind.__module__]).get("eager_attention_forward")
        if function is not None:
            return function
    raise KeyError(f"{type(module).__name__} has no eager attention")


def _centred(states: Tensor) -> Tensor:
    """Subtract from ``[batch, num_heads, num_tokens, dim]`` such means as the cache stores."""
    group = min(BLOCK_SIZE, states.shape[2])
    whole = states[:, :, : states.shape[2] // group * group].float().unflatten(2, (-1, group))
    centred: Tensor = whole - whole.mean(-2, keepdim=True)
    return centred.flatten(2, 3)
