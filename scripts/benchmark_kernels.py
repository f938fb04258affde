#!/usr/bin/env python3
"""Time decode attention on packed codes on this GPU, beside our own and torch's on bf16 keys and values.

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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conditions import conditions
from kernel_steps import BFLOAT16, L2_BYTES, Shape, make_steps

from turboquant_core.kernels.cuda_kernel import Kernel

REPEATS = 7
# Lengths of rows with ~ differ; 16 bits are blocks in bf16; "of all": of what a kernel that only reads
# reaches; x: how many times as long our kernel takes for blocks in bf16, and torch's attention over bf16.
HEADER = " | ".join(
    (
        "requests x  ",
        "  heads  dim bits",
        "    us      MB  TB/s of all",
        "  bf16     x",
        " torch     x",
        "  error",
    )
)


LLAMA = [Shape(16, 32768), Shape(32, 8192), Shape(64, 4096), Shape(1, 32768), Shape(1, 8192)]
SHAPES = [
    *LLAMA,
    *(replace(shape, bits=BFLOAT16) for shape in LLAMA[:3]),
    Shape(32, 8192, is_ragged=True),
    *(replace(LLAMA[0], bits=bits) for bits in (3, 2, 8)),
    Shape(32, 8192, num_kv_heads=32, group_size=1, dim=64),  # StableLM-2-1.6B
    Shape(64, 8192, num_kv_heads=2, group_size=7, dim=64),  # Qwen2.5-0.5B
    Shape(64, 8192, num_kv_heads=2, group_size=8),  # Qwen2.5-3B
    Shape(64, 8192, num_kv_heads=4, group_size=7),  # Qwen2.5-7B
    Shape(16, 8192, num_kv_heads=8, group_size=2, dim=256),
    Shape(32, 8192, num_kv_heads=4, group_size=16),
]


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
    steps = make_steps(shape)
    time = microseconds([step.run for step in steps])
    error = steps[0].error()
    num_bytes = steps[0].num_bytes
    del steps
    torch_time = torch_microseconds(shape)
    plain_time = time
    if shape.bits != BFLOAT16:
        plain_time = microseconds([step.run for step in make_steps(replace(shape, bits=BFLOAT16))])
    return asdict(shape) | {
        "us": time,
        "bytes": num_bytes,
        "tb_per_s": num_bytes / time / 1e6,
        "share_of_ceiling": num_bytes / time * 1e6 / ceiling,
        "error": error,
        "torch_us": torch_time,
        "bf16_us": plain_time,
    }


def format_row(shape: Shape, row: dict[str, Any]) -> str:
    torch_time = row["torch_us"]
    return " | ".join(
        (
            f"{shape.batch:4} x {shape.context:5}{'~' if shape.is_ragged else ' '}",
            f"{shape.num_kv_heads * shape.group_size:4}/{shape.num_kv_heads:<2} {shape.dim:4} {shape.bits:4}",
            f"{row['us']:6.1f} {row['bytes'] / 1e6:7.1f} {row['tb_per_s']:5.2f} "
            f"{row['share_of_ceiling']:6.1%}",
            f"{row['bf16_us']:6.1f} {row['bf16_us'] / row['us']:5.2f}",
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
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; reading alone: {ceiling / 1e12:.2f} TB/s"
    )
    print(HEADER)
    rows = []
    for shape in LLAMA if arguments.quick else SHAPES:
        rows.append(measure(shape, ceiling))
        print(format_row(shape, rows[-1]), flush=True)
    result = {
        **conditions(on_gpu=True),
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
