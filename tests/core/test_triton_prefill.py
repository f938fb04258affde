"""Chunks attend in kernels as in the reference: on a GPU, else in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from paged_requests import FULL, SMALL, Engine, Layer, Request, Shape, Tokens, make_codec, random_tokens
from torch import Tensor
from triton_device import DEVICE, HAS_GPU

from turboquant_core.kernels import triton_prefill
from turboquant_core.kernels.triton_found import Found, add_found
from turboquant_core.reference import AttentionOptions
from turboquant_core.request_cache import Visibility
from turboquant_core.step_plan import Chunk, due_blocks

pytestmark = [
    pytest.mark.usefixtures("loops_in_the_interpreter"),
    # Of queries that see nothing, in the interpreter only.
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
]

WINDOWS = (Visibility(window=50), Visibility(window=300), Visibility(chunk=128))


def engine_of(
    shape: Shape,
    bits: tuple[int, int] | None,
    visibility: Visibility = FULL,
    options: AttentionOptions | None = None,
    dtype: torch.dtype = torch.float32,
) -> Engine:
    options = options or AttentionOptions(shape.key_dim**-0.5)
    codec = make_codec(bits, shape, dtype)
    engine = Engine(shape, [Layer(codec, visibility, options)], num_slots=3, dtype=dtype, device=DEVICE)
    engine.store.uses_kernels = True
    return engine


def attend_again(engine: Engine, chunks: list[Chunk], states: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return what the reference finds in what chunks have left."""
    engine.store.uses_kernels = False
    [plan] = engine.store.plan_prefill(chunks)
    on_device = [each.to(DEVICE) for each in states]
    outputs = engine.store.prefill(0, *on_device, plan, engine.layers[0].options, writes=False)
    engine.store.uses_kernels = True
    return outputs.cpu()


def compute(engine: Engine, request: Request, *ends: int, tolerance: float = 3e-6) -> None:
    """Compute a request up to each of some positions and compare all outputs."""
    for end in ends:
        start, chunks = request.num_computed, engine.chunks(request, end)
        engine.prefill((request, end))
        expected = attend_again(engine, chunks, request.tokens.part(start, end))
        error = (request.outputs[0, start:end] - expected).float().norm() / expected.float().norm()
        assert error < tolerance


@pytest.mark.parametrize(
    ("visibility", "bits"), [*((each, (4, 3)) for each in (FULL, *WINDOWS)), (FULL, None), (WINDOWS[1], None)]
)
def test_chunks_see_what_they_shall(visibility: Visibility, bits: tuple[int, int] | None) -> None:
    """Whole prompts, their parts, and generated tokens that are computed again."""
    shape = Shape(1, 2, 32, 16)
    engine = engine_of(shape, bits, visibility)
    request = engine.open(random_tokens(shape, 345, seed=1), 270)
    compute(engine, request, 132, 270, 285, 324, 345)


@pytest.mark.parametrize("num_prompt_tokens", [1, 3, 5, 68, 69, 132, 133])
def test_prompts_end_anywhere(num_prompt_tokens: int) -> None:
    shape = Shape(1, 2, 16, 32)
    engine = engine_of(shape, (2, 8))
    request = engine.open(random_tokens(shape, num_prompt_tokens + 9, seed=2), num_prompt_tokens)
    compute(engine, request, num_prompt_tokens, num_prompt_tokens + 9)


@pytest.mark.parametrize("visibility", [FULL, Visibility(window=100)], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_scores_are_made_as_models_ask(
    visibility: Visibility, softcap: float | None, has_sinks: bool
) -> None:
    shape = Shape(1, 2, 80, 48)
    sinks = torch.tensor([-1.0, 3.0], device=DEVICE) if has_sinks else None
    engine = engine_of(shape, (4, 4), visibility, AttentionOptions(0.2, softcap, sinks))
    request = engine.open(random_tokens(shape, 140, seed=3), 140)
    compute(engine, request, 68, 140)


@pytest.mark.parametrize("most_numbers", [1, 2 * 64 * 2 * 96])
def test_a_past_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, most_numbers: int) -> None:
    monkeypatch.setattr(triton_prefill, "_SCRATCH_NUMBERS", most_numbers)
    shape = Shape(2, 1, 64, 32)
    for visibility in (FULL, Visibility(window=150)):
        engine = engine_of(shape, (3, 4), visibility)
        compute(engine, engine.open(random_tokens(shape, 330, seed=4), 330), 132, 330)


def test_requests_beside_each_other_get_what_each_gets_alone() -> None:
    shape = Shape(1, 2, 32, 32)
    tokens = [random_tokens(shape, length, seed=length) for length in (70, 200, 140)]
    alone = []
    for each in tokens:
        engine = engine_of(shape, (4, 4))
        request = engine.open(each, len(each.keys))
        engine.prefill((request, len(each.keys)))
        alone.append(request.outputs)
    engine = engine_of(shape, (4, 4))
    together = [engine.open(each, len(each.keys)) for each in tokens]
    engine.prefill(*((request, len(request.tokens.keys)) for request in together))
    tolerance = 1e-6 if HAS_GPU else 0.0  # whose products depend on the shapes of tiles
    for request, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(request.outputs, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("most_numbers", [64 * 2 * 64, 5 * 64 * 2 * 64, 2**24])
def test_pasts_of_several_requests_are_read_in_pieces(
    monkeypatch: pytest.MonkeyPatch, most_numbers: int
) -> None:
    """Pieces may have blocks of several requests, and requests beside them have none."""
    monkeypatch.setattr(triton_prefill, "_SCRATCH_NUMBERS", most_numbers)
    shape = Shape(2, 1, 32, 32)
    engine = engine_of(shape, (4, 4))
    requests = [engine.open(random_tokens(shape, 330, seed=seed), 300) for seed in (9, 10, 11)]
    engine.prefill((requests[0], 196), (requests[2], 300))
    ends = (300, 132, 330)
    chunks = [chunk for each, end in zip(requests, ends, strict=True) for chunk in engine.chunks(each, end)]
    starts = [request.num_computed for request in requests]
    engine.prefill(*zip(requests, ends, strict=True))
    parts = [each.tokens.part(*span) for each, *span in zip(requests, starts, ends, strict=True)]
    expected = attend_again(engine, chunks, Tokens(*map(torch.cat, zip(*parts, strict=True))))
    spans = zip(requests, starts, ends, strict=True)
    outputs = torch.cat([each.outputs[0, start:end] for each, start, end in spans])
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


def test_many_requests_take_as_many_launches_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    num_launches = []
    launch = triton_prefill._launch
    monkeypatch.setattr(
        triton_prefill, "_launch", lambda *args, **kwargs: (num_launches.append(1), launch(*args, **kwargs))
    )
    shape = Shape(1, 1, 16, 16)
    for count in (1, 3):
        engine = engine_of(shape, (4, 4))
        requests = [engine.open(random_tokens(shape, 140, seed=seed), 140) for seed in range(count)]
        engine.prefill(*((request, 140) for request in requests))
    assert len(num_launches) == 2 * 2


def test_a_prompt_goes_on_from_what_another_has_left() -> None:
    shape = Shape(1, 2, 32, 32)
    tokens = random_tokens(shape, 300, seed=5)
    codec = make_codec((4, 4), shape)
    layers = [Layer(codec, FULL, AttentionOptions(0.2))]
    engine = Engine(shape, layers, SMALL, caches_prefixes=True, device=DEVICE)
    engine.store.uses_kernels = True
    first = engine.open(tokens, 300)
    engine.prefill((first, 300))
    second = engine.open(tokens, 300)
    start = second.num_computed
    assert start > 64
    engine.prefill((second, 300))
    torch.testing.assert_close(second.outputs[:, start:], first.outputs[:, start:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [Shape(1, 2, 128, 128), Shape(1, 2, 256, 64), Shape(2, 1, 16, 16)], ids=str)
def test_outputs_have_the_error_of_the_models_arithmetic(shape: Shape, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not HAS_GPU:
        pytest.skip("the interpreter has no products in bfloat16")
    engine = engine_of(shape, (4, 4), dtype=dtype)
    tokens = random_tokens(shape, 140, seed=6, dtype=dtype)
    compute(engine, engine.open(tokens, 140), 140, tolerance=4 * torch.finfo(dtype).eps)


def test_what_is_found_elsewhere_is_added_by_its_weight() -> None:
    numbers = torch.Generator().manual_seed(12)
    parts = [torch.randn(37, 3, 24, generator=numbers) for _ in range(2)]
    weights = [3 * torch.randn(37, 3, generator=numbers) for _ in range(2)]
    found = Found(parts[0].clone().to(DEVICE), weights[0].clone().to(DEVICE))
    others = parts[1].transpose(0, 1).contiguous(), (weights[1].T * math.log(2)).contiguous()
    add_found(found, *(each.to(DEVICE) for each in others))
    shares = torch.stack(weights).double().mul(math.log(2)).softmax(0)
    expected = sum(part.double() * share[..., None] for part, share in zip(parts, shares, strict=True))
    torch.testing.assert_close(found.averages.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    total = torch.logaddexp2(*(each.double() for each in weights))
    torch.testing.assert_close(found.weights.cpu().double(), total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [(4, 3), None])
def test_due_blocks_of_all_layers_are_made_of_their_oldest_tokens(bits: tuple[int, int] | None) -> None:
    shape = Shape(2, 1, 32, 16)
    layers = [
        Layer(make_codec(bits, shape), visibility, AttentionOptions(0.2))
        for visibility in (FULL, FULL, WINDOWS[1])
    ]
    engine = Engine(shape, layers, device=DEVICE)
    requests = [engine.open(random_tokens(shape, 196, seed=seed), 100) for seed in (7, 8)]
    engine.prefill(*((request, 100) for request in requests))
    for layer in range(3):  # so that tokens are not the same in all
        for states in engine.store.exact[layer]:
            states.mul_(1 + layer)
    engine.store.uses_kernels = False
    engine.decode_all(*requests)
    chunks = [Chunk(request.cache, 195, 196, 100) for request in requests]
    ids = []
    for index in range(3):
        due = due_blocks(chunks, engine.store.layers[index].group, SMALL)
        ids.append([block_id for _, block_id, _ in due])
        assert len(ids[index]) == 2
    expected = []
    for index, layer in enumerate(layers):
        slots = [request.cache.slot for request in requests]
        tokens = [exact[slots, :, 68 : 68 + 64].transpose(0, 1) for exact in engine.store.exact[index]]
        expected.append(layer.codec.encode(*tokens).transpose(0, 1))
    for uses_kernels in (False, True):
        engine.store.uses_kernels = uses_kernels
        before = [engine.store.records[index].clone() for index in range(3)]
        engine.store.warm_up()
        assert all(torch.equal(engine.store.records[index], before[index]) for index in range(3))
        for index in range(3):
            engine.store.records[index][ids[index]] = 255
        engine.store.make_due_blocks(chunks)
        for index in range(3):
            made = engine.store.records[index][ids[index]]
            assert (made == expected[index]).double().mean() > 0.99
