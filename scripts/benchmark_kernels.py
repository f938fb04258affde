#!/usr/bin/env python3
"""Time decode attention on packed codes on this GPU, beside torch's attention on bf16 keys and values.

Times are medians of replays of CUDA graphs, over several caches where one would stay in the L2 cache; they
are those of a layer: all launches of a step, the new tokens' keys and values kept. Bytes are all that has to
be read: records of the blocks and the exact tokens. The ceiling is what a kernel that only reads reaches in
the same run. Errors are relative (Frobenius norm) to float64 on the same bytes; the outputs are bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from turboquant_core import KEY_SCALE, VALUE_SCALE, BlockCodec, BlockQuantizer, Timeline
from turboquant_core.kernels.cuda_kernel import Kernel
from turboquant_core.kernels.decode import decode
from turboquant_core.reference import AttentionOptions
from turboquant_core.step_plan import DecodeTables

TIMELINE = Timeline()
MEAN_RESIDUAL = 160  # of 128 to 191 exact tokens
NUM_DISTINCT = 64  # blocks that are encoded; records repeat them
L2_BYTES = 200 << 20  # more than any device's
REPEATS = 7
# Lengths of rows with ~ differ; "of all": of what a kernel that only reads reaches; x: torch's time / ours.
HEADER = "requests x   |   heads  dim bits |     us      MB  TB/s of all |  torch     x |   error"


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


LLAMA = [Shape(16, 32768), Shape(32, 8192), Shape(64, 4096), Shape(1, 32768), Shape(1, 8192)]
SHAPES = [
    *LLAMA,
    Shape(32, 8192, is_ragged=True),
    *(replace(LLAMA[0], bits=bits) for bits in (3, 2, 8)),
    Shape(32, 8192, num_kv_heads=32, group_size=1, dim=64),  # StableLM-2-1.6B
    Shape(64, 8192, num_kv_heads=2, group_size=7, dim=64),  # Qwen2.5-0.5B
    Shape(64, 8192, num_kv_heads=2, group_size=8),  # Qwen2.5-3B
    Shape(64, 8192, num_kv_heads=4, group_size=7),  # Qwen2.5-7B
    Shape(16, 8192, num_kv_heads=8, group_size=2, dim=256),
    Shape(32, 8192, num_kv_heads=4, group_size=16),
]


@dataclass
class Step:
    """Random requests of a shape."""

    shape: Shape
    codec: BlockCodec
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
        return decode(
            self.queries, self.new, self.exact, self.records, self.tables, TIMELINE, self.codec, options
        )

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
        ),
    )


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Return the median time of a call, by replays of a graph of all of them."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    count = max(len(calls), 10)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / count)
    return statistics.median(times)


def read_ceiling() -> float:
    """Return the bytes per second of a kernel that only reads 1 GiB."""
    data = torch.randint(0, 2**31 - 1, (1 << 28,), dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    kernel = Kernel("read", "read", {}, data.device, 512)
    num_sms = torch.cuda.get_device_properties(data.device).multi_processor_count
    times = [
        microseconds([lambda grid=num_sms * factor: kernel.launch((grid,), data, sink, data.numel() // 4)])
        for factor in (2, 4, 8, 16)
    ]
    return data.nbytes / min(times) * 1e6


def torch_microseconds(shape: Shape) -> float | None:
    """Return the time of torch's attention over bf16 keys and values; None for lengths that differ."""
    if shape.is_ragged:
        return None
    length = shape.positions[0] + 1
    num_bytes = 4 * shape.batch * shape.num_kv_heads * length * shape.dim
    queries = torch.randn(shape.batch, shape.num_kv_heads * shape.group_size, 1, shape.dim, device="cuda")
    queries = queries.bfloat16()
    sizes = (shape.batch, shape.num_kv_heads, length, shape.dim)
    pairs = [
        [torch.randn(sizes, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        for _ in range(1 + L2_BYTES // num_bytes if num_bytes < L2_BYTES else 1)
    ]
    attend = torch.nn.functional.scaled_dot_product_attention
    return microseconds([lambda k=k, v=v: attend(queries, k, v, enable_gqa=True) for k, v in pairs])


def measure(shape: Shape, ceiling: float) -> dict[str, Any]:
    """Return one row of the table."""
    first = make_step(shape, 0)
    steps = [first, *(make_step(shape, seed) for seed in range(1, 1 + min(15, L2_BYTES // first.num_bytes)))]
    time = microseconds([step.run for step in steps])
    error = first.error()
    num_bytes = first.num_bytes
    del first, steps
    torch_time = torch_microseconds(shape)
    return asdict(shape) | {
        "us": time,
        "bytes": num_bytes,
        "tb_per_s": num_bytes / time / 1e6,
        "share_of_ceiling": num_bytes / time * 1e6 / ceiling,
        "error": error,
        "torch_us": torch_time,
    }


def format_row(shape: Shape, row: dict[str, Any]) -> str:
    torch_time = row["torch_us"]
    return " | ".join(
        (
            f"{shape.batch:4} x {shape.context:5}{'~' if shape.is_ragged else ' '}",
            f"{shape.num_kv_heads * shape.group_size:4}/{shape.num_kv_heads:<2} {shape.dim:4} {shape.bits:4}",
            f"{row['us']:6.1f} {row['bytes'] / 1e6:7.1f} {row['tb_per_s']:5.2f} "
            f"{row['share_of_ceiling']:6.1%}",
            f"{torch_time:6.1f} {torch_time / row['us']:5.2f}" if torch_time else 12 * " ",
            f"{row['error']:.1e}",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only the shapes of Llama-3.1-8B at 4 bits")
    parser.add_argument("--output", type=Path, help="a file for the JSON that is also the last line")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    ceiling = read_ceiling()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}; reading alone: {ceiling / 1e12:.2f} TB/s")
    print(HEADER)
    rows = []
    for shape in LLAMA if arguments.quick else SHAPES:
        rows.append(measure(shape, ceiling))
        print(format_row(shape, rows[-1]), flush=True)
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "ceiling_tb_per_s": ceiling / 1e12,
        "rows": rows,
    }
    text = json.dumps(result)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
