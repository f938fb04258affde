"""A request gets the same beside others, computed again, from a cached prefix, and forked."""

from __future__ import annotations

import pytest
import torch
from paged_reference import reference, relative_errors
from paged_requests import FULL, SMALL, Engine, Layer, Request, Shape, joined, make_codec, random_tokens

from turboquant_core.reference import AttentionOptions
from turboquant_core.request_cache import Visibility
from turboquant_core.timeline import Timeline

SHAPE = Shape(2, 2, 32, 16)
OPTIONS = AttentionOptions(0.2, sink_scores=torch.tensor([0.0, 1.0, 2.0, -1.0]))
CODEC = make_codec((4, 2), SHAPE)
LAYERS = [
    Layer(CODEC, FULL, AttentionOptions(0.2)),
    Layer(make_codec(None, SHAPE), FULL, OPTIONS),
    Layer(CODEC, Visibility(window=70), OPTIONS),
    Layer(CODEC, Visibility(chunk=128), AttentionOptions(0.2, softcap=2.0)),
]
TOLERANCE = 3e-6


def make_engine(num_slots: int = 2, timeline: Timeline = SMALL, caches_prefixes: bool = False) -> Engine:
    return Engine(SHAPE, LAYERS, timeline, num_slots=num_slots, caches_prefixes=caches_prefixes)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_errors(actual, expected).max() < TOLERANCE


def assert_right(engine: Engine, request: Request, start: int = 0) -> None:
    """Compare with the reference what a request has got from some position on."""
    for index, layer in enumerate(engine.layers):
        expected = reference(layer, engine.timeline, request.tokens, request.num_prompt_tokens)
        assert_close(request.outputs[index, start : request.num_computed], expected[start:])


def assert_same_bytes(engine: Engine, request: Request, other_engine: Engine, other: Request) -> None:
    pairs = zip(engine.records_of(request), other_engine.records_of(other), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_requests_of_different_lengths_get_what_they_get_alone() -> None:
    lengths = ((300, 340), (1, 60), (132, 300), (5, 90), (68, 200))
    together = make_engine(num_slots=5)
    requests = [
        together.open(random_tokens(SHAPE, num_tokens, seed=num_tokens), num_prompt_tokens)
        for num_prompt_tokens, num_tokens in lengths
    ]
    for request in requests:
        together.prefill((request, request.num_prompt_tokens))
    # Slots in no order, and never the same requests beside each other for long.
    together.decode(requests[3], requests[0], requests[4], requests[1], requests[2])
    together.decode_all(requests[1], requests[3])
    together.decode_all(requests[4], requests[0], requests[2])
    for request in requests:
        alone = make_engine()
        expected = alone.serve(request.tokens, request.num_prompt_tokens)
        assert_close(request.outputs, expected.outputs)
        assert_same_bytes(together, request, alone, expected)


def test_a_slot_and_blocks_that_others_left_change_nothing() -> None:
    """Theirs were not finite."""
    engine = make_engine(num_slots=1)
    poisonous = random_tokens(SHAPE, 300, seed=1)
    for states in poisonous[1:]:
        states[1::7] = torch.inf
        states[2::7] = torch.nan
    engine.serve(poisonous, 200).cache.release()
    for num_prompt_tokens in (2, 150):
        request = engine.serve(random_tokens(SHAPE, 220, seed=2), num_prompt_tokens)
        assert_right(engine, request)
        request.cache.release()


def test_nothing_of_another_request_is_written() -> None:
    engine = make_engine()
    idle = engine.serve(random_tokens(SHAPE, 250, seed=3), 140)
    records = engine.records_of(idle)
    exact = [tensor[idle.cache.slot].clone() for pair in engine.store.exact.values() for tensor in pair]
    engine.serve(random_tokens(SHAPE, 400, seed=4), 200)
    assert all(map(torch.equal, engine.records_of(idle), records))
    held = [tensor[idle.cache.slot] for pair in engine.store.exact.values() for tensor in pair]
    assert all(map(torch.equal, held, exact))


@pytest.mark.parametrize("timeline", [SMALL, Timeline(residual_length=128, segment_size=256)])
@pytest.mark.parametrize("num_generated", [1, 63, 64, 65, 150])
def test_a_request_that_is_computed_again_gets_the_same(timeline: Timeline, num_generated: int) -> None:
    num_prompt_tokens, num_tokens = 210, 210 + num_generated + 70
    tokens = random_tokens(SHAPE, num_tokens, seed=5)
    engine = make_engine(timeline=timeline)
    original = engine.serve(tokens, num_prompt_tokens)

    again = make_engine(3, timeline)
    again.open(tokens, 1)  # takes a slot and, from now on, some blocks
    replayed = again.open(tokens, num_prompt_tokens, num_prompt_tokens + num_generated)
    again.prefill((replayed, num_prompt_tokens))
    while replayed.num_computed < num_prompt_tokens + num_generated:
        end = timeline.chunk_end(replayed.num_computed, num_prompt_tokens)
        again.prefill((replayed, min(end, num_prompt_tokens + num_generated)))
    again.decode_all(replayed)
    assert replayed.cache.slot != original.cache.slot
    assert_close(replayed.outputs, original.outputs)
    assert_same_bytes(engine, original, again, replayed)


def test_a_prompt_and_the_first_generated_tokens_are_computed_again_in_one_call() -> None:
    tokens = random_tokens(SHAPE, 270, seed=6)
    original = make_engine().serve(tokens, 210)
    engine = make_engine()
    replayed = engine.open(tokens, 210, 250)
    engine.prefill((replayed, SMALL.chunk_end(210, 210)))
    engine.decode_all(replayed)
    assert_close(replayed.outputs, original.outputs)


@pytest.mark.parametrize("num_prompt_tokens", [196, 260, 330])
def test_a_cached_prefix_leads_to_what_the_whole_prompt_leads_to(num_prompt_tokens: int) -> None:
    engine = make_engine(num_slots=3, caches_prefixes=True)
    tokens = random_tokens(SHAPE, num_prompt_tokens + 80, seed=7)
    first = engine.serve(tokens, num_prompt_tokens)
    second = engine.open(tokens, num_prompt_tokens)
    num_hit_tokens = second.num_computed
    assert num_hit_tokens == 4 + (num_prompt_tokens - 4 - 64) // 64 * 64
    assert second.cache.block_tables[0][0] == first.cache.block_tables[0][0]
    engine.prefill((second, num_prompt_tokens))
    engine.decode_all(second)
    assert_close(second.outputs[:, :4], first.outputs[:, :4])
    assert_close(second.outputs[:, num_hit_tokens:], first.outputs[:, num_hit_tokens:])
    assert second.outputs[:, 4:num_hit_tokens].isnan().all()
    assert_same_bytes(engine, first, engine, second)


def test_another_prompt_goes_on_from_the_prefix_that_both_share() -> None:
    engine = make_engine(caches_prefixes=True)
    tokens = random_tokens(SHAPE, 330, seed=8)
    engine.serve(tokens, 300).cache.release()
    other = joined(tokens.part(0, 140), random_tokens(SHAPE, 210, seed=9))
    request = engine.open(other, 290, token_ids=[*range(140), *range(1000, 1210)])
    assert request.num_computed == 132
    engine.prefill((request, 290))
    engine.decode_all(request)
    assert_right(engine, request, start=132)


@pytest.mark.parametrize("num_computed", [70, 195, 196, 260])
def test_forks_go_on_with_tokens_of_their_own(num_computed: int) -> None:
    """Of a prompt of 70 tokens, whose forks share blocks that were made of generated ones."""
    engine = make_engine()
    common = random_tokens(SHAPE, num_computed, seed=10)
    branches = [joined(common, random_tokens(SHAPE, 150, seed=seed)) for seed in (11, 12)]
    request = engine.open(branches[0], 70)
    engine.prefill((request, 70))
    while request.num_computed < num_computed:
        engine.decode(request)
    fork = engine.fork(request, branches[1])
    engine.decode_all(fork, request)
    assert_right(engine, request)
    assert_right(engine, fork, start=num_computed)
    request.cache.release()
    engine.manager.check_integrity()
