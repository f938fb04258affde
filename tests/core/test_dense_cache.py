"""A model that attends by itself gets its whole past out of the store, and leaves its new tokens there."""

from __future__ import annotations

import architectures
import torch
from paged_requests import FULL, SMALL, Engine, Layer, Shape, make_codec

from turboquant_core.cache import cache_argument
from turboquant_core.dense_cache import DenseCache
from turboquant_core.reference import AttentionOptions
from turboquant_core.step_plan import Chunk


@torch.inference_mode()
def test_logits_are_those_of_the_model_without_a_cache() -> None:
    model = architectures.build("bloom")
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(3, architectures.VOCAB_SIZE, (1, 215), generator=generator)
    expected = model(input_ids=token_ids, use_cache=False).logits
    shape = Shape(4, 1, 16, 16)
    engine = Engine(shape, [Layer(make_codec(None, shape), FULL, AttentionOptions(1))] * 4)
    cache = engine.manager.open(token_ids[0, :200].tolist(), 200)
    assert cache is not None
    start = 0
    while start < 215:
        end = SMALL.chunk_end(start, 200) if start < 200 else start + 1
        assert cache.extend(start, end)
        dense = DenseCache(model.config, engine.store, Chunk(cache, start, end, 200))
        assert (dense.get_seq_length(), dense.get_query_offset()) == (start, start)
        assert dense.get_mask_sizes(end - start) == (end, 0)
        logits = model(
            input_ids=token_ids[:, start:end], use_cache=True, **{cache_argument(model): dense}
        ).logits
        torch.testing.assert_close(logits, expected[:, start:end], rtol=1e-4, atol=1e-4)
        start = end
