#!/usr/bin/env python3
"""How long a prompt's first token takes: computed, found on the GPU, and copied back from --swap-space.

    python scripts/benchmark_swap.py --model scripts/configs/llama-3.1-8b --load-format dummy \\
        --swap-space 16GiB --length 2k 8k 32k

Each prompt of random tokens is sent three times to the engine, without HTTP: it is computed, found, and found
once more after all blocks that no request holds have been evicted. Medians; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_table import format_table
from benchmark_engine import parse_length
from conditions import conditions

from turboquant_server.config import ServerConfig
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.load_error import ModelLoadError
from turboquant_server.model_manager import ModelManager

WARM_UP_LENGTH = 4096
COLUMNS = ("prompt", "found", "computed ms", "on the GPU ms", "from the host ms", "x", "MiB", "out ms")
LEGEND = """\
found: tokens that need not be computed again, of which the host had so many MiB; x: computed against from the
host. out: how much longer the step took before which the blocks were copied to the host."""


class Prompts:
    """Send prompts to a manager's engine, one at a time."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager
        self._generator = torch.Generator().manual_seed(0)
        self._num_sent = 0

    def make(self, length: int) -> list[int]:
        """Return random tokens."""
        vocab_size = self._manager.engine.vocab_size
        return torch.randint(vocab_size, (length,), generator=self._generator).tolist()

    def send(self, token_ids: list[int]) -> tuple[float, int]:
        """Return the seconds until the first token and how many of the prompt were found."""
        self._num_sent += 1
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)

        async def answer() -> tuple[float, int]:
            started = time.perf_counter()
            outputs = self._manager.engine.generate(token_ids, params, str(self._num_sent))
            [(seconds, found)] = [
                (time.perf_counter() - started, output.num_cached_tokens) async for output in outputs
            ]
            return seconds, found

        return asyncio.run(answer())


def evict_all(manager: ModelManager) -> None:
    """Take all blocks that no request holds, as one that needs them would; the engine is at rest."""
    for group in manager._cache_manager._groups:
        group.blocks.release(group.blocks.allocate(group.blocks.num_free))


def measure(
    manager: ModelManager, lengths: Sequence[int], num_repeats: int, bar: Any
) -> list[dict[str, Any]]:
    """Return a row for each length.

    Raises:
        ModelLoadError: The swap space does not hold a prompt.
    """
    prompts = Prompts(manager)
    block_bytes = manager._cache_size.block_bytes
    for _ in range(2):  # so that kernels are there
        warm_up = prompts.make(WARM_UP_LENGTH)
        for _ in range(2):
            prompts.send(warm_up)
        evict_all(manager)
        prompts.send(warm_up)
    rows = []
    for length in lengths:
        times: dict[str, list[float]] = {"computed": [], "gpu": [], "host": [], "out": []}
        for _ in range(num_repeats):
            token_ids = prompts.make(length)
            computed, none = prompts.send(token_ids)
            on_gpu, found = prompts.send(token_ids)
            nothing, _ = prompts.send(prompts.make(8))
            evict_all(manager)
            with_copies, _ = prompts.send(prompts.make(8))
            num_before = [tier.num_to_device for tier in manager._cache_manager.tiers]
            from_host, still_found = prompts.send(token_ids)
            if none or not found or found != still_found:
                raise ModelLoadError(f"of {length} tokens {none}, {found} and {still_found} were found")
            num_blocks = [
                tier.num_to_device - before
                for tier, before in zip(manager._cache_manager.tiers, num_before, strict=True)
            ]
            seconds = (computed, on_gpu, from_host, with_copies - nothing)
            for name, value in zip(times, seconds, strict=True):
                times[name].append(1e3 * value)
            bar.update()
        rows.append(
            {
                "prompt": length,
                "found": found,
                **{f"{name}_ms": statistics.median(values) for name, values in times.items()},
                "host_bytes": sum(n * size for n, size in zip(num_blocks, block_bytes, strict=True)),
            }
        )
    return rows


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table that also reads well as plain text."""
    cells = [list(COLUMNS)]
    for row in rows:
        line = [f"{row['prompt']:,}", f"{row['found']:,}"]
        line += [f"{row[f'{name}_ms']:.1f}" for name in ("computed", "gpu", "host")]
        line += [f"{row['computed_ms'] / row['host_ms']:.1f}", f"{row['host_bytes'] / 2**20:,.1f}"]
        cells.append([*line, f"{row['out_ms']:.1f}"])
    return "\n".join(format_table(cells))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the first token of prompts in the swap space.")
    add = parser.add_argument
    add("--model", metavar="NAME", help="Hugging Face id or directory (default: the demo model)")
    add("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights")
    add("--bits", type=int, default=4, help="of the cache (default: %(default)s)")
    add("--swap-space", default="4GiB", metavar="SIZE", help="as the server's (default: %(default)s)")
    add("--kv-cache-memory", metavar="SIZE", help="as the server's")
    add(
        "--length",
        type=parse_length,
        nargs="+",
        default=[2048, 4096],
        metavar="T",
        help="tokens of prompts, at least 1k, such as 32k (default: 2k 4k)",
    )
    add("--repeats", type=int, default=5, help="prompts of each length (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the JSON object there, too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    config = ServerConfig(
        model=args.model,
        load_format=args.load_format,
        bits=args.bits,
        swap_space=args.swap_space,
        kv_cache_memory=args.kv_cache_memory,
        max_model_len=max(WARM_UP_LENGTH, *args.length) + 1,
        max_num_seqs=2,
    )
    manager = ModelManager(config)
    try:
        manager.load()
    except ModelLoadError as error:
        sys.exit(f"benchmark_swap.py: {error}")
    total = args.repeats * len(args.length)
    try:
        with tqdm(total=total, unit="prompt", disable=not sys.stderr.isatty()) as bar:
            rows = measure(manager, args.length, args.repeats, bar)
    except ModelLoadError as error:
        sys.exit(f"benchmark_swap.py: {error}")
    finally:
        model = manager._model
        manager.unload()
    on_gpu = model.device.type == "cuda"
    result = {
        "model": Path(args.model or "turboquant-demo").name,
        "load_format": args.load_format,
        "bits": args.bits,
        **conditions(on_gpu=on_gpu),
        "rows": rows,
    }
    print(
        f"{result['model']}, {args.load_format} weights, {args.bits} bits; {result['device']}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(format_rows(rows))
    print(LEGEND)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
