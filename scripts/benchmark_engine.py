#!/usr/bin/env python3
"""How fast a server's engine is at so many requests of so many tokens, without HTTP.

    python scripts/benchmark_engine.py --model scripts/configs/llama-3.1-8b --load-format dummy \\
        --kv bf16,4 --case 1x8k 16x32k 64x4k

All requests of a case start at once, greedily and on random tokens; what counts is the time in which all of
them generate. `--past random` computes only the last tokens of prompts, and what lies before are the blocks
of other tokens. That says nothing of prefill, and takes seconds where prompts take minutes. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_table import format_table
from conditions import conditions

from turboquant_core import use_plain_attention
from turboquant_server.config import ServerConfig
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.request import RequestFailedError
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.engine.scheduler import ScheduledRequest
from turboquant_server.load_error import ModelLoadError
from turboquant_server.model_loader import LoadedModel, load_model
from turboquant_server.model_manager import ModelManager

UNITS = {"k": 2**10, "m": 2**20}
NUM_STEPS, NUM_FIRST_STEPS = 64, 8  # that count, and that do not because requests have only just begun
NUM_COMPUTED = 1024  # last tokens of a prompt that are computed in any case
COLUMNS = ("requests", "context", "cache", "decode tok/s", "step ms", "x", "prefill tok/s", "TTFT s")
LEGEND = """\
context: tokens of each request when all generate; x: decode tok/s against the first cache. TTFT: until the
last of all has its first token. A request that does not fit beside the others makes a row with an error."""


def parse_length(text: str) -> int:
    """Return the tokens that `32k` or `32768` stands for."""
    unit = UNITS.get(text[-1:].lower())
    return int(text) if unit is None else int(text[:-1]) * unit


def parse_case(text: str) -> tuple[int, int]:
    """Return requests and tokens of `16x32k`."""
    requests, _, context = text.partition("x")
    return int(requests), parse_length(context)


class RandomPast:
    """Take the place of a runner's prefill: skip all but the last tokens of prompts.

    The first prompt that it sees is computed, and all blocks become copies of its own.
    """

    def __init__(self) -> None:
        self._forward = ModelRunner._forward_prefill
        self._is_filled = False

    def __call__(self, runner: ModelRunner, scheduled: Sequence[ScheduledRequest]) -> Tensor:
        if not self._is_filled:
            return self._forward(runner, scheduled)
        if any(item.chunks[-1].end > item.request.num_tokens - NUM_COMPUTED for item in scheduled):
            return self._forward(runner, scheduled)
        vocab_size = runner._model.get_input_embeddings().num_embeddings
        return torch.zeros(len(scheduled), vocab_size, device=runner._store.device)

    def clear(self, manager: ModelManager) -> None:
        """Make all blocks zero."""
        for records in _runner(manager)._store.records.values():
            records.zero_()

    def fill(self, manager: ModelManager) -> None:
        """Fill all blocks with those that are not zero."""
        for records in _runner(manager)._store.records.values():
            made = records[records.flatten(1).any(1).bool()]
            for piece in records.split(len(made)):
                piece.copy_(made[: len(piece)])
        self._is_filled = True


def _runner(manager: ModelManager) -> ModelRunner:
    return manager.engine._engine._model_runner


async def generate(
    manager: ModelManager, num_requests: int, context: int, generator: torch.Generator
) -> list[list[float]]:
    """Return when each request's tokens came, up to `NUM_STEPS` after all have one."""
    times: list[list[float]] = [[] for _ in range(num_requests)]
    vocab_size = manager.engine.vocab_size
    prompts = torch.randint(vocab_size, (num_requests, context), generator=generator).tolist()
    # Those that begin early generate while others' prompts are read.
    most = manager.max_model_len - context
    params = SamplingParams(max_tokens=most, temperature=0, ignore_eos=True)
    num_done = 0

    async def answer(index: int) -> None:
        nonlocal num_done
        request = manager.engine.generate(prompts[index], params, f"{index} of {id(times)}")
        async with aclosing(request):
            async for output in request:
                if output.token_ids:
                    times[index].append(time.perf_counter())
                num_done += len(times[index]) == NUM_FIRST_STEPS + NUM_STEPS
                if num_done == num_requests:
                    return

    await asyncio.gather(*map(answer, range(num_requests)))
    return times


def summarize(times: Sequence[Sequence[float]], context: int, started: float) -> dict[str, float]:
    """Return the numbers of a case.

    Raises:
        RequestFailedError: The requests never generated all at once.
    """
    firsts = [each[0] for each in times]
    youngest = times[firsts.index(max(firsts))]
    begin, end = youngest[min(NUM_FIRST_STEPS, len(youngest) - 1)], min(each[-1] for each in times)
    num_tokens = sum(begin < at <= end for each in times for at in each)
    if begin >= end:
        raise RequestFailedError("", "they do not fit beside each other")
    seconds = (end - begin) / num_tokens
    return {
        "context": context + sum(sum(at <= begin for at in each) for each in times) / len(times),
        "decode_tokens_per_s": 1 / seconds,
        "step_ms": 1e3 * seconds * len(times),
        "prefill_tokens_per_s": len(times) * context / (max(firsts) - started),
        "ttft_s": max(firsts) - started,
    }


def measure(
    loaded: LoadedModel, config: ServerConfig, cases: Sequence[tuple[int, int]], past: str, bar: tqdm[Any]
) -> list[dict[str, Any]]:
    """Return a row for each case."""
    use_plain_attention(loaded.model)
    manager = ModelManager(config)
    manager.load(loaded)
    generator = torch.Generator().manual_seed(0)
    rows = []
    random_past = RandomPast()
    try:
        with patch.object(ModelRunner, "_forward_prefill", lambda *args: random_past(*args)):
            if past == "random":
                random_past.clear(manager)
            asyncio.run(generate(manager, 2, 4096, generator))  # so that kernels are there
            if past == "random":
                random_past.fill(manager)
            for num_requests, context in cases:
                bar.set_postfix_str(f"{num_requests} x {context:,}")
                row: dict[str, Any] = {"requests": num_requests, "prompt": context}
                started = time.perf_counter()
                try:
                    times = asyncio.run(generate(manager, num_requests, context, generator))
                    row |= summarize(times, context, started)
                except (RequestFailedError, ValueError) as error:
                    row["error"] = str(error)
                rows.append(row)
                bar.update()
    finally:
        manager.unload()
    return rows


def format_rows(rows: Sequence[dict[str, Any]], past: str) -> str:
    """Return a Markdown table that also reads well as plain text; the rows of a case beside each other."""
    first = {(row["requests"], row["prompt"]): row.get("decode_tokens_per_s") for row in reversed(rows)}
    cells = [list(COLUMNS)]
    for row in sorted(rows, key=lambda row: list(first)[::-1].index((row["requests"], row["prompt"]))):
        speed, reference = row.get("decode_tokens_per_s"), first[row["requests"], row["prompt"]]
        line = [f"{row['requests']}", f"{row.get('context', row['prompt']):,.0f}", row["cache"]]
        if speed is None:
            line += ["-"] * 5
        else:
            line += [f"{speed:,.0f}", f"{row['step_ms']:.2f}"]
            line += [f"{speed / reference:.2f}" if reference else "-"]
            is_read = past == "computed"
            line += [f"{row['prefill_tokens_per_s']:,.0f}", f"{row['ttft_s']:.2f}"] if is_read else ["-"] * 2
        cells.append(line)
    lines = format_table(cells)
    for row in rows:
        if "error" in row:
            lines.append(f"{row['requests']} x {row['prompt']:,}, {row['cache']}: {row['error']}")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how fast the engine is, without HTTP.")
    add = parser.add_argument
    add("--model", metavar="NAME", help="Hugging Face id or directory (default: the demo model)")
    add("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights")
    add(
        "--kv",
        default="bf16,4",
        metavar="KV[,KV...]",
        help="caches: bf16 or bits; the first is the one to compare with (default: %(default)s)",
    )
    add(
        "--case",
        type=parse_case,
        nargs="+",
        default=[(1, 4096), (8, 4096)],
        metavar="NxT",
        help="requests and tokens of each one's prompt, such as 16x32k (default: 1x4k 8x4k)",
    )
    add(
        "--past",
        choices=["computed", "random"],
        default="computed",
        help="random: compute the last tokens of prompts only",
    )
    add("--gpu-memory-utilization", type=float, default=0.92, help="as the server's (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the JSON object there, too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    # Room for what early ones generate while the others' prompts are read.
    longest = max(context for _, context in args.case)
    steps = max(count * context // 2048 for count, context in args.case)
    base = {
        "model": args.model,
        "load_format": args.load_format,
        "dtype": "bfloat16",
        "max_num_seqs": max(2, *(count for count, _ in args.case)),
        "enable_prefix_caching": False,
        "gpu_memory_utilization": args.gpu_memory_utilization,
    }
    try:
        loaded = load_model(ServerConfig(**base))
        room = max(longest, 4096) + steps + 2 * (NUM_STEPS + NUM_FIRST_STEPS)
        loaded = loaded._replace(max_model_len=min(loaded.max_model_len, room))
        rows: list[dict[str, Any]] = []
        kinds = args.kv.split(",")
        with tqdm(total=len(args.case) * len(kinds), unit="case", disable=not sys.stderr.isatty()) as bar:
            for kind in kinds:
                bits = {} if kind == "bf16" else {"kv_bits": (int(kind), int(kind))}
                dtype = "bf16" if kind == "bf16" else "turboquant"
                config = ServerConfig(**base, kv_cache_dtype=dtype, **bits)
                cache = kind if kind == "bf16" else f"{kind} bits"
                rows += [row | {"cache": cache} for row in measure(loaded, config, args.case, args.past, bar)]
    except ModelLoadError as error:
        sys.exit(f"benchmark_engine.py: {error}")
    model = loaded.model
    on_gpu = model.device.type == "cuda"
    result = {
        "model": Path(args.model or "turboquant-demo").name,
        "load_format": args.load_format,
        "past": args.past,
        **conditions(on_gpu=on_gpu),
        "rows": rows,
    }
    print(
        f"{result['model']}, {args.load_format} weights in bfloat16; {result['device']}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; past {args.past}"
    )
    print(format_rows(rows, args.past))
    print(LEGEND)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
