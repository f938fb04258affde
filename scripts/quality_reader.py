"""CacheReader: feeds tokens to a model through a cache, as a long conversation would come in.

Knows neither what is measured nor which cache it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import Cache, PreTrainedModel

from turboquant_core import KVCacheConfig, cache_argument

CHUNK = 64  # tokens that are predicted at once; the past of each chunk has gone through the cache
# Before the first of these come the tokens that our cache keeps exact; then it takes blocks of 64, so each
# token sees as many exact ones as if it had been fed alone. Caches without sinks show up to 60 more.
FIRST_CHUNK = KVCacheConfig().num_sinks
PROMPT_CHUNK = 512  # the same where nothing is predicted


class CacheReader:
    """Feeds tokens in chunks.

    Args:
        model: On its device, in evaluation mode.
        bar: Moves by the number of tokens fed.
    """

    def __init__(self, model: PreTrainedModel, bar: tqdm) -> None:
        self.model, self.bar = model, bar

    def predict(self, cache: Cache, ids: Tensor) -> Iterator[Tensor]:
        """Feeds ``[batch, num_tokens]`` and yields each chunk's logits, ``[batch, CHUNK, vocabulary]``."""
        for chunk in ids.split(CHUNK, dim=1):
            yield self._forward(self.model, cache, chunk).logits

    def read(self, cache: Cache, ids: Tensor, chunk_size: int = PROMPT_CHUNK) -> None:
        """Feeds ``[batch, num_tokens]`` and computes no logits: 512 x 150,000 are 0.3 GB a row."""
        for chunk in ids.split(chunk_size, dim=1):
            self._forward(self.model.base_model, cache, chunk)

    def _forward(self, module: PreTrainedModel, cache: Cache, ids: Tensor) -> Any:
        outputs = module(input_ids=ids, use_cache=True, **{cache_argument(module): cache})
        self.bar.update(ids.numel())
        return outputs
