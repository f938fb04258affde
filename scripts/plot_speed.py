#!/usr/bin/env python3
"""Draws what `benchmark_engine.py` and `benchmark_kv.py` measured: the two figures of the README.

python scripts/plot_speed.py scripts/results/engine_16_h200.json scripts/results/kv_h200/kv_llama-3.1-8b.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

FOLDER = Path(__file__).resolve().parent / "results"
COLORS = {
    "bf16": "0.45",
    "8 bits": "tab:green",
    "4 bits": "tab:blue",
    "3 bits": "tab:purple",
    "2 bits": "tab:orange",
}


def plot_decode(engine: dict[str, Any], path: Path) -> None:
    """Draws tokens per second against the context, for the number of requests that most contexts have."""
    rows = [row for row in engine["rows"] if "error" not in row]
    counts = [row["requests"] for row in rows]
    requests = max(set(counts), key=counts.count)
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for cache in dict.fromkeys(row["cache"] for row in rows):
        points = sorted(
            (row["prompt"], row["decode_tokens_per_s"])
            for row in rows
            if (row["requests"], row["cache"]) == (requests, cache)
        )
        axes.plot(*zip(*points, strict=True), "o-", color=COLORS[cache], label=cache)
    axes.set(
        xlabel="tokens of context of each request",
        ylabel="tokens generated per second",
        title=f"{engine['model']}, {requests} requests, {engine['device']}",
        xscale="log",
    )
    axes.set_ylim(bottom=0)
    ticks = sorted({row["prompt"] for row in rows if row["requests"] == requests})
    axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_capacity(kv: dict[str, Any], path: Path) -> None:
    """Draws how many tokens of requests of some lengths a GiB holds, by the cache."""
    rows = [row for row in kv["rows"] if "error" not in row]
    contexts = sorted({row["context"] for row in rows})
    held = {(row["context"], row["cache"]): 2**30 * row["context"] / row["kv_bytes"] for row in rows}
    caches = sorted({cache for _, cache in held}, key=lambda cache: held[contexts[0], cache])
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    width = 0.8 / len(contexts)
    for index, context in enumerate(contexts):
        places = [place + (index - (len(contexts) - 1) / 2) * width for place in range(len(caches))]
        shade = 0.4 + 0.6 * (index + 1) / len(contexts)
        colors = [COLORS[cache] for cache in caches]
        heights = [held[context, cache] for cache in caches]
        bars = axes.bar(
            places, heights, width, color=colors, alpha=shade, label=f"requests of {context:,} tokens"
        )
        labels = [f"{height / held[context, 'bf16']:.1f}x" for height in heights]
        axes.bar_label(bars, labels, fontsize=9)
    axes.set_xticks(range(len(caches)), caches)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.set(
        ylabel="tokens that a GiB holds", title=f"{kv['model']}; newest and first tokens in bfloat16 counted"
    )
    axes.grid(alpha=0.3, axis="y")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the README's figures of speed and memory.")
    parser.add_argument("engine", type=Path, help="what benchmark_engine.py wrote")
    parser.add_argument("kv", type=Path, help="what benchmark_kv.py wrote of a model")
    parser.add_argument(
        "--output", type=Path, default=FOLDER, metavar="DIR", help="where to (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    plot_decode(json.loads(args.engine.read_text()), args.output / "decode_speed.png")
    plot_capacity(json.loads(args.kv.read_text()), args.output / "tokens_that_fit.png")


if __name__ == "__main__":
    main()
