"""What compressing the KV cache costs in quality, seen as decoding sees it: command line, table and JSON.

    python scripts/evaluate_quality.py --kv bf16,8,4,3,2,4:3 --out results

Every setting gets the same text, prompts and seeds; transformers' own cache, `bf16`, is the reference. How
things are measured is in `quality_predictions.py`, `quality_attention.py` and `quality_recall.py`; this file
knows which caches there are and what a run reports. The last line is one JSON object.

A setting is `bf16`, a number of bits (2, 3, 4, 8), bits of keys and values apart (`4:3`), or a budget of bits
that is spread over the layers (`budget3.5`). Caches are made as the server makes them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from quality_attention import attention_error
from quality_predictions import Continuations, Predictions
from quality_reader import CacheReader
from quality_recall import RecallTest, list_cells, needle_cells
from quality_table import table
from recall_prompts import encode
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from turboquant_core import TurboQuantCache
from turboquant_server.cache_plan import plan_cache, tokens_before_a_text
from turboquant_server.config import ServerConfig
from turboquant_server.load_error import ModelLoadError

DEMO = Path(__file__).resolve().parents[1] / "turboquant_server/demo"
REFERENCE = "bf16"
BUDGET = "budget"
SHORTEST_CONTEXT = 512  # half of it holds the 128 exact tokens, and some that are not
ATTENTION_WINDOWS = 1  # each has thousands of queries; more would tell no more
CONTINUATION = 128


def parse_setting(setting: str) -> ServerConfig | None:
    """Returns what a server would be told for a setting, None for the reference.

    Raises:
        ValueError: If there is no such setting.
    """
    if setting == REFERENCE:
        return None
    try:
        if setting.startswith(BUDGET):
            return ServerConfig(kv_budget_bits=float(setting.removeprefix(BUDGET)))
        keys, colon, values = setting.partition(":")
        return ServerConfig(kv_bits=f"{keys},{values if colon else keys}")
    except ValueError as error:
        raise ValueError(
            f"{setting!r} is not a setting: use {REFERENCE}, a number of bits (2, 3, 4, 8), bits of keys and "
            "values apart, such as 4:3, or a budget, such as budget3.5"
        ) from error


def open_cache_factory(
    setting: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int
) -> Callable[[], Cache]:
    """Returns what makes an empty cache of a setting, with a server's plan, measured on the model as there.

    Raises:
        ValueError: If there is no such setting.
        ModelLoadError: If the budget cannot be met.
    """
    config = parse_setting(setting)
    if config is None:
        return partial(DynamicCache, config=model.config)
    plan = plan_cache(config, model, tokenizer, context)
    return partial(
        TurboQuantCache,
        key_bits=plan.key_bits,
        value_bits=plan.value_bits,
        layer_bits=plan.bit_plan.layer_bits if plan.bit_plan else None,
        transforms=plan.transforms,
        config=model.config,
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    caches: Mapping[str, Callable[[], Cache]],
    *,
    context: int,
    samples: int = 10,
    batch: int = 16,
    max_windows: int | None = None,
    prefix: Sequence[int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures caches against the one called ``bf16``.

    Args:
        model: On its device, in evaluation mode.
        text: Cut into windows that are predicted; prompts to recall hide their facts in it.
        caches: What makes an empty cache, by name. One that compresses but has no `memory_footprint` may tell
            its bits in an attribute `bits_per_value`.
        context: Tokens in a window and in the longest prompt; predictions are those of its second half.
        samples: Needle prompts of each length and depth, and lists.
        batch: Windows or prompts at once; the reference's logits of so many windows are held.
        max_windows: Use only so many windows.
        prefix: Tokens in front of every window and prompt; by default what the tokenizer puts there.

    Returns:
        By name, the reference first:

        - ``predictions`` counted, ``perplexity``, ``perplexity_change`` (a ratio less 1), ``kld_mean`` with
          ``kld_standard_error`` (None for a single window) and ``kld_p99`` in nats, ``top1_agreement``;
        - ``bits_per_value``, ``bits_with_exact_tokens`` at the end of a window;
        - ``attention_error``: by layer, relative;
        - ``continuation``: of ``prompts``, ``mean_agreement`` in tokens out of ``tokens``, and the
          ``share_to_the_end``;
        - ``needle``: cells of ``length``, ``depth`` and what ``list`` has: number of ``answers``, the share
          that is ``exact``, and the mean ``log_prob`` of an answer in nats.

    Raises:
        ValueError: If the text has less than a window, or the context is too short for the prompts.
    """
    caches = {REFERENCE: caches[REFERENCE], **caches}
    prefix = tokens_before_a_text(tokenizer) if prefix is None else prefix
    ids = encode(tokenizer, text)
    width = context - len(prefix)
    if len(ids) < context:
        raise ValueError(f"the text has {len(ids)} tokens, less than one window of {context}")
    rows = [[*prefix, *ids[i : i + width]] for i in range(0, len(ids) - width + 1, width)]
    windows = torch.tensor(rows[:max_windows], device=model.device)
    continuations = Continuations(windows[:, : context // 2], min(CONTINUATION, context // 2), batch)
    needles, lists = (
        RecallTest(cells(tokenizer, ids, context, samples, prefix), batch, model.device)
        for cells in (needle_cells, list_cells)
    )
    attention_windows = windows[:ATTENTION_WINDOWS]
    parts = (
        windows.numel(),
        attention_windows.numel(),
        *(x.num_fed for x in (continuations, needles, lists)),
    )
    results: dict[str, dict[str, Any]] = {}
    with tqdm(
        total=len(caches) * sum(parts), unit="token", unit_scale=True, disable=not sys.stderr.isatty()
    ) as bar:
        reader = CacheReader(model, bar)
        predictions = {name: Predictions() for name in caches}
        for some_windows in windows.split(batch):
            reference = None
            for name, open_cache in caches.items():
                bar.set_description(f"{name} predictions")
                logits = predictions[name].add(reader, open_cache, some_windows, reference)
                reference = reference or logits
        for name, open_cache in caches.items():
            bar.set_description(f"{name} attention")
            results[name] = predictions[name].summary()
            results[name]["attention_error"] = attention_error(reader, open_cache, attention_windows)
            bar.set_description(f"{name} recall")
            results[name]["continuation"] = continuations.measure(reader, open_cache)
            results[name]["needle"] = [
                {"length": length, "depth": depth, **cell}
                for (length, depth), cell in needles.measure(reader, open_cache).items()
            ]
            results[name]["list"] = lists.measure(reader, open_cache)[context]
    base = results[REFERENCE]["perplexity"]
    for result in results.values():
        result["perplexity_change"] = result["perplexity"] / base - 1
    return results


def _settings(text: str) -> list[str]:
    """Returns the settings of a command line."""
    settings = text.split(",")
    try:
        for setting in settings:
            parse_setting(setting)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return settings


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what KV-cache compression costs in quality.")
    add = parser.add_argument
    add("--model", default=str(DEMO), help="Hugging Face id or folder (default: the demo model)")
    add(
        "--kv",
        type=_settings,
        default="bf16,8,4,3,2",
        metavar="SETTINGS",
        help="bf16, bits, bits of keys:values, budgetBITS, comma-separated (default: %(default)s)",
    )
    add("--out", type=Path, metavar="FOLDER", help="write plots (needs matplotlib) and results.json there")
    add("--context", type=_count, default=8192, help="tokens in a window (default: %(default)s)")
    add("--samples", type=_count, default=10, help="prompts of a needle cell, lists (default: %(default)s)")
    add("--max-windows", type=_count, help="use only so many windows of the text")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the model (default: %(default)s)",
    )
    add("--batch", type=_count, default=16, help="windows or prompts at once (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    if parsed.context < SHORTEST_CONTEXT:
        parser.error(f"argument --context: {parsed.context} is less than {SHORTEST_CONTEXT}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.out:
        from quality_plots import plot_divergence, plot_needles  # nobody else needs matplotlib
    torch.set_float32_matmul_precision(
        "highest"
    )  # tf32 rounds to 10 bits, and rounding would be measured, too
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    try:
        results = evaluate(
            model,
            tokenizer,
            (DEMO / "held_out.txt").read_text("utf-8"),
            {
                name: open_cache_factory(name, model, tokenizer, args.context)
                for name in [REFERENCE, *args.kv]
            },
            context=args.context,
            samples=args.samples,
            batch=args.batch,
            max_windows=args.max_windows,
        )
    except (ValueError, ModelLoadError) as error:
        sys.exit(f"evaluate_quality.py: {error}")
    report = {
        "model": args.model,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": args.dtype,
        "context": args.context,
        "samples": args.samples,
        "results": results,
    }
    reference = results[REFERENCE]
    print(table(results))
    print(
        f"* exact tokens counted as bf16, at {args.context} tokens. Predictions from token "
        f"{args.context // 2} on; attention: mean over layers; greedy: of "
        f"{reference['continuation']['tokens']} tokens, those before the first that differs; needle: "
        f"{sum(cell['answers'] for cell in reference['needle'])} codes; list: "
        f"{reference['list']['answers']} entries; nats: log-probability of a whole answer."
    )
    print(
        f"{report['hardware']}, torch {report['torch']}, transformers {report['transformers']}, "
        f"model in {args.dtype}, context {args.context}, {reference['predictions']} predictions"
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        plot_divergence(results, args.out / "kld_by_bits.png")
        plot_needles(results, args.out / "needles.png")
        (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
