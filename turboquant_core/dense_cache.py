"""DenseCache: a chunk's past as one tensor, for models whose attention does not use transformers' interface.

The model attends as it always does; what it sees before the chunk comes out of the store.
"""
# mypy: disable-error-code="no-untyped-call"
# (transformers' own methods)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig

from turboquant_core.paged_store import PagedStore
from turboquant_core.step_plan import Chunk


class DenseCache(Cache):
    """The cache of one forward over one chunk of one request.

    Args:
        config: The model's.
        store: Holds the past, and takes the chunk.
        chunk: What the forward computes.
    """

    def __init__(self, config: PreTrainedConfig, store: PagedStore, chunk: Chunk) -> None:
        super().__init__(layers=DynamicCache(config=config).layers)
        self._store = store
        self._chunk = chunk
        self._plans = store.plan_prefill([chunk])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the chunk, ``[1, num_kv_heads, num_tokens, head_dim]``, and return all up to its end."""
        plan = self._plans[self._store.layers[layer_idx].group]
        past = self._store.read(layer_idx, plan.runs[0])
        new = key_states, value_states
        new_keys, new_values = (states[0].transpose(0, 1) for states in new)
        self._store.write(layer_idx, new_keys, new_values, plan)
        keys, values = (torch.cat([held[None], states], 2) for held, states in zip(past, new, strict=True))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens before the chunk."""
        return self._chunk.start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the position of the chunk's first token."""
        return self._chunk.start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return (number of tokens that `update` returns, position of the first)."""
        return self._chunk.start + query_length, 0
