"""The Triton kernels attend as the reference does, on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from paged_requests import FULL, SMALL, Shape, generator, make_codec, plan_of, random_tokens
from torch import Tensor
from triton_device import DEVICE, HAS_GPU

from turboquant_core.block_codec import BlockCodec
from turboquant_core.block_quantizer import KEY_SCALE, VALUE_SCALE, BlockQuantizer
from turboquant_core.kernels import triton_attend, triton_decode
from turboquant_core.kernels.triton_decode import decode
from turboquant_core.reference import AttentionOptions, decode_attention
from turboquant_core.request_cache import CacheManager, Visibility
from turboquant_core.step_plan import Chunk, DecodeTables
from turboquant_core.timeline import Timeline

NUM_BLOCKS = 40

pytestmark = pytest.mark.usefixtures("loops_in_the_interpreter")


@dataclass
class Batch:
    """What requests have been given, and the arguments of the kernels; what nothing shows is NaN."""

    chunks: list[Chunk]
    timeline: Timeline
    visibility: Visibility
    codec: BlockCodec
    options: AttentionOptions
    queries: Tensor
    exact: tuple[Tensor, Tensor]
    records: Tensor

    def expected(self) -> Tensor:
        plan = plan_of(self.chunks, self.visibility, self.timeline)
        queries = self.queries.cpu().float()
        exact = tuple(states.cpu()[plan.slots].float().nan_to_num(nan=9.0) for states in self.exact)
        options = self.options
        if options.sink_scores is not None:
            options = replace(options, sink_scores=options.sink_scores.cpu())
        return decode_attention(queries, exact, self.records.cpu(), plan, self.codec, options)

    def tables(self, rows: list[int] | None = None) -> DecodeTables:
        chunks = self.chunks if rows is None else [self.chunks[row] for row in rows]
        return plan_of(chunks, self.visibility, self.timeline, DEVICE).tables

    def decode(self, rows: list[int] | None = None) -> Tensor:
        queries = self.queries if rows is None else self.queries[rows]
        return decode(
            queries,
            self.exact,
            self.records,
            self.tables(rows),
            self.timeline,
            self.codec,
            self.options,
        )


def make_batch(
    shape: Shape,
    lengths: list[int],
    codec: BlockCodec,
    *,
    dtype: torch.dtype = torch.float32,
    timeline: Timeline = SMALL,
    visibility: Visibility = FULL,
    softcap: float | None = None,
    has_sinks: bool = False,
    query_size: float = 1.0,
    key_size: float = 1.0,
    value_size: float = 1.0,
    num_blocks: int = NUM_BLOCKS,
) -> Batch:
    """Return requests that have so many tokens before the new one, half of them a prompt."""
    manager = CacheManager(timeline, [visibility], [num_blocks], len(lengths) + 1, caches_prefixes=False)
    chunks = []
    for length in lengths:
        num_prompt_tokens = max(1, length // 2)
        cache = manager.open([0] * max(length, 1), num_prompt_tokens)
        assert cache is not None
        assert cache.extend(0, length)
        assert cache.extend(length, length + 1)
        chunks.append(Chunk(cache, length, length + 1, num_prompt_tokens))
    plan = plan_of(chunks, visibility, timeline)

    num_ids = len(plan.block_ids)
    tokens = random_tokens(shape, max(1, 64 * num_ids), 1)
    exact_tokens = random_tokens(shape, len(lengths) * timeline.num_exact, 2)
    records = torch.full((num_blocks, shape.num_kv_heads, codec.record_bytes), 255, dtype=torch.uint8)
    if num_ids:
        keys, values = (
            size * states.unflatten(0, (num_ids, 64)).permute(2, 0, 1, 3)
            for size, states in ((key_size, tokens.keys), (value_size, tokens.values))
        )
        records[plan.block_ids] = codec.encode(keys, values).transpose(0, 1)
    exact = []
    for size, states in ((key_size, exact_tokens.keys), (value_size, exact_tokens.values)):
        held = torch.full(
            (len(lengths) + 1, shape.num_kv_heads, timeline.num_exact, states.shape[-1]), torch.nan
        )
        seen = size * states.unflatten(0, (len(lengths), -1)).transpose(1, 2)
        held[plan.slots] = seen.where(plan.exact_mask[:, None, :, None], torch.nan)
        exact.append(held.to(DEVICE, dtype))
    queries = query_size * random_tokens(shape, len(lengths), 3).queries
    sinks = torch.randn(queries.shape[1], generator=generator(4)).to(DEVICE) if has_sinks else None
    return Batch(
        chunks,
        timeline,
        visibility,
        codec,
        AttentionOptions(shape.key_dim**-0.5 / (query_size * key_size), softcap, sinks),
        queries.to(DEVICE, dtype),
        (exact[0], exact[1]),
        records.to(DEVICE),
    )


def relative_error(outputs: Tensor, expected: Tensor) -> float:
    return float((outputs.cpu().float() - expected).norm() / expected.norm())


def block_codec(bits: tuple[int, int], shape: Shape) -> BlockCodec:
    codec = make_codec(bits, shape)
    assert isinstance(codec, BlockCodec)
    return codec


@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        ((2, 2), Shape(2, 4, 64, 64)),
        ((3, 3), Shape(2, 1, 80, 80)),
        ((4, 4), Shape(1, 7, 128, 128)),
        ((8, 8), Shape(1, 16, 64, 64)),
        ((4, 2), Shape(2, 1, 128, 16)),
        ((2, 4), Shape(2, 4, 16, 80)),
        ((3, 8), Shape(1, 4, 16, 128)),
        ((8, 3), Shape(1, 7, 24, 40)),
        ((4, 3), Shape(1, 16, 80, 24)),
        ((3, 2), Shape(2, 1, 16, 16)),
        ((4, 8), Shape(1, 4, 256, 64)),
        ((2, 3), Shape(1, 1, 192, 256)),
    ],
)
def test_outputs_are_those_of_the_reference(bits: tuple[int, int], shape: Shape) -> None:
    batch = make_batch(shape, [700, 3, 0, 69, 130], block_codec(bits, shape))
    assert relative_error(batch.decode(), batch.expected()) < 5e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exact_tokens_may_have_16_bits(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not HAS_GPU:
        pytest.skip("the interpreter has no products in bfloat16")
    shape = Shape(2, 4, 64, 64)
    batch = make_batch(shape, [300, 100, 1], block_codec((4, 4), shape), dtype=dtype)
    outputs = batch.decode()
    assert outputs.dtype == dtype
    assert relative_error(outputs, batch.expected()) < (3e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("visibility", [Visibility(window=1), Visibility(window=250), Visibility(chunk=300)])
def test_a_window_hides_tokens_of_blocks_and_of_slots(visibility: Visibility) -> None:
    shape = Shape(1, 4, 16, 64)
    batch = make_batch(shape, [500, 299, 300, 20, 431], block_codec((4, 4), shape), visibility=visibility)
    assert relative_error(batch.decode(), batch.expected()) < 5e-4


@pytest.mark.parametrize("timeline", [Timeline(0, 0, 64), Timeline(6, 64, 64), Timeline(70, 256, 64)])
def test_a_slot_has_any_number_of_sinks_and_newest_tokens(timeline: Timeline) -> None:
    shape = Shape(1, 4, 16, 16)
    batch = make_batch(shape, [900, 400, 65, 64, 5], block_codec((4, 4), shape), timeline=timeline)
    assert relative_error(batch.decode(), batch.expected()) < 5e-4


@pytest.mark.parametrize(("softcap", "has_sinks"), [(3.0, False), (None, True), (50.0, True)])
def test_scores_may_be_capped_and_share_the_softmax_with_sinks(
    softcap: float | None, has_sinks: bool
) -> None:
    shape = Shape(2, 7, 16, 16)
    batch = make_batch(shape, [300, 2, 80], block_codec((4, 4), shape), softcap=softcap, has_sinks=has_sinks)
    assert relative_error(batch.decode(), batch.expected()) < 5e-4


@pytest.mark.parametrize(("query_size", "key_size"), [(1e6, 1e-2), (1e-6, 1e2)])
@pytest.mark.parametrize("value_size", [1e-4, 2e3])
def test_numbers_may_be_of_any_size(query_size: float, key_size: float, value_size: float) -> None:
    shape = Shape(1, 4, 64, 128)
    batch = make_batch(
        shape,
        [300],
        block_codec((4, 4), shape),
        query_size=query_size,
        key_size=key_size,
        value_size=value_size,
    )
    assert relative_error(batch.decode(), batch.expected()) < 5e-4


def test_heads_may_share_a_transform() -> None:
    shape = Shape(2, 4, 80, 64)
    codec = BlockCodec(
        BlockQuantizer(shape.key_dim, 4, scale=KEY_SCALE),
        BlockQuantizer(shape.value_dim, 4, scale=VALUE_SCALE),
    )
    batch = make_batch(shape, [300, 5], codec)
    assert relative_error(batch.decode(), batch.expected()) < 5e-4


def test_long_requests_have_longer_splits_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    most, length = 64, 18000
    if not HAS_GPU:
        most, length = 3, 1300
        for module in (triton_attend, triton_decode):
            monkeypatch.setattr(module, "MAX_SPLITS", triton_decode.tl.constexpr(most))
    shape = Shape(1, 1, 16, 16)
    batch = make_batch(shape, [length], block_codec((2, 2), shape), num_blocks=300)
    assert batch.tables().num_blocks.item() > most * triton_attend.MIN_SPLIT.value
    assert relative_error(batch.decode(), batch.expected()) < 5e-4


def test_a_request_gets_the_same_whatever_runs_beside_it() -> None:
    shape = Shape(2, 4, 16, 16)
    batch = make_batch(shape, [700, 0, 300, 130], block_codec((4, 3), shape))
    together = batch.decode()
    for rows in ([0], [1], [3, 2], [2, 0, 3, 1]):
        assert torch.equal(batch.decode(rows), together[rows])


def test_tables_are_wider_than_what_a_row_has() -> None:
    shape = Shape(1, 4, 16, 16)
    batch = make_batch(shape, [300, 5], block_codec((4, 4), shape))
    narrow = batch.tables()
    wide = torch.full((2, 90), 10**6, dtype=torch.int32, device=DEVICE)
    wide[:, : narrow.block_tables.shape[1]] = narrow.block_tables
    outputs = decode(
        batch.queries,
        batch.exact,
        batch.records,
        replace(narrow, block_tables=wide),
        batch.timeline,
        batch.codec,
        batch.options,
    )
    assert torch.equal(outputs, batch.decode())


def test_numbers_of_tables_are_parts_of_one_tensor() -> None:
    shape = Shape(1, 1, 16, 16)
    tables = make_batch(shape, [300, 5], block_codec((4, 4), shape)).tables()
    parts = [value for value in vars(tables).values() if isinstance(value, Tensor)]
    assert len(parts) == 8
    assert {part.dtype for part in parts} == {torch.int32}
    numbers = [part for part in parts if part.dim() == 1]
    assert len({part.untyped_storage().data_ptr() for part in numbers}) == 1


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_a_graph_replays_with_other_tables() -> None:
    shape = Shape(2, 4, 128, 128)
    batch = make_batch(shape, [700, 130], block_codec((4, 4), shape), dtype=torch.bfloat16)
    tables = batch.tables()

    def run() -> Tensor:
        return decode(
            batch.queries, batch.exact, batch.records, tables, batch.timeline, batch.codec, batch.options
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    graph.replay()
    assert torch.equal(outputs, batch.decode())
    tables.num_blocks -= 1
    tables.exact_starts -= 64
    expected = run()
    graph.replay()
    assert torch.equal(outputs, expected)
