"""StatePool: the states of recurrent and convolution layers, one row for each slot.

transformers' own layer objects compute with the states; here they only wait for their request's next step.
Slot -1 is of nobody: steps leave there what they compute in rows without a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

_KINDS = ("conv", "recurrent")
_Key = tuple[int, str, int]  # layer, kind, state of the layer


class StatePool:
    """Keep the states of the requests that run.

    Args:
        num_slots: Most requests that run at once.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._states: dict[_Key, Tensor] = {}

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot's states; one slot more than there may be requests is held."""
        return sum(states.nbytes for states in self.of_slot(0))

    def of_slot(self, slot: int) -> list[Tensor]:
        """Return the states of a slot, where they lie."""
        return [states[slot] for states in self._states.values()]

    def load(self, cache: Cache, slots: Tensor) -> None:
        """Put the states of slots, int64 ``[num_rows]``, into a new cache."""
        for key, layer in _states_of(cache):
            if key not in self._states:
                continue
            _, kind, index = key
            states = self._states[key][slots]
            getattr(layer, f"{kind}_states")[index] = states
            getattr(layer, f"is_{kind}_states_initialized")[index] = True
            layer.has_previous_state[index] = True
            layer.dtype, layer.device = states.dtype, states.device
            if kind == "conv":
                layer.conv_kernel_size[index] = states.shape[-1]

    def store(self, cache: Cache, slots: Tensor) -> None:
        """Keep what a forward has left in a cache, whose rows are these slots."""
        for key, layer in _states_of(cache):
            _, kind, index = key
            states = getattr(layer, f"{kind}_states")[index]
            if states is None:
                continue
            if key not in self._states:
                shape = (self._num_slots + 1, *states.shape[1:])
                self._states[key] = torch.zeros(shape, dtype=states.dtype, device=states.device)
            self._states[key][slots] = states

    @torch.inference_mode()
    def copy_slot(self, source: int, target: int) -> None:
        """Make the states of a slot those of another."""
        for states in self._states.values():
            states[target] = states[source]


def _states_of(cache: Cache) -> Iterator[tuple[_Key, Any]]:
    """Yield a key for each state that a cache's layers may have, and the layer."""
    for layer_idx, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for kind in _KINDS:
                for index in range(layer.number_of_states):
                    yield (layer_idx, kind, index), layer
