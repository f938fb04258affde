"""Decode attention on a GPU, in CUDA and in Triton, equals float64 on the same bytes.

More than 300 lines, as one way to make cases serves all tests.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from turboquant_core import KEY_SCALE, VALUE_SCALE, BlockCodec, BlockQuantizer, Timeline
from turboquant_core.exact_codec import ExactCodec
from turboquant_core.reference import AttentionOptions, Codec
from turboquant_core.step_plan import DecodeTables
from turboquant_core.transform import Transform

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda")
TIMELINE = Timeline()
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "10"))
# Of the output's type, in which it is rounded last: relative error in the Frobenius norm.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


@dataclass(frozen=True)
class Case:
    """One step of some requests over random blocks."""

    queries: Tensor
    new: tuple[Tensor, Tensor]
    exact: tuple[Tensor, Tensor]
    records: Tensor
    tables: DecodeTables
    codec: Codec

    def run(self, kernel: str, options: AttentionOptions) -> Tensor:
        exact = self.exact[0].clone(), self.exact[1].clone()
        if kernel == "triton":
            assert isinstance(self.codec, BlockCodec)
            from turboquant_core.kernels.triton_decode import decode as triton_decode

            for held, states in zip(exact, self.new, strict=True):
                for row, position in enumerate(self.tables.positions.tolist()):
                    held[self.tables.slots[row], :, TIMELINE.exact_index(position)] = states[row]
            return triton_decode(
                self.queries, exact, self.records, self.tables, TIMELINE, self.codec, options
            )
        from turboquant_core.kernels.decode import decode

        outputs = decode(
            self.queries, self.new, exact, self.records, self.tables, TIMELINE, self.codec, options
        )
        assert outputs is not None
        return outputs

    def expected(self, options: AttentionOptions) -> Tensor:
        """Attend in float64 to what the records hold."""
        rows = []
        num_kv_heads = self.records.shape[1]
        for row, position in enumerate(self.tables.positions.tolist()):
            ids = self.tables.block_tables[row, : int(self.tables.num_blocks[row])].long()
            stored = self.codec.decode(self.records[ids].transpose(0, 1))
            start, exact_start = int(self.tables.block_starts[row]), int(self.tables.exact_starts[row])
            exact = [
                *range(min(TIMELINE.num_sinks, position + 1)),
                *range(max(TIMELINE.num_sinks, exact_start), position + 1),
            ]
            positions = torch.tensor([*range(start, start + 64 * len(ids)), *exact], device=DEVICE)
            parts = []
            for held, new, blocks in zip(self.exact, self.new, stored, strict=True):
                slot = held[int(self.tables.slots[row])].clone()
                slot[:, TIMELINE.exact_index(position)] = new[row]
                places = [TIMELINE.exact_index(each) for each in exact]
                parts.append(torch.cat([blocks.flatten(1, 2).double(), slot[:, places].double()], 1))
            keys, values = parts
            grouped = self.queries[row].double().unflatten(0, (num_kv_heads, -1))
            scores = grouped @ keys.mT * options.softmax_scale
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            scores = scores.masked_fill(positions < int(self.tables.first_visible[row]), -math.inf)
            if options.sink_scores is not None:
                sinks = options.sink_scores.double().view(num_kv_heads, -1, 1)
                scores = torch.cat([scores, sinks], -1)
                values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
            rows.append((scores.softmax(-1) @ values).flatten(0, 1))
        return torch.stack(rows)


def make_case(
    positions: Sequence[int],
    *,
    num_kv_heads: int = 2,
    group_size: int = 4,
    dims: tuple[int, int] = (128, 128),
    bits: tuple[int, int] | None = (4, 4),
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    has_transforms: bool = True,
    size: float = 1.0,
    seed: int = 0,
) -> Case:
    """Draw a case: `size` is that of keys and values; without `bits` blocks are not compressed."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    def transform(dim: int) -> Transform | None:
        if not has_transforms:
            return None
        matrix = torch.linalg.qr(draw(num_kv_heads, dim, dim))[0] * torch.linspace(0.5, 2, dim, device=DEVICE)
        return Transform(matrix, torch.linalg.inv(matrix.double()).float())

    codec: Codec = ExactCodec(*dims, dtype)
    if bits is not None:
        quantizers = [
            BlockQuantizer(dim, width, scale=scale, transform=transform(dim))
            for dim, width, scale in zip(dims, bits, (KEY_SCALE, VALUE_SCALE), strict=True)
        ]
        codec = BlockCodec(*quantizers)
    first_visible = [max(0, position + 1 - window) if window else 0 for position in positions]
    num_held = [max(0, p - TIMELINE.num_sinks - TIMELINE.residual_length) // 64 for p in positions]
    skipped = [
        min(held, max(0, first - TIMELINE.num_sinks) // 64)
        for held, first in zip(num_held, first_visible, strict=True)
    ]
    counts = [held - skip for held, skip in zip(num_held, skipped, strict=True)]
    total = sum(counts)
    blocks = [size * (draw(num_kv_heads, total, 64, d) + draw(num_kv_heads, 1, 1, d)) for d in dims]
    encoded = codec.encode(*blocks).transpose(0, 1)
    # All other records, and what tables do not name, are poison.
    records = torch.full((total + 5, *encoded.shape[1:]), 255, dtype=torch.uint8, device=DEVICE)
    ids = torch.randperm(total + 5, generator=generator, device=DEVICE)[:total]
    records[ids] = encoded
    tables = torch.full((len(positions), max(1, *counts) + 3), 2**30, dtype=torch.int32, device=DEVICE)
    ends = list(itertools.accumulate(counts))
    for row, (count, end) in enumerate(zip(counts, ends, strict=True)):
        tables[row, :count] = ids[end - count : end]
    num_slots = len(positions) + 3
    exact = [size * draw(num_slots, num_kv_heads, TIMELINE.num_exact, d) for d in dims]

    def integers(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)

    return Case(
        queries=draw(len(positions), num_kv_heads * group_size, dims[0]).to(dtype),
        new=(
            (size * draw(len(positions), num_kv_heads, dims[0])).to(dtype),
            (size * draw(len(positions), num_kv_heads, dims[1])).to(dtype),
        ),
        exact=(exact[0].to(dtype), exact[1].to(dtype)),
        records=records,
        tables=DecodeTables(
            slots=torch.randperm(num_slots, generator=generator, device=DEVICE)[: len(positions)].int(),
            positions=integers(positions),
            exact_starts=integers([TIMELINE.num_sinks + 64 * held for held in num_held]),
            first_visible=integers(first_visible),
            block_tables=tables,
            block_starts=integers([TIMELINE.num_sinks + 64 * skip for skip in skipped]),
            num_blocks=integers(counts),
            counts_before=integers([[*range(len(counts) + 1)], [0, *itertools.accumulate(counts)]]),
            has_free_rows=False,
        ),
        codec=codec,
    )


def assert_is_close(output: Tensor, expected: Tensor) -> None:
    """Each request's output is."""
    errors = (output.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert (errors < TOLERANCE[output.dtype]).all(), errors


def assert_is_right(case: Case, kernel: str = "cuda", options: AttentionOptions | None = None) -> None:
    options = options or AttentionOptions(case.queries.shape[-1] ** -0.5)
    assert_is_close(case.run(kernel, options), case.expected(options))


RAGGED = [8, 0, 3, 130, 131, 132, 195, 196, 197, 260, 700, 3031]


@pytest.mark.parametrize("kernel", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ragged_lengths(dtype: torch.dtype, kernel: str) -> None:
    assert_is_right(make_case(RAGGED, dtype=dtype, num_kv_heads=8), kernel)


@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (8, 8), (4, 3), (8, 2)], ids=str)
def test_widths_of_codes(bits: tuple[int, int]) -> None:
    assert_is_right(make_case([3000, 500, 1500], bits=bits))


@pytest.mark.parametrize(
    ("group_size", "dim"),
    [(1, 64), (7, 64), (2, 128), (8, 128), (16, 128), (8, 256), (3, 80), (5, 96), (12, 16)],
)
def test_groups_and_dims(group_size: int, dim: int) -> None:
    assert_is_right(make_case([3000, 500, 1500], group_size=group_size, dims=(dim, dim)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("group_size", "dims"),
    [(4, (128, 128)), (1, (64, 64)), (7, (64, 64)), (16, (128, 128)), (8, (256, 256)), (2, (192, 128))],
)
def test_blocks_that_are_not_compressed(group_size: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    assert_is_right(make_case(RAGGED, group_size=group_size, dims=dims, bits=None, dtype=dtype))
    assert_is_right(
        make_case([3000, 500, 100], dims=dims, group_size=group_size, bits=None, dtype=dtype, window=300)
    )


def test_keys_and_values_of_different_dims() -> None:
    assert_is_right(make_case([3000, 500], dims=(192, 128)))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("position", [0, 130, 131, 200, 3031, 40_000])
def test_one_request(position: int, num_kv_heads: int) -> None:
    assert_is_right(make_case([position], num_kv_heads=num_kv_heads))


@pytest.mark.parametrize(
    ("group_size", "dims", "bits"),
    [
        (1, (64, 64), (4, 4)),
        (7, (64, 64), (8, 4)),
        (8, (128, 128), (4, 4)),
        (16, (128, 128), (4, 3)),
        (8, (256, 256), (4, 4)),
        (3, (80, 80), (2, 2)),
        (4, (192, 128), (3, 3)),
        (12, (16, 16), (3, 8)),
    ],
)
def test_one_request_of_other_shapes(group_size: int, dims: tuple[int, int], bits: tuple[int, int]) -> None:
    for position, window in ((10, None), (900, None), (9000, None), (9000, 700)):
        assert_is_right(make_case([position], group_size=group_size, dims=dims, bits=bits, window=window))


@pytest.mark.parametrize("kernel", ["cuda", "triton"])
@pytest.mark.parametrize("window", [1, 100, 512])
def test_windows(window: int, kernel: str) -> None:
    assert_is_right(make_case([3000, 500, 1500, 100], window=window, group_size=8), kernel)


@pytest.mark.parametrize("kernel", ["cuda", "triton"])
def test_softcap_and_sink_scores(kernel: str) -> None:
    case = make_case([3000, 500, 10])
    sinks = torch.linspace(-3, 8, case.queries.shape[1], device=DEVICE)
    assert_is_right(case, kernel, AttentionOptions(0.3, softcap=20.0))
    assert_is_right(case, kernel, AttentionOptions(0.1, sink_scores=sinks))


@pytest.mark.parametrize("size", [1e-6, 1e-3, 30.0, 3000.0])
def test_sizes_that_are_far_from_1(size: float) -> None:
    case = make_case([3000, 500], size=size)
    assert_is_right(case, options=AttentionOptions(0.09 / size))


def test_sharp_and_flat_scores() -> None:
    case = make_case([3000, 500])
    assert_is_right(case, options=AttentionOptions(5.0))
    assert_is_right(case, options=AttentionOptions(1e-6))


def test_large_batches_and_long_requests() -> None:
    assert_is_right(make_case([(97 * i) % 2100 for i in range(200)], num_kv_heads=4, seed=1))
    assert_is_right(make_case([40_000, 17], num_kv_heads=8, seed=2))


@pytest.mark.parametrize(
    ("group_size", "dims", "bits"),
    [
        (3, (128, 128), (4, 4)),
        (5, (96, 96), (4, 4)),
        (7, (64, 64), (4, 4)),
        (1, (64, 16), (4, 4)),
        (2, (16, 256), (8, 2)),
        (4, (64, 128), (2, 2)),
        (16, (128, 128), (8, 8)),
        (7, (128, 128), None),
    ],
)
def test_many_requests_that_do_not_fill_the_last_thread_block(
    group_size: int, dims: tuple[int, int], bits: tuple[int, int] | None
) -> None:
    positions = [(397 * i) % 1500 for i in range(37)]
    assert_is_right(make_case(positions, num_kv_heads=8, group_size=group_size, dims=dims, bits=bits))
    assert_is_right(make_case(positions[:3], num_kv_heads=1, group_size=group_size, dims=dims, bits=bits))


def test_many_steps_one_after_another_give_the_same() -> None:
    """The ring of copies goes round many times, and warps overtake each other in any order."""
    case = make_case([32_000] * 4, num_kv_heads=8)
    options = AttentionOptions(128**-0.5)
    first = case.run("cuda", options)
    assert_is_right(case)
    for _ in range(200):
        torch.testing.assert_close(case.run("cuda", options), first, rtol=0.02, atol=1e-3)


def test_new_tokens_are_kept_only_if_they_are_given() -> None:
    from turboquant_core.kernels.decode import decode

    case = make_case([900, 5])
    options = AttentionOptions(128**-0.5)
    arguments = (case.records, case.tables, TIMELINE, case.codec, options)
    first = decode(case.queries, case.new, case.exact, *arguments)
    assert first is not None
    for row, position in enumerate([900, 5]):
        for held, states in zip(case.exact, case.new, strict=True):
            kept = held[int(case.tables.slots[row]), :, TIMELINE.exact_index(position)]
            assert torch.equal(kept, states[row])
    before = case.exact[0].clone()
    second = decode(case.queries, None, case.exact, *arguments)
    assert second is not None and torch.equal(second, first)
    assert torch.equal(case.exact[0], before)


def test_a_step_runs_in_a_graph_with_tables_that_change() -> None:
    case, other = (make_case([900, 2000, 70], seed=seed) for seed in (3, 4))
    tables = replace(case.tables, block_tables=case.tables.block_tables.clone())
    case = replace(case, tables=tables)
    options = AttentionOptions(128**-0.5)
    case.run("cuda", options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = case.run("cuda", options)
    case.records.copy_(other.records)
    case.tables.block_tables.copy_(other.tables.block_tables)
    changed = replace(case, codec=case.codec)
    graph.replay()
    assert_is_close(output, changed.expected(options))


def test_random_cases() -> None:
    """As many as there is time for, of shapes that are compiled already."""
    draw = random.Random(0)
    end = time.monotonic() + FUZZ_SECONDS
    shapes = [(4, 128, (4, 4)), (4, 128, (3, 3)), (8, 128, (4, 4)), (1, 64, (4, 4)), (16, 128, (4, 4))]
    number = 0
    while time.monotonic() < end:
        number += 1
        group_size, dim, bits = draw.choice(shapes)
        positions = [int(10 ** draw.uniform(0, 3.7)) for _ in range(draw.choice((1, 2, 5, 40)))]
        size = 10 ** draw.uniform(-3, 2)
        case = make_case(
            positions,
            num_kv_heads=draw.choice((1, 2, 3, 8)),
            group_size=group_size,
            dims=(dim, dim),
            bits=bits,
            window=draw.choice((None, None, 64, 700)),
            has_transforms=draw.random() < 0.7,
            size=size,
            seed=number,
        )
        assert_is_right(case, options=AttentionOptions(10 ** draw.uniform(-2, 0.3) * dim**-0.5 / size))
    assert number > 20


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("num_kv_heads", "num_rows"), [(2, 7), (2, 40), (8, 200)])
def test_rows_without_a_request_change_nothing(num_kv_heads: int, num_rows: int, has_sinks: bool) -> None:
    """Each number of rows is merged by a kernel of its own."""
    from turboquant_core.kernels.decode import decode

    positions = [900, 2000, 70]
    case = make_case(positions, num_kv_heads=num_kv_heads)
    num_free = num_rows - len(positions)
    sinks = torch.linspace(-3, 8, case.queries.shape[1], device=DEVICE) if has_sinks else None
    options = AttentionOptions(128**-0.5, sink_scores=sinks)
    numbers = {
        name: torch.cat([value, torch.zeros(num_free, dtype=torch.int32, device=DEVICE)])
        for name, value in vars(case.tables).items()
        if isinstance(value, Tensor) and value.dim() == 1
    }
    numbers["slots"][len(positions) :] = -1
    ends = case.tables.counts_before
    rows = torch.arange(num_rows, device=DEVICE) % len(positions)
    tables = replace(
        case.tables,
        **numbers,
        block_tables=case.tables.block_tables[rows],
        counts_before=torch.cat([ends, ends[:, -1:].expand(2, num_free)], dim=1),
        has_free_rows=True,
    )
    before = case.exact[0].clone(), case.exact[1].clone()
    new = case.new[0][rows], case.new[1][rows]
    outputs = decode(case.queries[rows], new, case.exact, case.records, tables, TIMELINE, case.codec, options)
    assert outputs is not None
    assert_is_close(outputs[: len(positions)], replace(case, exact=before).expected(options))
    assert (outputs[len(positions) :] == 0).all()
    slots = case.tables.slots.long()
    others = [slot for slot in range(len(before[0])) if slot not in slots.tolist()]
    for held, old in zip(case.exact, before, strict=True):
        assert torch.equal(held[others], old[others])
