"""The results of `evaluate_quality.py` as a table. Knows what they are called, not how they are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aligned_table import format_table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "bits/value": lambda r: f"{r['bits_per_value']:.2f}",
    "with exact*": lambda r: f"{r['bits_with_exact_tokens']:.2f}",
    "perplexity": lambda r: f"{r['perplexity']:.4f}",
    "change": lambda r: f"{r['perplexity_change']:+.2%}",
    "KLD mean": lambda r: f"{r['kld_mean']:.7f}",
    "± s.e.": lambda r: "-" if r["kld_standard_error"] is None else f"{r['kld_standard_error']:.7f}",
    "KLD p99": lambda r: f"{r['kld_p99']:.5f}",
    "top-1": lambda r: f"{r['top1_agreement']:.2%}",
    "attention": lambda r: f"{_mean(list(r['attention_error'].values())):.2%}",
    "greedy": lambda r: f"{r['continuation']['mean_agreement']:.1f}",
    "to the end": lambda r: f"{r['continuation']['share_to_the_end']:.0%}",
    "needle": lambda r: f"{_mean([cell['exact'] for cell in r['needle']]):.1%}",
    "nats": lambda r: f"{_mean([cell['log_prob'] for cell in r['needle']]):.4f}",
    "list": lambda r: f"{r['list']['exact']:.1%}",
    "list nats": lambda r: f"{r['list']['log_prob']:.3f}",
}


def table(results: Mapping[str, dict[str, Any]]) -> str:
    """Returns the results as a Markdown table that also reads well as plain text."""
    rows = [["KV bits", *COLUMNS]]
    rows += [[name, *(show(result) for show in COLUMNS.values())] for name, result in results.items()]
    return "\n".join(format_table(rows))
