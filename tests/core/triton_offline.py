"""Compiles what the launch functions of Triton kernels launch, for GPUs that need not be there.

A program, as Triton reads when it is imported whether it interprets. Its argument is JSON, pairs of a target
and the fields of a `Launch`; it prints, for each, what the kernels use.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from turboquant_core.block_codec import BlockCodec
from turboquant_core.block_quantizer import KEY_SCALE, VALUE_SCALE, BlockQuantizer
from turboquant_core.exact_codec import ExactCodec
from turboquant_core.kernels.triton_decode import decode
from turboquant_core.kernels.triton_encode import encode_blocks
from turboquant_core.kernels.triton_found import Found, add_found
from turboquant_core.kernels.triton_keep import keep_tokens
from turboquant_core.kernels.triton_multiply import multiply
from turboquant_core.kernels.triton_prefill import attend_exact, attend_stored
from turboquant_core.kernels.triton_read import read_blocks
from turboquant_core.reference import AttentionOptions
from turboquant_core.step_plan import DecodeTables
from turboquant_core.timeline import Timeline

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KV_HEADS = 2


class Launch(NamedTuple):
    """What kernels are launched for: dims and bits of keys and of values, query heads of each, and so on."""

    key_dim: int
    value_dim: int
    key_bits: int
    value_bits: int
    group_size: int
    dtype: str
    softcap: float | None


def launch(shape: Launch) -> None:
    """Call the launch functions with tensors on the CPU, whose dtypes and strides are all that counts."""
    codec = BlockCodec(
        BlockQuantizer(shape.key_dim, shape.key_bits, scale=KEY_SCALE),
        BlockQuantizer(shape.value_dim, shape.value_bits, scale=VALUE_SCALE),
    )
    dtype = getattr(torch, shape.dtype)
    timeline, num_heads = Timeline(), KV_HEADS * shape.group_size
    keys, values = (
        torch.zeros(2, KV_HEADS, timeline.num_exact, dim, dtype=dtype)
        for dim in (shape.key_dim, shape.value_dim)
    )
    exact_codec = ExactCodec(shape.key_dim, shape.value_dim, dtype)
    records, exact_records = (
        torch.zeros(8, KV_HEADS, each.record_bytes, dtype=torch.uint8) for each in (codec, exact_codec)
    )
    numbers = torch.zeros(2, dtype=torch.int32)
    encode_blocks(keys[None], values[None], numbers, numbers, records[None], numbers, [codec])
    encode_blocks(keys[None], values[None], numbers, numbers, exact_records[None], numbers, [exact_codec])
    tables = DecodeTables(
        slots=numbers,
        positions=numbers,
        exact_starts=numbers,
        first_visible=numbers,
        block_tables=torch.zeros(2, 8, dtype=torch.int32),
        block_starts=numbers,
        num_blocks=numbers,
        counts_before=numbers,
        has_free_rows=False,
    )
    sinks = None if shape.softcap is None else torch.zeros(num_heads)
    options = AttentionOptions(1.0, shape.softcap, sinks)
    queries = torch.zeros(2, num_heads, shape.key_dim, dtype=dtype)
    decode(queries, (keys, values), records, tables, timeline, codec, options)
    new, stored = (
        tuple(torch.zeros((*sizes, dim), dtype=dtype) for dim in (shape.key_dim, shape.value_dim))
        for sizes in ((2, KV_HEADS), (KV_HEADS, 128))
    )
    read_blocks(records, numbers, codec, *stored)
    read_blocks(exact_records, numbers, exact_codec, *stored)
    integers = torch.zeros(2, 10, dtype=torch.int64)
    plan = SimpleNamespace(
        table=integers,
        tiles=integers[:, :2],
        exact_starts=integers[0],
        first_visible=None if shape.softcap is None else integers[0],
        held_places=integers[0],
        kept_rows=integers[0],
        kept_slots=integers[0],
        kept_places=integers[0],
    )
    keep_tokens(*new, (keys, values), plan)
    found = Found(torch.zeros(2, num_heads, shape.value_dim), torch.zeros(2, num_heads))
    attend_exact(queries, new, (keys, values), found, plan, options)
    by_token = [states.transpose(0, 1) for states in stored]
    attend_stored(queries, *by_token, slice(0, 2), found, plan, options, continues=True)
    add_found(found, found.averages.to(dtype).transpose(0, 1), found.weights.T.contiguous())
    # Of many tokens at once.
    _, matrices, _ = codec.value_quantizer.transform.matrices(queries.device)
    averages, weights = torch.zeros(600, num_heads, shape.value_dim), torch.zeros(600, num_heads)
    sink_weights = () if sinks is None else (sinks,)
    multiply(averages, matrices, KV_HEADS, dtype, averages, (weights, weights, *sink_weights))


def usage(kernel: Any) -> dict[str, int]:
    """Return the bytes of a kernel: of shared memory, and of memory for what registers do not hold."""
    if "amdgcn" in kernel.asm:
        (stack,) = re.findall(r"\.private_segment_fixed_size: (\d+)", kernel.asm["amdgcn"])
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(kernel.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (stack,) = re.findall(r"STACK:(\d+)", printed)
    return {"shared": kernel.metadata.shared, "stack": int(stack)}


def compiled(target: str, shape: list[Any]) -> dict[str, dict[str, int]]:
    """Return what each kernel that is launched for a shape uses on a target."""
    kernels: dict[str, dict[str, int]] = {}
    run = JITFunction.run
    hip = "7" if TARGETS[target].backend == "hip" else None

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        used = usage(run(self, *args, warmup=True, **kwargs))
        before = kernels.get(self.__name__, used)  # of another variant
        kernels[self.__name__] = {name: max(used[name], before[name]) for name in used}

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: target,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: TARGETS[target],
        )
    )
    with patch.object(JITFunction, "run", compile_only), patch.object(torch.version, "hip", hip):
        launch(Launch(*shape))
    return kernels


def result(case: tuple[str, list[Any]]) -> dict[str, Any]:
    try:
        return {"kernels": compiled(*case), "error": None}
    except Exception as error:  # of many kinds; a test tells of it
        return {"kernels": {}, "error": f"{type(error).__name__}: {error}"}


def main() -> None:
    torch.set_num_threads(1)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        print(json.dumps(list(pool.map(result, json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
