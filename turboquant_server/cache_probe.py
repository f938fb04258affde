"""Does a model work with a compressed cache, and what does that cache take? Finds out by running it."""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from turboquant_core import TurboQuantCache, cache_argument

# A prompt in two pieces, then two decode steps, as the engine goes about it. So few tokens stay in the
# residual, uncompressed: the logits must be those without a cache but for rounding.
PROBE_PIECES = (5, 3, 1, 1)
# Root mean square of the logits' error over the logits' standard deviation. With caches that work it is below
# 1e-4 in float32; in 16 bits, experts chosen differently can make it large for good reasons.
MAX_ERROR_FLOAT32 = 1e-3
MAX_ERROR_16_BIT = 0.25
NUM_MEASURED_TOKENS = 1024

LayerStates = dict[int, tuple[Tensor, Tensor]]  # layer index: keys, values


class UnsupportedCacheError(RuntimeError):
    """The model does not work with a compressed cache; the message says why."""


@dataclass(frozen=True)
class CacheSize:
    """What one request's keys and values take.

    Attributes:
        num_tokens: The length that was measured.
        num_bytes: At that length.
        bytes_per_token: What each further token adds; 0 if all layers forget what leaves their window.
    """

    num_tokens: int
    num_bytes: int
    bytes_per_token: float

    def count_tokens(self, num_bytes: int) -> int | None:
        """Return how long a request can get in so many bytes, or None if it can get as long as it likes."""
        if num_bytes < self.num_bytes:
            return num_bytes * self.num_tokens // self.num_bytes
        if self.bytes_per_token == 0:
            return None
        return self.num_tokens + int((num_bytes - self.num_bytes) / self.bytes_per_token)


@dataclass(frozen=True)
class CacheMeasurement:
    """A filled cache by the bytes of the tensors that it held.

    Attributes:
        compressed: With codes, norms, means and the uncompressed first and newest tokens.
        bf16: The same keys and values in bfloat16.
        bits_per_value: ``compressed.num_bytes`` over the numbers in these keys and values.
        bits_per_further_value: The same for the tokens beyond ``compressed.num_tokens``.
    """

    compressed: CacheSize
    bf16: CacheSize
    bits_per_value: float
    bits_per_further_value: float


class _RecordingCache(TurboQuantCache):
    """Write down which layers give what to the cache."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.num_updates = 0
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.num_updates += 1
        self.states[layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.inference_mode()
def check_cache(model: PreTrainedModel) -> LayerStates:
    """Generate two tokens through a cache and compare with the model without one.

    Returns:
        The last key and value that each attention layer gave to the cache.

    Raises:
        UnsupportedCacheError: The model does not use a cache as it must, or its cache cannot be compressed.
    """
    return _check_generation(model, _RecordingCache(model.config))


@torch.inference_mode()
def measure_cache(
    open_cache: Callable[[], TurboQuantCache], states: LayerStates, max_model_len: int
) -> CacheMeasurement:
    """Fill a cache with random tokens and count what it takes.

    Args:
        open_cache: Returns an empty cache of the model.
        states: Of the model, as `check_cache` returns them.
        max_model_len: Most tokens of a request.
    """
    cache = open_cache()
    num_tokens = min(NUM_MEASURED_TOKENS, max_model_len)
    _fill(cache, states, num_tokens)
    first = cache.memory_footprint()
    # Both times whole blocks more, so that the number of uncompressed tokens is the same again.
    _fill(cache, states, NUM_MEASURED_TOKENS)
    second = cache.memory_footprint()
    _fill(cache, states, NUM_MEASURED_TOKENS)
    third = cache.memory_footprint()
    growth = third.total_bytes - second.total_bytes
    bf16_growth = third.bf16_bytes - second.bf16_bytes
    return CacheMeasurement(
        compressed=CacheSize(num_tokens, first.total_bytes, growth / NUM_MEASURED_TOKENS),
        bf16=CacheSize(num_tokens, first.bf16_bytes, bf16_growth / NUM_MEASURED_TOKENS),
        bits_per_value=first.bits_per_value,
        bits_per_further_value=16 * growth / max(1, bf16_growth),
    )


def _check_generation(model: PreTrainedModel, cache: _RecordingCache) -> LayerStates:
    embeddings: Any = model.get_input_embeddings()
    num_tokens = sum(PROBE_PIECES)
    input_ids = torch.linspace(0, embeddings.num_embeddings - 1, num_tokens, device=model.device).long()[None]
    try:
        expected = model(input_ids=input_ids, use_cache=False).logits[0].double()
        logits = torch.cat(
            [
                model(input_ids=piece, use_cache=True, **{cache_argument(model): cache}).logits[0].double()
                for piece in input_ids.split(PROBE_PIECES, dim=1)
            ]
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedCacheError(f"it fails with one ({type(error).__name__}: {reason})") from error
    if not expected.isfinite().all():
        raise UnsupportedCacheError("its logits are not finite")
    wanted = {
        index
        for index, layer in enumerate(DynamicCache(config=model.config).layers)
        if isinstance(layer, DynamicLayer)
    }
    if set(cache.states) != wanted or cache.num_updates != len(PROBE_PIECES) * len(wanted) or not wanted:
        raise UnsupportedCacheError(f"{len(cache.states)} of {len(wanted)} attention layers use it")
    for layer_idx in wanted:
        if type(cache.layers[layer_idx]).__module__.startswith("transformers."):
            raise UnsupportedCacheError(f"layer {layer_idx} stores more than keys and values")
    error_size = (logits - expected).square().mean().sqrt() / expected.std()
    if not error_size <= (MAX_ERROR_FLOAT32 if model.dtype == torch.float32 else MAX_ERROR_16_BIT):
        raise UnsupportedCacheError("its tokens differ from those without one")
    return cache.states


def _fill(cache: TurboQuantCache, states: LayerStates, num_tokens: int) -> None:
    """Add random tokens of the recorded shapes and dtypes to every layer."""
    for layer_idx, layer_states in states.items():
        keys, values = (
            torch.randn_like(state[:, :, :1].expand(-1, -1, num_tokens, -1)) for state in layer_states
        )
        cache.update(keys, values, layer_idx)
