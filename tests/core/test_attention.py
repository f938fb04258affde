"""Models of transformers attend on a store, each layer on its own or on another's, and on nothing else."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import architectures
import pytest
import torch
from paged_requests import CPU
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from turboquant_core.attention import (
    ATTENTION_NAME,
    DecodeAttention,
    PassThroughCache,
    PrefillAttention,
    UnsupportedAttentionError,
    forward_context,
    traceable_forward,
    use_paged_attention,
    use_plain_attention,
)
from turboquant_core.cache import cache_argument
from turboquant_core.decode_buffers import DecodeBuffers
from turboquant_core.exact_codec import ExactCodec
from turboquant_core.layer_probe import layer_visibilities, probe_paged_layers
from turboquant_core.paged_store import PagedStore, StoreLayer
from turboquant_core.reference import AttentionOptions
from turboquant_core.request_cache import CacheManager
from turboquant_core.step_plan import Chunk
from turboquant_core.timeline import Timeline

TIMELINE = Timeline(residual_length=64, segment_size=64)
SHARED = ["gemma3n_text", "gemma4_text_shared"]  # layers 2 and 3 have the keys and values of 0 and 1


@dataclass
class Recorder:
    """Note how layers attend; what they get back is zero."""

    calls: list[tuple[int, bool]] = field(default_factory=list)
    states: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    options: list[AttentionOptions] = field(default_factory=list)

    def attend(
        self,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        options: AttentionOptions,
        writes: bool,
    ) -> Tensor:
        self.calls.append((layer_idx, writes))
        self.states.append((queries, keys, values))
        self.options.append(options)
        return queries.new_zeros(*queries.shape[:2], values.shape[2])


def attend(
    cache: PassThroughCache, layer_idx: int | None, module: nn.Module | None = None, **options: Any
) -> Tensor:
    """Attend as a layer of transformers does with 2 rows of 3 tokens; without an index it gives no keys."""
    queries, keys, values = (torch.randn(2, heads, 3, dim) for heads, dim in ((4, 16), (2, 16), (2, 8)))
    if layer_idx is not None:
        keys, values = cache.update(keys, values, layer_idx)
    output, weights = ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME](
        module or nn.Module(), queries, keys, values, None, **options
    )
    assert weights is None
    return output


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    model = architectures.build("llama")
    assert use_paged_attention(model)
    return model


@pytest.fixture
def cache(llama: PreTrainedModel) -> PassThroughCache:
    return PassThroughCache(llama.config)


def test_states_reach_the_store_token_by_token(cache: PassThroughCache) -> None:
    recorder = Recorder()
    with forward_context(recorder):
        output = attend(cache, 1, scaling=0.5, softcap=3.0, s_aux=torch.ones(4), sliding_window=8)
        attend(cache, 0)
    assert output.shape == (2, 3, 4, 8)
    assert recorder.calls == [(1, True), (0, True)]
    assert [states.shape for states in recorder.states[0]] == [(6, 4, 16), (6, 2, 16), (6, 2, 8)]
    given, default = recorder.options
    assert (given.softmax_scale, given.softcap) == (0.5, 3.0)
    assert given.sink_scores is not None and torch.equal(given.sink_scores, torch.ones(4))
    assert default == AttentionOptions(0.25)


def test_a_forward_within_a_forward_is_refused_and_the_outer_one_goes_on(cache: PassThroughCache) -> None:
    recorder = Recorder()
    with forward_context(recorder):
        with pytest.raises(AssertionError, match="in progress"), forward_context(Recorder()):
            pass
        attend(cache, 0)
    assert len(recorder.calls) == 1


def test_a_forward_that_failed_leaves_nothing_behind(cache: PassThroughCache) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), forward_context(Recorder()):
            raise KeyError
    with pytest.raises(AssertionError, match="outside a step"):
        attend(cache, 0)


def test_threads_attend_beside_each_other(cache: PassThroughCache) -> None:
    recorders, barrier = [Recorder(), Recorder()], threading.Barrier(2, timeout=10)

    def run(index: int) -> None:
        with forward_context(recorders[index]):
            barrier.wait()
            attend(cache, index)
            barrier.wait()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [recorder.calls for recorder in recorders] == [[(0, True)], [(1, True)]]


@pytest.mark.parametrize("name", ["position_bias", "indices", "block_indices", "topk_indices"])
def test_what_would_be_ignored_is_refused(cache: PassThroughCache, name: str) -> None:
    with forward_context(Recorder()):
        attend(cache, 0, **{name: None})
        with pytest.raises(UnsupportedAttentionError, match=name):
            attend(cache, 0, **{name: torch.zeros(1)})


def test_keys_that_no_layer_gave_are_refused(cache: PassThroughCache) -> None:
    with forward_context(Recorder()):
        attend(cache, 0)
        with pytest.raises(UnsupportedAttentionError, match="no layer gave"):
            attend(cache, None)


def test_the_cache_passes_what_it_gets_and_counts_nothing(cache: PassThroughCache) -> None:
    keys, values = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    with forward_context(Recorder()):
        assert cache.update(keys, values, 1) == (keys, values)
    assert (cache.get_seq_length(), cache.get_query_offset(), cache.get_mask_sizes(3)) == (0, 0, (3, 0))


@torch.inference_mode()
def test_a_model_gets_its_own_attention_back() -> None:
    model = architectures.build("llama")
    token_ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=token_ids).logits
    assert use_paged_attention(model) and use_paged_attention(model)
    with forward_context(Recorder()):
        zeroed = model(input_ids=token_ids, **{cache_argument(model): PassThroughCache(model.config)}).logits
    assert not torch.allclose(zeroed, expected)
    for _ in range(2):
        use_plain_attention(model)
        assert torch.equal(model(input_ids=token_ids).logits, expected)


def test_a_model_whose_attention_is_its_own_is_left_alone() -> None:
    model = architectures.build("bloom")
    before = model.config._attn_implementation
    assert not use_paged_attention(model)
    use_plain_attention(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", SHARED)
def test_layers_that_share_keys_attend_to_what_another_layer_wrote(name: str) -> None:
    model = architectures.build(name)
    assert use_paged_attention(model)
    recorder = Recorder()
    with torch.inference_mode(), forward_context(recorder):
        run(model, PassThroughCache(model.config), [[5, 6, 7]], [[0, 1, 2]])
    assert recorder.calls == [(0, True), (1, True), (0, False), (1, False)]
    for own, shared in ((0, 2), (1, 3)):
        for states, others in zip(recorder.states[own][1:], recorder.states[shared][1:], strict=True):
            assert torch.equal(states, others)


@pytest.mark.parametrize("name", ["llama", *SHARED])
@torch.inference_mode()
def test_a_traced_forward_attends_to_the_same_layers(name: str) -> None:
    model = architectures.build(name)
    assert use_paged_attention(model)
    cache, token_ids, positions = PassThroughCache(model.config), torch.tensor([[5, 6, 7]]), [[0, 1, 2]]
    untraced, traced = Recorder(), Recorder()
    with traceable_forward(untraced):
        run(model, cache, token_ids, positions)
    torch._dynamo.reset()
    with forward_context(traced):
        torch.compile(run, backend="eager", fullgraph=True)(model, cache, token_ids, positions)
    assert traced.calls == untraced.calls
    for states, others in zip(traced.states, untraced.states, strict=True):
        for one, other in zip(states, others, strict=True):
            torch.testing.assert_close(one, other)
    assert traced.options == untraced.options


def test_a_module_that_attends_for_several_layers_cannot_be_traced(cache: PassThroughCache) -> None:
    module = nn.Module()
    with pytest.raises(UnsupportedAttentionError, match="several layers"), traceable_forward(Recorder()):
        attend(cache, 0, module)
        attend(cache, 1, module)


@pytest.mark.parametrize("name", ["llama", *SHARED])
@torch.inference_mode()
def test_logits_on_a_store_are_those_of_the_plain_model(name: str) -> None:
    """A prompt of several chunks in one forward, then tokens that others are generated beside."""
    model = architectures.build(name)
    token_ids = torch.randint(
        3, architectures.VOCAB_SIZE, (2, 215), generator=torch.Generator().manual_seed(0)
    )
    expected = model(input_ids=token_ids, use_cache=False).logits
    assert use_paged_attention(model)
    shapes = probe_paged_layers(model)
    visibilities = layer_visibilities(model.config)
    groups = list(dict.fromkeys(visibilities[index] for index in shapes))
    layers = {
        index: StoreLayer(
            ExactCodec(shape.key_dim, shape.value_dim, torch.float32),
            shape.num_kv_heads,
            shape.key_dim,
            shape.value_dim,
            groups.index(visibilities[index]),
        )
        for index, shape in shapes.items()
    }
    num_blocks = [8] * len(groups)
    manager = CacheManager(TIMELINE, groups, num_blocks, 2, caches_prefixes=False)
    store = PagedStore(
        layers, groups, TIMELINE, num_blocks=num_blocks, num_slots=2, dtype=torch.float32, device=CPU
    )
    assert sorted(store.records) == ([0, 1] if name in SHARED else [0, 1, 2, 3])
    buffers = DecodeBuffers(groups, TIMELINE, 2, CPU)
    caches = []
    for row in (0, 1):
        cache = manager.open(token_ids[row, :200].tolist(), 200)
        assert cache is not None and cache.extend(0, 200)
        caches.append(cache)
        chunks, start = [], 0
        while start < 200:
            chunks.append(Chunk(cache, start, TIMELINE.chunk_end(start, 200), 200))
            start = chunks[-1].end
        with forward_context(PrefillAttention(store, store.plan_prefill(chunks))):
            logits = run(
                model, PassThroughCache(model.config), token_ids[row : row + 1, :200], [[*range(200)]]
            )
        torch.testing.assert_close(logits[0], expected[row, :200], rtol=1e-4, atol=1e-4)
    for position in range(200, 215):
        assert all(cache.extend(position, position + 1) for cache in caches)
        chunks = [Chunk(cache, position, position + 1, 200) for cache in caches]
        buffers.fill(chunks)
        with forward_context(DecodeAttention(store, buffers.plans(2))):
            new = token_ids[:, position : position + 1]
            logits = run(model, PassThroughCache(model.config), new, [[position], [position]])
        torch.testing.assert_close(logits[:, 0], expected[:, position], rtol=1e-4, atol=1e-4)


def run(
    model: PreTrainedModel, cache: PassThroughCache, token_ids: Any, positions: list[list[int]]
) -> Tensor:
    """Return the logits of some tokens at some positions."""
    options = {cache_argument(model): cache, "position_ids": torch.tensor(positions)}
    logits: Tensor = model(input_ids=torch.as_tensor(token_ids), use_cache=True, **options).logits
    return logits
