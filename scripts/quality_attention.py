"""How far each layer's attention output is off if its keys and values come from the cache under test.

The model runs with an exact cache, so that a layer's error is its own. Beside it the other cache takes in the
same keys and values, and each attention is computed twice for the same queries. Knows how transformers finds
its attention functions; knows no metric but this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from quality_reader import CHUNK, FIRST_CHUNK, CacheReader
from torch import Tensor
from transformers import AttentionMaskInterface, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PROBE = "attention_error_probe"


class _PairedCache(DynamicCache):
    """An exact cache that passes all it is given on to another, and keeps what both last returned."""

    def __init__(self, config: PreTrainedConfig, tested: Cache) -> None:
        super().__init__(config=config)
        self._tested = tested

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.layer_idx = layer_idx
        self.tested_states = self._tested.update(key_states, value_states, layer_idx, *args, **kwargs)
        self.exact_states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.exact_states


@torch.inference_mode()
def attention_error(
    reader: CacheReader, open_cache: Callable[[], Cache], windows: Tensor
) -> dict[int, float]:
    """Returns the relative error of each layer's attention output over the second half of the windows.

    The root of the squared error's sum over the squared output's. Layers whose attention does not get what
    the cache returned are left out; so are all of a model that does not run with sdpa.

    Args:
        windows: ``[batch, context]`` token ids.
    """
    sdpa, model = ALL_ATTENTION_FUNCTIONS["sdpa"], reader.model
    cache = _PairedCache(model.config, open_cache())
    squares: dict[int, Tensor] = {}  # of error and output, [2]

    def compare(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        output, _ = sdpa(module, query, key, value, mask, **kwargs)
        if key is cache.exact_states[0] and value is cache.exact_states[1]:
            tested, _ = sdpa(module, query, *cache.tested_states, mask, **kwargs)
            sums = torch.stack([x.double().square().sum() for x in (tested - output, output)])
            squares[cache.layer_idx] = squares.get(cache.layer_idx, 0) + sums
        return output, None

    first = FIRST_CHUNK + windows.shape[1] // 2 // CHUNK * CHUNK
    reader.read(cache, windows[:, :first])
    with _attention(model, compare):
        reader.read(cache, windows[:, first:], CHUNK)
    ratios = {layer: (error / output.clamp_min(1e-30)) for layer, (error, output) in sorted(squares.items())}
    return {layer: ratio.sqrt().item() for layer, ratio in ratios.items()}


@contextmanager
def _attention(model: PreTrainedModel, function: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Has a model use an attention function in place of sdpa."""
    if model.config._attn_implementation != "sdpa":
        yield
        return
    ALL_ATTENTION_FUNCTIONS[PROBE] = function
    # Masks are made only for names that the class knows, not for those of one instance.
    AttentionMaskInterface.register(PROBE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        model.set_attn_implementation(PROBE)
        yield
    finally:
        model.set_attn_implementation("sdpa")
        del ALL_ATTENTION_FUNCTIONS[PROBE]
