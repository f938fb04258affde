#!/usr/bin/env python3
"""What KV caches take and how fast they are, context by context: a request alone, on this machine.

    python scripts/benchmark_kv.py --model Qwen/Qwen2.5-1.5B-Instruct --context 1024,8192 --output results
    python scripts/benchmark_kv.py --model scripts/configs/llama-3.1-8b --load-format dummy --quick

Every cache gets the same model in bfloat16 and the same text. `bf16` is the server with `--kv-cache-dtype
bf16`, a number of bits the server with these; `transformers` is its own cache in a plain loop. How a run is
measured is in `kv_runs.py`; this file knows which caches there are and what a report holds. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_table import format_table
from conditions import conditions
from kv_runs import Run, RunCache, ServedCache, run_plain

from turboquant_server.cache_config import SUPPORTED_BITS
from turboquant_server.cache_plan import tokens_before_a_text
from turboquant_server.config import ServerConfig
from turboquant_server.engine.request import RequestFailedError
from turboquant_server.load_error import ModelLoadError
from turboquant_server.model_loader import LoadedModel, load_model
from turboquant_server.model_manager import DEMO_MODEL_NAME

TEXT = Path(__file__).resolve().parents[1] / "turboquant_server/demo/held_out.txt"
REFERENCE = "bf16"
# Without --context, and with --quick.
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
QUICK_CONTEXTS = (512, 2048)
NUM_TOKENS, NUM_QUICK_TOKENS = 64, 16  # of an answer
LEGEND = """\
context: tokens of prompt and answer. KV: what such a request holds of a cache; x: how many times as much bf16
holds, the same server without compression. Peaks: the most that tensors took of the GPU, with weights and
without unused cache, while the prompt was read and while tokens were generated; a server reads it in steps,
transformers at once. tok/s: medians of up to 5 runs. same: tokens like bf16's up to the first that differs.
On a CPU a server reads bf16's blocks more slowly than codes: what codes cost in speed, only `transformers`
tells there."""


def caches(config: ServerConfig, bits: Sequence[int], *, with_transformers: bool) -> dict[str, RunCache]:
    """Return how to run each cache, by its name; the one that others are compared with comes first."""
    options: dict[str, dict[str, Any]] = {
        REFERENCE: {"kv_cache_dtype": "bf16"},
        **{f"{width} bits": {"kv_cache_dtype": "turboquant", "kv_bits": (width, width)} for width in bits},
    }
    runs: dict[str, RunCache] = {
        name: ServedCache(config.model_copy(update=update)) for name, update in options.items()
    }
    return runs | ({"transformers": run_plain} if with_transformers else {})


def make_prompt(loaded: LoadedModel, num_tokens: int) -> list[int]:
    """Return so many tokens of text, from its beginning again where it ends."""
    text = TEXT.read_text("utf-8").replace("<|endoftext|>", "\n")
    tokens = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = tokens_before_a_text(loaded.tokenizer)
    return [*prefix, *tokens * (num_tokens // len(tokens) + 1)][:num_tokens]


def count_same(token_ids: Sequence[int], expected: Sequence[int]) -> int:
    """Return how many tokens there are before the first that differs."""
    pairs = zip(token_ids, expected, strict=True)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def measure(
    loaded: LoadedModel,
    runs: Mapping[str, RunCache],
    contexts: Sequence[int],
    num_tokens: int,
    bar: tqdm[Any],
) -> list[dict[str, Any]]:
    """Return a row for each context and cache; ``error`` is in those of caches that could not be run."""
    rows = []
    references: dict[int, Run] = {}
    for name, run_cache in runs.items():
        for context in sorted(contexts, reverse=True):  # so that what holds the first holds all
            bar.set_postfix_str(f"{name}, {context:,} tokens")
            prompt = make_prompt(loaded, context - num_tokens)
            row: dict[str, Any] = {"context": context, "cache": name}
            try:
                run = run_cache(loaded, prompt, num_tokens)
            except (ModelLoadError, RequestFailedError, torch.OutOfMemoryError) as error:
                row["error"] = str(error).partition("\n")[0]
            else:
                if name == REFERENCE:
                    references[context] = run
                reference = references.get(context)
                row |= {
                    "kv_bytes": run.kv_bytes,
                    "kv_bytes_of_reference": reference and reference.kv_bytes,
                    "prefill_peak_bytes": run.prefill.peak_bytes,
                    "decode_peak_bytes": run.decode.peak_bytes,
                    "prefill_tokens_per_s": len(prompt) / run.prefill.seconds,
                    "decode_tokens_per_s": (num_tokens - 1) / run.decode.seconds,
                    "same_tokens": reference and count_same(run.token_ids, reference.token_ids),
                }
            rows.append(row)
            bar.update()
        if isinstance(run_cache, ServedCache):
            run_cache.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    order = list(runs)
    return sorted(rows, key=lambda row: (row["context"], order.index(row["cache"])))


def benchmark(name: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Return the report of one model.

    Raises:
        ModelLoadError: It cannot be loaded.
    """
    config = ServerConfig(
        model=name,
        load_format=args.load_format,
        dtype="bfloat16",
        max_model_len=max(args.context) if args.context else None,
    )
    loaded = load_model(config)
    model = loaded.model
    default = QUICK_CONTEXTS if args.quick else CONTEXTS
    contexts = args.context or [each for each in default if each <= loaded.max_model_len]
    num_tokens = NUM_QUICK_TOKENS if args.quick else NUM_TOKENS
    runs = caches(config, args.bits, with_transformers=args.transformers)
    label = DEMO_MODEL_NAME if name is None else Path(name).name
    with tqdm(
        total=len(contexts) * len(runs), desc=label, unit="run", leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        rows = measure(loaded, runs, contexts, num_tokens, bar)
    return {
        "model": label,
        "parameters": model.num_parameters(),
        "weight_bytes": sum(weight.nbytes for weight in model.parameters()),
        "load_format": args.load_format,
        **conditions(on_gpu=model.device.type == "cuda"),
        "new_tokens": num_tokens,
        "rows": rows,
    }


def _number(name: str, form: str, unit: int = 1) -> Callable[[dict[str, Any]], str]:
    return lambda row: "-" if row.get(name) is None else format(row[name] / unit, form)


def _ratio(row: dict[str, Any]) -> str:
    reference = row.get("kv_bytes_of_reference")
    return f"{reference / row['kv_bytes']:.2f}" if reference else "-"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "context": _number("context", ",.0f"),
    "cache": lambda row: str(row["cache"]),
    "KV MiB": _number("kv_bytes", ".2f", 2**20),
    "x": _ratio,
    "peak prefill GiB": _number("prefill_peak_bytes", ".2f", 2**30),
    "peak decode GiB": _number("decode_peak_bytes", ".2f", 2**30),
    "prefill tok/s": _number("prefill_tokens_per_s", ",.0f"),
    "decode tok/s": _number("decode_tokens_per_s", ",.1f"),
    "same": _number("same_tokens", ".0f"),
}


def format_report(report: Mapping[str, Any]) -> str:
    """Return a model's report as a Markdown table that also reads well as plain text."""
    rows = report["rows"]
    cells = [list(COLUMNS), *([show(row) for show in COLUMNS.values()] for row in rows)]
    random = " random" if report["load_format"] == "dummy" else ""
    return "\n".join(
        [
            f"{report['model']}: {report['parameters'] / 1e9:.3g}B parameters, "
            f"{report['weight_bytes'] / 2**30:.2f} GiB of{random} bfloat16 weights; {report['device']}, "
            f"torch {report['torch']}, transformers {report['transformers']}; "
            f"answers of {report['new_tokens']} tokens",
            *format_table(cells),
            *(f"{row['cache']}, {row['context']:,} tokens: {row['error']}" for row in rows if "error" in row),
        ]
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what KV caches take and how fast they are.")
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        default=[None],
        metavar="NAME",
        help="one or more Hugging Face ids or directories (default: the demo model)",
    )
    add("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights")
    add(
        "--context",
        type=_numbers,
        metavar="N[,N...]",
        help="tokens of prompt and answer (default: 512 to 32768 as far as the model goes)",
    )
    add(
        "--bits",
        type=_numbers,
        default="4,3,2",
        metavar="B[,B...]",
        help="compressed caches to run beside bf16 (default: %(default)s)",
    )
    add("--transformers", action="store_true", help="run transformers' own cache, too")
    add(
        "--quick", action="store_true", help="a quarter of the tokens; 512 and 2048, if no --context is given"
    )
    add("--output", type=Path, metavar="DIR", help="write a JSON file per model and kv.json with all there")
    parsed = parser.parse_args(arguments)
    if not set(parsed.bits) <= set(SUPPORTED_BITS):
        parser.error("argument --bits: each must be 2, 3, 4 or 8")
    if parsed.context and min(parsed.context) <= NUM_TOKENS:
        parser.error(f"argument --context: each must be more than {NUM_TOKENS}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    result: dict[str, Any] = {"models": []}
    for name in args.model:
        try:
            report = benchmark(name, args)
        except ModelLoadError as error:
            sys.exit(f"benchmark_kv.py: {error}")
        result["models"].append(report)
        print(format_report(report), end="\n\n", flush=True)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / f"kv_{report['model']}.json").write_text(json.dumps(report, indent=1) + "\n")
            (args.output / "kv.json").write_text(json.dumps(result, indent=1) + "\n")
    print(LEGEND)
    if args.load_format == "dummy":
        print("The weights are random: how many tokens are the same says nothing about a trained model.")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
