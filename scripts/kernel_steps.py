"""Steps of random requests in one layer, for measuring decode attention. Knows no clock."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from turboquant_core import KEY_SCALE, VALUE_SCALE, BlockCodec, BlockQuantizer, ExactCodec, Timeline
from turboquant_core.kernels.decode import decode
from turboquant_core.reference import AttentionOptions, Codec
from turboquant_core.step_plan import DecodeTables

TIMELINE = Timeline()
MEAN_RESIDUAL = 160  # of 128 to 191 exact tokens
NUM_DISTINCT = 64  # blocks that are encoded; records repeat them
L2_BYTES = 200 << 20  # more than any device's
BFLOAT16 = 16  # bits: blocks are not compressed


@dataclass(frozen=True)
class Shape:
    """Requests of the same length in one layer."""

    batch: int
    context: int
    num_kv_heads: int = 8
    group_size: int = 4
    dim: int = 128
    bits: int = 4
    is_ragged: bool = False

    @property
    def positions(self) -> list[int]:
        """Of the new tokens; ragged ones from half to one and a half of the context."""
        factors = [0.5 + i / max(1, self.batch - 1) if self.is_ragged else 1 for i in range(self.batch)]
        exact = MEAN_RESIDUAL + TIMELINE.num_sinks
        return [int(self.context * factor) // 64 * 64 + exact for factor in factors]


@dataclass
class Step:
    """Random requests of a shape."""

    shape: Shape
    codec: Codec
    queries: Tensor
    new: tuple[Tensor, Tensor]
    exact: tuple[Tensor, Tensor]
    records: Tensor
    tables: DecodeTables

    @property
    def num_bytes(self) -> int:
        """Bytes that a step reads."""
        exact_tokens = self.shape.batch * (MEAN_RESIDUAL + 1 + TIMELINE.num_sinks)
        exact_bytes = exact_tokens * self.shape.num_kv_heads * 2 * self.shape.dim * 2
        return int(self.tables.num_blocks.sum()) * self.records[0].numel() + exact_bytes

    def run(self) -> Tensor:
        options = AttentionOptions(self.shape.dim**-0.5)
        output = decode(
            self.queries, self.new, self.exact, self.records, self.tables, TIMELINE, self.codec, options
        )
        assert output is not None
        return output

    def error(self) -> float:
        """Return the first request's relative error."""
        output = self.run()[0].double()
        ids = self.tables.block_tables[0, : int(self.tables.num_blocks[0])].long()
        position = int(self.tables.positions[0])
        exact = [*range(TIMELINE.num_sinks), *range(int(self.tables.exact_starts[0]), position + 1)]
        places = [TIMELINE.exact_index(each) for each in exact]
        keys, values = (
            torch.cat([stored.flatten(1, 2).double(), held[int(self.tables.slots[0])][:, places].double()], 1)
            for stored, held in zip(
                self.codec.decode(self.records[ids].transpose(0, 1)), self.exact, strict=True
            )
        )
        grouped = self.queries[0].double().unflatten(0, (self.shape.num_kv_heads, -1))
        weights = (grouped @ keys.mT * self.shape.dim**-0.5).softmax(-1)
        expected = (weights @ values).flatten(0, 1)
        return float((output - expected).norm() / expected.norm())


def make_step(shape: Shape, seed: int) -> Step:
    """Draw a step."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    codec: Codec = ExactCodec(shape.dim, shape.dim, torch.bfloat16)
    if shape.bits != BFLOAT16:
        codec = BlockCodec(
            BlockQuantizer(shape.dim, shape.bits, scale=KEY_SCALE),
            BlockQuantizer(shape.dim, shape.bits, scale=VALUE_SCALE),
        )
    counts = [(p - TIMELINE.num_sinks - TIMELINE.residual_length) // 64 for p in shape.positions]
    distinct = codec.encode(*(draw(shape.num_kv_heads, NUM_DISTINCT, 64, shape.dim) for _ in range(2)))
    total = sum(counts)
    records = distinct.transpose(0, 1)[torch.arange(total, device=device) % NUM_DISTINCT].contiguous()
    block_tables = torch.zeros(shape.batch, max(counts), dtype=torch.int32, device=device)
    order = torch.randperm(total, generator=generator, device=device).int()
    start = 0
    for row, count in enumerate(counts):
        block_tables[row, :count] = order[start : start + count]
        start += count

    def integers(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    def heads(*sizes: int) -> tuple[Tensor, Tensor]:
        return draw(*sizes, shape.dim).bfloat16(), draw(*sizes, shape.dim).bfloat16()

    return Step(
        shape,
        codec,
        queries=draw(shape.batch, shape.num_kv_heads * shape.group_size, shape.dim).bfloat16(),
        new=heads(shape.batch, shape.num_kv_heads),
        exact=heads(shape.batch, shape.num_kv_heads, TIMELINE.num_exact),
        records=records,
        tables=DecodeTables(
            slots=torch.arange(shape.batch, dtype=torch.int32, device=device),
            positions=integers(shape.positions),
            exact_starts=integers([TIMELINE.num_sinks + 64 * count for count in counts]),
            first_visible=integers([0] * shape.batch),
            block_tables=block_tables,
            block_starts=integers([TIMELINE.num_sinks] * shape.batch),
            num_blocks=integers(counts),
            counts_before=integers([[*range(shape.batch + 1)], [0, *accumulate(counts)]]),
            has_free_rows=False,
        ),
    )


def make_steps(shape: Shape) -> list[Step]:
    """Return steps that do not fit into a cache together."""
    first = make_step(shape, 0)
    return [first, *(make_step(shape, seed) for seed in range(1, 1 + min(15, L2_BYTES // first.num_bytes)))]
