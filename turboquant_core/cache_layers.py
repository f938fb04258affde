"""One layer of the cache behind `generate`, for each kind of attention layer that transformers knows.

Knows what transformers asks of a cache layer; knows neither which layers a model has (`cache.py`) nor how
tokens are held (`compressed_states.py`).
"""
# mypy: disable-error-code="no-untyped-call"
# (transformers' own methods)

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import LongTensor, Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from turboquant_core.block_quantizer import KEY_SCALE, VALUE_SCALE, BlockQuantizer
from turboquant_core.codebook import MIN_DIM
from turboquant_core.compressed_states import CompressedStates
from turboquant_core.config import KVCacheConfig
from turboquant_core.quantizer import ScaleRule
from turboquant_core.transform import LayerTransforms, Transform, rotation


class TurboQuantLayer(CacheLayerMixin):
    """Full attention: every token stays, the old ones quantized.

    `keys` and `values`, where transformers' own layers hold their tensors, stay None: the past has to be
    dequantized first.

    Args:
        config: Bits, residual length, number of sinks and seed.
        transforms: Of this layer's keys and values; rotations by default.
    """

    is_sliding = False
    is_croppable = True
    record_past = False  # every token stays, so there is nothing to switch on

    def __init__(self, config: KVCacheConfig, transforms: LayerTransforms | None = None) -> None:
        super().__init__()
        self._config = config
        self._transforms = transforms
        self.states: tuple[CompressedStates, ...] = ()  # keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn shapes, dtype and device from the first tokens.

        Raises:
            ValueError: If head_dim is below 16, or the transforms are of another shape.
        """
        config, transforms = self._config, self._transforms or (None, None)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.states = (
            self._empty_states(key_states, config.key_bits, KEY_SCALE, transforms[0]),
            self._empty_states(value_states, config.value_bits, VALUE_SCALE, transforms[1]),
        )
        self.is_initialized = True

    def _empty_states(
        self, states: Tensor, bits: int, scale: ScaleRule, transform: Transform | None
    ) -> CompressedStates:
        num_heads, _, head_dim = states.shape[1:]
        if head_dim < MIN_DIM:
            raise ValueError(
                f"TurboQuantCache needs a head_dim of at least {MIN_DIM} and this model has {head_dim}: "
                "use transformers' DynamicCache"
            )
        transform = transform or rotation(head_dim, self._config.seed)
        if transform.dim != head_dim or transform.num_heads not in (1, num_heads):
            raise ValueError(
                f"the transforms are for {transform.num_heads} heads of {transform.dim} and the model has "
                f"{num_heads} of {head_dim}: measure them with this model"
            )
        return CompressedStates(
            states,
            BlockQuantizer(head_dim, bits, scale=scale, transform=transform),
            residual_length=self._config.residual_length,
            num_sinks=self._config.num_sinks,
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and return past and new ones, ``[batch, num_kv_heads, num_tokens, head_dim]``."""
        return self._append(key_states, value_states, window=None)

    def _append(self, key_states: Tensor, value_states: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.states
        return keys.append(key_states, window), values.append(value_states, window)

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.states[0].num_tokens if self.states else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (number of tokens that `update` will return, position of the first of them)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens: -n removes n; n > 0, transformers' older convention, keeps n."""
        num_tokens = self._num_removed(tokens_to_remove)
        if num_tokens:
            for states in self.states:
                states.crop(num_tokens)

    def _num_removed(self, tokens_to_remove: int) -> int:
        length = self.get_seq_length()
        return max(0, length - tokens_to_remove) if tokens_to_remove > 0 else min(-tokens_to_remove, length)

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Make row i of the batch what row beam_idx[i] was; rows may repeat or be left out."""
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def offload(self) -> None:
        """Move what is stored to the CPU."""
        self._apply(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move what is stored back to the layer's device."""
        self._apply(lambda x: x.to(self.device, non_blocking=True))

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        for states in self.states:
            states.apply(function)

    def reset(self) -> None:
        """Forget everything, shapes included."""
        self.states = ()
        self.is_initialized = False


class TurboQuantSlidingLayer(TurboQuantLayer):
    """Sliding-window or chunked attention: whole blocks that left the window are dropped.

    Returns the tokens that transformers' DynamicSlidingWindowLayer returns: min(seen, window - 1) past ones,
    then the new ones. Up to 63 older tokens are held because a block leaves as a whole.

    Args:
        config: Bits, residual length and seed; the first tokens leave the window, so there are no sinks.
        sliding_window: Number of keys that a query sees, itself included.
        transforms: Of this layer's keys and values; rotations by default.
    """

    is_sliding = True

    def __init__(
        self, config: KVCacheConfig, sliding_window: int, transforms: LayerTransforms | None = None
    ) -> None:
        super().__init__(dataclasses.replace(config, num_sinks=0), transforms)
        self.sliding_window = sliding_window
        self.cumulative_length = 0

    def activate_past_recording(self) -> None:
        """Keep tokens that leave the window until the next `crop`, so that it can bring them back."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and return what is visible of the past and the new ones."""
        num_visible = self.get_mask_sizes(key_states.shape[2])[0]
        window = None if self.record_past else self.sliding_window - 1
        keys, values = self._append(key_states, value_states, window)
        self.cumulative_length += key_states.shape[2]
        num_hidden = keys.shape[2] - num_visible
        return keys[:, :, num_hidden:], values[:, :, num_hidden:]

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, those that left the window included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (number of tokens that `update` will return, position of the first of them)."""
        num_past = min(self.cumulative_length, self.sliding_window - 1)
        return num_past + query_length, self.cumulative_length - num_past

    def get_max_length(self) -> int:
        """Return the window."""
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, see `TurboQuantLayer.crop`, then drop what has left the window.

        Raises:
            RuntimeError: If tokens that would come back into the window have already been dropped.
        """
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                "a sliding-window layer that has filled its window can only be cropped while it records the "
                "past: call activate_past_recording() before the forward that is to be undone"
            )
        num_tokens = self._num_removed(tokens_to_remove)
        num_left = self.cumulative_length - num_tokens
        window = self.sliding_window - 1
        for states in self.states:
            if states.num_tokens - num_tokens < min(num_left, window):
                raise RuntimeError(f"cannot crop {num_tokens} tokens: those before them were not recorded")
            if num_tokens:
                states.crop(num_tokens)
            states.trim(window)
        self.cumulative_length = num_left

    def reset(self) -> None:
        """Forget everything, shapes included."""
        super().reset()
        self.cumulative_length = 0
        self.record_past = False


class TurboQuantHybridLayer(LinearAttentionAndFullAttentionLayer):
    """A layer that has compressed keys and values beside the linear-attention states of transformers.

    Args:
        attention: Holds the keys and values.
        number_of_states: Number of convolution or recurrent states.
    """

    def __init__(self, attention: TurboQuantLayer, number_of_states: int = 1) -> None:
        super().__init__(number_of_states=number_of_states)
        self.attention = attention
        self.is_sliding = attention.is_sliding

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and return past and new ones."""
        self.attention.record_past = self.record_past  # generate() also clears it, on this object only
        return self.attention.update(key_states, value_states)

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.attention.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (number of tokens that `update` will return, position of the first of them)."""
        return self.attention.get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; transformers refuses where there are recurrent states."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        self.attention.record_past = self.record_past
        self.attention.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Make row i of the batch what row beam_idx[i] was."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self.attention.reorder_cache(beam_idx)

    def offload(self) -> None:
        """Move what is stored to the CPU."""
        LinearAttentionLayer.offload(self)
        self.attention.offload()

    def prefetch(self) -> None:
        """Move what is stored back to the layer's device."""
        LinearAttentionLayer.prefetch(self)
        self.attention.prefetch()

    def reset(self) -> None:
        """Forget everything."""
        LinearAttentionLayer.reset(self)
        self.attention.reset()
