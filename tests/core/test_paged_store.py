"""Attention on the store is attention over the decoded blocks and the exact tokens that a query sees.

What becomes of requests beside each other, preempted, forked or with a cached prefix: test_paged_requests.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from paged_reference import as_read, num_blocks_read, reference, relative_errors
from paged_requests import FULL, SMALL, Engine, Layer, Request, Shape, make_codec, plan_of, random_tokens
from torch import Tensor

from turboquant_core.reference import AttentionOptions
from turboquant_core.request_cache import Visibility
from turboquant_core.step_plan import Chunk, due_blocks
from turboquant_core.timeline import Timeline

BITS = (None, (4, 4), (3, 2), (8, 4))
VISIBILITIES = (FULL, Visibility(window=50), Visibility(window=300), Visibility(chunk=128))
SHAPES = (Shape(3, 1, 16, 64), Shape(2, 3, 80, 16), Shape(1, 8, 64, 80))
# Of a token's output, in float32.
TOLERANCE = 3e-6


def make_layers(shape: Shape) -> list[Layer]:
    """Return layers of every codec and, of each codec, every visibility; their options take turns."""
    num_heads = shape.num_kv_heads * shape.group_size
    sink_scores = 3 * torch.randn(num_heads, generator=torch.Generator().manual_seed(3))
    scale = shape.key_dim**-0.5
    options = [
        AttentionOptions(scale),
        AttentionOptions(scale, softcap=1.5),
        AttentionOptions(scale, sink_scores=sink_scores),
        AttentionOptions(0.7 * scale, softcap=4.0, sink_scores=sink_scores),
        AttentionOptions(1.3 * scale),
    ]
    return [
        Layer(make_codec(bits, shape), visibility, options[(2 * i + j) % len(options)])
        for i, bits in enumerate(BITS)
        for j, visibility in enumerate(VISIBILITIES)
    ]


def few_layers(shape: Shape) -> list[Layer]:
    """Return four of them, all different in everything."""
    return make_layers(shape)[:: len(VISIBILITIES) + 1]


def assert_right(engine: Engine, request: Request, tolerance: float = TOLERANCE) -> None:
    for index, layer in enumerate(engine.layers):
        expected = reference(layer, engine.timeline, request.tokens, request.num_prompt_tokens)
        errors = relative_errors(request.outputs[index], expected)
        assert errors.max() < tolerance, (index, layer.visibility, errors.argmax().item())


def memory(engine: Engine) -> list[Tensor]:
    """Return a copy of all that a store holds."""
    exact = itertools.chain(*engine.store.exact.values())
    return [*(tensor.nan_to_num() for tensor in exact), *map(torch.clone, engine.store.records.values())]


def assert_same_records(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(itertools.starmap(torch.equal, zip(actual, expected, strict=True)))


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_of_every_codec_and_visibility(shape: Shape) -> None:
    engine = Engine(shape, make_layers(shape))
    assert_right(engine, engine.serve(random_tokens(shape, 4 + 4 * 64 + 30 + 205, seed=1), 4 + 4 * 64 + 30))


def test_attention_to_a_long_prompt_in_the_default_timeline() -> None:
    shape = Shape(1, 2, 16, 16)
    layers = [Layer(make_codec((4, 3), shape), v, AttentionOptions(0.25)) for v in VISIBILITIES]
    engine = Engine(shape, layers, Timeline())
    assert_right(engine, engine.serve(random_tokens(shape, 1200 + 205, seed=2), 1200))


@pytest.mark.parametrize("num_prompt_tokens", [1, 3, 4, 5, 67, 68, 69, 132, 133])
def test_attention_to_prompts_that_end_where_tokens_change_places(num_prompt_tokens: int) -> None:
    shape = SHAPES[1]
    engine = Engine(shape, few_layers(shape))
    assert_right(
        engine, engine.serve(random_tokens(shape, num_prompt_tokens + 80, seed=3), num_prompt_tokens)
    )


@pytest.mark.parametrize(
    "timeline",
    [
        Timeline(num_sinks=4, residual_length=0, segment_size=128),
        Timeline(num_sinks=0, residual_length=64, segment_size=64),
        Timeline(num_sinks=6, residual_length=192, segment_size=128),
    ],
)
def test_attention_in_other_timelines(timeline: Timeline) -> None:
    shape = SHAPES[2]
    engine = Engine(shape, few_layers(shape), timeline)
    assert_right(engine, engine.serve(random_tokens(shape, 300 + 150, seed=4), 300))


def test_it_makes_no_difference_how_a_prompt_is_divided_over_calls() -> None:
    shape = SHAPES[1]
    tokens = random_tokens(shape, 400, seed=5)
    engine = Engine(shape, make_layers(shape)[4:8])
    whole, divided = engine.open(tokens, 400), engine.open(tokens, 400)
    engine.prefill((whole, 400))
    for end in (68, 196, 324, 400):
        engine.prefill((divided, end))
    assert relative_errors(divided.outputs, whole.outputs).max() < TOLERANCE
    assert engine.layers[0].visibility == FULL
    assert torch.equal(engine.records_of(divided)[0], engine.records_of(whole)[0])


def test_several_requests_are_prefilled_in_one_call() -> None:
    shape = SHAPES[0]
    engine = Engine(shape, few_layers(shape), num_slots=3)
    requests = [
        engine.open(random_tokens(shape, count, seed=count), num_prompt_tokens)
        for count, num_prompt_tokens in ((250, 240), (20, 10), (140, 134))
    ]
    engine.prefill(*((request, request.num_prompt_tokens) for request in requests))
    engine.decode_all(*reversed(requests))
    for request in requests:
        assert_right(engine, request)


@pytest.mark.parametrize("bits", BITS)
def test_reading_returns_what_a_chunk_sees(bits: tuple[int, int] | None) -> None:
    """Before each chunk of a prompt, and before each generated token."""
    shape = SHAPES[1]
    tokens = random_tokens(shape, 300, seed=6)
    codec = make_codec(bits, shape)
    engine = Engine(shape, [Layer(codec, FULL, AttentionOptions(0.1))])
    request = engine.open(tokens, 230)
    while request.num_computed < 300:
        start = request.num_computed
        end = SMALL.chunk_end(start, 230) if start < 230 else start + 1
        [plan] = engine.store.plan_prefill(engine.chunks(request, end))
        [run] = plan.runs
        past = tokens.part(0, start)
        expected = as_read(past, codec, num_blocks_read(start, 230, SMALL), SMALL.num_sinks)
        for states, expected_states in zip(engine.store.read(0, run), expected, strict=True):
            torch.testing.assert_close(states.transpose(0, 1), expected_states, rtol=1e-6, atol=1e-6)
        engine.prefill((request, end))


def test_writing_leaves_what_prefill_and_decode_leave() -> None:
    shape = SHAPES[2]
    tokens = random_tokens(shape, 300, seed=7)
    attending = Engine(shape, few_layers(shape))
    expected = attending.serve(tokens, 230)
    writing = Engine(shape, few_layers(shape))
    request = writing.open(tokens, 230)
    while request.num_computed < 300:
        start = request.num_computed
        [chunk] = writing.chunks(request, min(300, SMALL.chunk_end(start, 230)))
        assert request.cache.extend(start, chunk.end)
        new = tokens.part(start, chunk.end)
        plans = writing.store.plan_prefill([chunk])
        for index, layer in writing.store.layers.items():
            writing.store.write(index, new.keys, new.values, plans[layer.group])
        request.num_computed = chunk.end
    assert request.cache.extend(299, 300)
    assert_same_records(writing.records_of(request), attending.records_of(expected))
    for index, pair in writing.store.exact.items():
        for tensor, other in zip(pair, attending.store.exact[index], strict=True):
            assert torch.equal(tensor[request.cache.slot], other[expected.cache.slot])


def test_a_layer_that_does_not_write_attends_to_what_another_has_written_in_chunks() -> None:
    """A whole forward's chunks are written before the other layer attends."""
    shape = SHAPES[1]
    layer = make_layers(shape)[4]
    engine = Engine(shape, [layer])
    request = engine.open(random_tokens(shape, 400, seed=8), 330)
    for end in (330, 388, 400):  # a prompt, and generated tokens that are computed again
        chunks, part = engine.chunks(request, end), request.tokens.part(request.num_computed, end)
        engine.prefill((request, end))
        before = memory(engine)
        [plan] = engine.store.plan_prefill(chunks)
        outputs = engine.store.prefill(0, *part, plan, layer.options, writes=False)
        assert torch.equal(outputs, request.outputs[0, chunks[0].start : end])
        engine.store.prefill(0, part.queries, -part.keys, -part.values, plan, layer.options, writes=False)
        assert all(map(torch.equal, memory(engine), before))


def test_a_layer_that_does_not_write_attends_to_what_another_has_written_token_by_token() -> None:
    shape = SHAPES[1]
    layer = make_layers(shape)[4]
    engine = Engine(shape, [layer])
    request = engine.open(random_tokens(shape, 400, seed=8), 310)
    engine.prefill((request, 310))
    for position in range(310, 400):  # a block becomes due with the token at 323
        engine.decode(request)
        chunk = Chunk(request.cache, position, position + 1, 310)
        plan = plan_of([chunk], FULL, SMALL)
        due = [block_id for _, block_id, _ in due_blocks([chunk], 0, SMALL)]
        engine.store.records[0][due] = 255
        before = memory(engine)
        queries, keys, values = request.tokens.part(position, position + 1)
        outputs = engine.store.decode(0, queries, -keys, -values, plan, layer.options, writes=False)
        assert torch.equal(outputs[0], request.outputs[0, position])
        assert all(map(torch.equal, memory(engine), before))
        if due:
            break
    assert position == 323


@pytest.mark.parametrize("num_at_once", [1, 2])
def test_it_makes_no_difference_how_many_blocks_are_read_at_once(
    num_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SHAPES[1]
    engine = Engine(shape, make_layers(shape)[4:8])
    numbers = num_at_once * 64 * shape.num_kv_heads * (shape.key_dim + shape.value_dim)
    monkeypatch.setattr("turboquant_core.reference._CPU_NUMBERS", numbers)
    requests = [engine.open(random_tokens(shape, end + 10, seed=end), end) for end in (300, 80)]
    engine.prefill(*((request, request.num_prompt_tokens) for request in requests))
    engine.decode_all(*requests)
    for request in requests:
        assert_right(engine, request)


@pytest.mark.parametrize("bits", [None, (8, 4)])
def test_bfloat16_loses_at_most_twice_what_plain_attention_in_bfloat16_loses(
    bits: tuple[int, int] | None,
) -> None:
    shape, dtype = SHAPES[1], torch.bfloat16
    for visibility in VISIBILITIES:
        layer = Layer(make_codec(bits, shape, dtype), visibility, AttentionOptions(shape.key_dim**-0.5))
        engine = Engine(shape, [layer], dtype=dtype)
        request = engine.serve(random_tokens(shape, 330, seed=9, dtype=dtype), 250)
        assert request.outputs.dtype is dtype
        expected = reference(layer, SMALL, request.tokens, 250)
        plain = reference(layer, SMALL, request.tokens, 250, dtype)
        error = relative_errors(request.outputs[0], expected).mean()
        assert error < 2 * relative_errors(plain, expected).mean()


def test_memory_is_counted() -> None:
    shape = Shape(2, 1, 16, 32)
    codec = make_codec(None, shape)
    engine = Engine(shape, [Layer(codec, FULL, AttentionOptions(1))] * 2, num_slots=3)
    exact = 3 * 2 * (4 + 128) * (16 + 32) * 4
    records = 60 * 2 * 64 * (16 + 32) * 4
    assert engine.store.num_bytes == 2 * (exact + records)
