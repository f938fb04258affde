"""What `benchmark_serving.py` measured, in numbers and as a table. Knows answers and times, and no server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from aligned_table import format_table
from serving_client import Answer

PERCENTILES = (50, 90, 95, 99)
TIMES = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "ITL": "itl_ms", "e2e": "latency_ms"}
LEGEND = """\
in, out: mean tokens; short: answers of fewer tokens than asked; hits: share of input tokens that was cached.
Rates and times are of requests that succeeded. TTFT: from sending to the first text; TPOT: a request's, per
token after the first; ITL: between chunks with text, which may be several tokens; e2e: from sending to the
end."""


def summarize(
    concurrency: int | None,
    answers: Sequence[Answer],
    failures: Mapping[str, int],
    duration: float,
    request_rate: float | None = None,
) -> dict[str, Any]:
    """Return the numbers of one row.

    Args:
        concurrency: Requests at once; None in an open loop.
        answers: Those that are complete.
        failures: How many requests failed, by why.
        duration: Seconds from the first request to the last end.
        request_rate: Requests that started per second, in the mean; None in a closed loop.

    Returns:
        ``concurrency``, ``request_rate``, counts (``requests``, of them ``completed`` and ``failed``,
        ``failures``, ``short``, and ``counted_by_chunks``: answers whose tokens the server did not tell),
        ``duration_s``, rates ``*_per_s``, means ``*_tokens_mean``, mean and percentiles ``*_ms`` and
        ``prefix_hit_rate``; None is what cannot be known.
    """
    prompt_tokens = [answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None]
    output_tokens = [answer.output_tokens for answer in answers]
    # A prompt of which nothing was cached has no such number with some servers that tell it otherwise.
    cached_tokens = [answer.cached_tokens for answer in answers if answer.cached_tokens is not None]
    knows_prompts = bool(answers) and len(prompt_tokens) == len(answers)
    ttft = [answer.first_token_time - answer.sent for answer in answers]
    tpot = [
        (answer.ended - answer.first_token_time) / (answer.output_tokens - 1)
        for answer in answers
        if answer.output_tokens > 1
    ]
    itl = [later - earlier for answer in answers for earlier, later in pairwise(answer.text_times)]
    latency = [answer.ended - answer.sent for answer in answers]
    return {
        "concurrency": concurrency,
        "request_rate": request_rate,
        "requests": len(answers) + sum(failures.values()),
        "completed": len(answers),
        "failed": sum(failures.values()),
        "failures": dict(failures),
        "short": sum(answer.is_short for answer in answers),
        "counted_by_chunks": sum(answer.told_tokens is None for answer in answers),
        "duration_s": duration,
        "input_tokens_mean": sum(prompt_tokens) / len(answers) if knows_prompts else None,
        "output_tokens_mean": sum(output_tokens) / len(answers) if answers else None,
        "requests_per_s": len(answers) / duration,
        "input_tokens_per_s": sum(prompt_tokens) / duration if knows_prompts else None,
        "output_tokens_per_s": sum(output_tokens) / duration,
        "ttft_ms": _distribution(ttft),
        "tpot_ms": _distribution(tpot),
        "itl_ms": _distribution(itl),
        "latency_ms": _distribution(latency),
        "prefix_hit_rate": (
            sum(cached_tokens) / sum(prompt_tokens) if cached_tokens and sum(prompt_tokens) else None
        ),
    }


def _distribution(seconds: Sequence[float]) -> dict[str, float] | None:
    """Return mean and percentiles in milliseconds, None of nothing."""
    if not seconds:
        return None
    values = [np.mean(seconds), *np.percentile(seconds, PERCENTILES)]
    names = ["mean", *(f"p{percent}" for percent in PERCENTILES)]
    return {name: 1000 * float(value) for name, value in zip(names, values, strict=True)}


def load_name(concurrency: int | None, request_rate: float | None) -> str:
    """Return what a row is called."""
    return f"concurrency {concurrency}" if request_rate is None else f"request rate {request_rate:g}"


def _load(row: dict[str, Any]) -> str:
    return load_name(row["concurrency"], row["request_rate"])


def _number(name: str, form: str = ".1f") -> Callable[[dict[str, Any]], str]:
    return lambda row: "-" if row[name] is None else format(row[name], form)


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "load": _load,
    "completed": _number("completed", "d"),
    "failed": _number("failed", "d"),
    "short": _number("short", "d"),
    "in": _number("input_tokens_mean"),
    "out": _number("output_tokens_mean"),
    "s": _number("duration_s", ".2f"),
    "requests/s": _number("requests_per_s", ".2f"),
    "in tok/s": _number("input_tokens_per_s"),
    "out tok/s": _number("output_tokens_per_s"),
    "hits": _number("prefix_hit_rate", ".1%"),
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return counts and rates, then the times, as Markdown tables that also read well as plain text."""
    rates = [list(COLUMNS), *([show(row) for show in COLUMNS.values()] for row in rows)]
    times = [["load", "ms", "mean", *(f"p{percent}" for percent in PERCENTILES)]]
    for row in rows:
        for title, name in TIMES.items():
            values = row[name]
            cells = (
                [f"{value:.1f}" for value in values.values()] if values else (len(PERCENTILES) + 1) * ["-"]
            )
            times.append([_load(row), title, *cells])
    return "\n".join([*format_table(rates), "", *format_table(times)])


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what the table alone would hide: why requests failed, and how tokens were counted."""
    lines = [LEGEND]
    chunked = sum(row["counted_by_chunks"] for row in rows)
    if chunked:
        lines.append(
            f"The server did not tell the tokens of {chunked} answers. Their chunks with text were counted, "
            "and short are those that did not end for their length."
        )
    for row in rows:
        lines += [f"{_load(row)}: {count} failed: {reason}" for reason, count in row["failures"].items()]
    return lines
