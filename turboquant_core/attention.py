"""Attention on the paged store for unmodified transformers models.

A model is told to attend with the function of this file and gets a cache that keeps nothing. The function
finds the store, and the plan of the step, in a context that is the thread's while a forward runs; so whatever
a model does in between, one code path serves all that use transformers' attention interface.

To whoever traces a forward, attention is one operation, `turboquant::attend`: what it does is decided when it
runs. Only the layer is decided before, so the modules of a model that is traced have to know theirs.
"""
# mypy: disable-error-code="no-untyped-call"
# (transformers' own methods)

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from turboquant_core.paged_store import PagedStore
from turboquant_core.prefill_plan import PrefillPlan
from turboquant_core.reference import AttentionOptions
from turboquant_core.step_plan import DecodePlan

ATTENTION_NAME = "turboquant"

# What some attention functions get and ours does not know: each would be ignored, so each is refused.
_UNKNOWN_ARGUMENTS = ("position_bias", "indices", "block_indices", "topk_indices")


class UnsupportedAttentionError(RuntimeError):
    """The model asks for something that attention on the store does not do."""


class Attention(Protocol):
    """What happens inside a forward when a layer attends."""

    def attend(
        self,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        options: AttentionOptions,
        writes: bool,
    ) -> Tensor:
        """Return ``[num_tokens, num_heads, value_dim]``; see `PagedStore.prefill` for the arguments."""


@dataclass(frozen=True)
class PrefillAttention:
    """Chunks of new tokens, one after another; a plan for each group of layers."""

    store: PagedStore
    plans: Sequence[PrefillPlan]

    def attend(
        self,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        options: AttentionOptions,
        writes: bool,
    ) -> Tensor:
        """See `PagedStore.prefill`."""
        plan = self.plans[self.store.layers[layer_idx].group]
        return self.store.prefill(layer_idx, queries, keys, values, plan, options, writes=writes)


@dataclass(frozen=True)
class DecodeAttention:
    """One new token for each request; a plan for each group of layers."""

    store: PagedStore
    plans: Sequence[DecodePlan]

    def attend(
        self,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        options: AttentionOptions,
        writes: bool,
    ) -> Tensor:
        """See `PagedStore.decode`."""
        plan = self.plans[self.store.layers[layer_idx].group]
        return self.store.decode(layer_idx, queries, keys, values, plan, options, writes=writes)


@dataclass
class _Forward:
    """One forward in progress on this thread.

    Attributes:
        attention: What attends.
        updated_layer: The layer that gave its keys to the cache last and has not attended since.
        given: The keys that layers gave, by their id, and the layer; other layers may attend to them too.
        attended: The modules that attended, the layer that each attended to, and whether it wrote there.
    """

    attention: Attention
    updated_layer: int | None = None
    given: dict[int, tuple[ReferenceType[Tensor], int]] = field(default_factory=dict)
    attended: list[tuple[nn.Module, int, bool]] = field(default_factory=list)

    def next_layer(self, module: nn.Module, keys: Tensor) -> tuple[int, bool]:
        """Return the layer that a module attends to with these keys, and whether it writes them there."""
        layer_idx, writes = self.updated_layer, True
        self.updated_layer = None
        if layer_idx is None:
            layer_idx, writes = self.giver(keys), False
            if layer_idx is None:
                raise UnsupportedAttentionError("a layer attends to keys that no layer gave to the cache")
        self.attended.append((module, layer_idx, writes))
        return layer_idx, writes

    def giver(self, keys: Tensor) -> int | None:
        """Return the layer that gave these keys to the cache."""
        reference, layer_idx = self.given.get(id(keys), (None, None))
        return layer_idx if reference is not None and reference() is keys else None


# Attribute of a module that attends: (index of its cache layer, whether it writes), see `traceable_forward`.
_LAYER = "_turboquant_layer"

# What a model attended with before.
_plain_attention: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
_local = threading.local()  # several engines may run in one process, each on its thread


@contextmanager
def forward_context(attention: Attention) -> Iterator[None]:
    """Let the forwards of this thread attend with `attention`."""
    assert getattr(_local, "forward", None) is None, "a forward is in progress"
    _local.forward = _Forward(attention)
    try:
        yield
    finally:
        _local.forward = None


@contextmanager
def traceable_forward(attention: Attention) -> Iterator[None]:
    """Like `forward_context`, for a forward of each layer after which the model can be traced.

    Raises:
        UnsupportedAttentionError: A module attends for several layers.
    """
    with forward_context(attention):
        attended = _current_forward().attended
        yield
    if len({module for module, _, _ in attended}) < len(attended):
        raise UnsupportedAttentionError("a module attends for several layers")
    for module, layer_idx, writes in attended:
        setattr(module, _LAYER, (layer_idx, writes))


def _current_forward() -> _Forward:
    forward: _Forward | None = getattr(_local, "forward", None)
    assert forward is not None, "a model attends outside a step"
    return forward


def use_paged_attention(model: PreTrainedModel) -> bool:
    """Let a model attend on the store; False if its attention does not go through transformers' interface.

    No mask is made then: transformers makes masks only for attention that it knows.
    """
    ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] = _paged_attention
    if not model._can_set_attn_implementation():
        return False
    if model.config._attn_implementation != ATTENTION_NAME:
        _plain_attention[model] = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION_NAME)
    config: Any = model.config.get_text_config(decoder=True)
    return bool(config._attn_implementation == ATTENTION_NAME)


def use_plain_attention(model: PreTrainedModel) -> None:
    """Undo `use_paged_attention`."""
    if model in _plain_attention:
        model.set_attn_implementation(_plain_attention.pop(model))


def _paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do.

    Args:
        module: The layer's attention.
        query: ``[batch, num_heads, num_tokens, key_dim]``, rotated.
        key: ``[batch, num_kv_heads, num_tokens, key_dim]``, rotated, of the new tokens only.
        value: ``[batch, num_kv_heads, num_tokens, value_dim]``.
        attention_mask: Of no use here.
        scaling: Factor of the scores.
        softcap: See `AttentionOptions`.
        s_aux: Scores of a key without a value, by head.

    Returns:
        ``[batch, num_tokens, num_heads, value_dim]``.
    """
    for name in _UNKNOWN_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise UnsupportedAttentionError(f"its attention has {name}")
    if torch.compiler.is_dynamo_compiling():
        layer_idx, writes = getattr(module, _LAYER)
    else:
        layer_idx, writes = _current_forward().next_layer(module, key)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    output = torch.ops.turboquant.attend(query, key, value, layer_idx, writes, scale, softcap, s_aux)
    return output, None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer_idx: int,
    writes: bool,
    softmax_scale: float,
    softcap: float | None,
    sink_scores: Tensor | None,
) -> Tensor:
    """Attend with what the forward in progress attends with; see `_paged_attention` for the shapes."""
    batch, _, num_tokens, _ = query.shape
    queries, keys, values = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    options = AttentionOptions(softmax_scale, softcap, sink_scores)
    output = _current_forward().attention.attend(layer_idx, queries, keys, values, options, writes)
    return output.contiguous().view(batch, num_tokens, *output.shape[1:])


def _traced_attend(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    batch, num_heads, num_tokens, _ = query.shape
    return query.new_empty(batch, num_tokens, num_heads, value.shape[-1])


# That it writes to the store is not declared, as the store is no argument. Nothing else in a forward touches
# the store, and where a layer reads what another wrote, its input depends on that layer's output.
_library = torch.library.Library("turboquant", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, int layer_idx, bool writes, float softmax_scale, "
    "float? softcap, Tensor? sink_scores) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)
_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("turboquant::attend", _traced_attend, lib=_library)


class PassThroughCache(Cache):
    """The cache that a model gets: keys and values pass, states of recurrent layers stay.

    Args:
        config: The model's.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(layers=DynamicCache(config=config).layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values and remember whose they are."""
        if not torch.compiler.is_dynamo_compiling():
            forward = _current_forward()
            forward.updated_layer = layer_idx
            forward.given[id(key_states)] = ref(key_states), layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are given to the model."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return 0, likewise."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the sizes of a mask over the new tokens."""
        return query_length, 0
