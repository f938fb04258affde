"""What the load generator makes of answers whose times are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_client import Answer
from serving_table import TIMES, summarize, table


def answer(sent: float, times: list[float], ended: float, tokens: int, **details: Any) -> Answer:
    usage = {"prompt_tokens": 10, "completion_tokens": tokens, "prompt_tokens_details": details or None}
    return Answer(8, sent, times, ended, "length", usage)


def test_a_chunk_of_several_tokens_counts_once_between_chunks_and_wholly_per_token() -> None:
    row = summarize(1, [answer(1.0, [1.5, 1.7, 2.0], 2.1, 7)], {}, 2.0)
    for name, seconds in {"ttft": 0.5, "tpot": 0.1, "itl": 0.25, "latency": 1.1}.items():
        assert row[f"{name}_ms"]["p50"] == pytest.approx(1000 * seconds), name
    assert row["itl_ms"]["p99"] == pytest.approx(299)
    assert row["output_tokens_per_s"] == 3.5 and row["input_tokens_per_s"] == 5
    assert row["short"] == 1 and row["prefix_hit_rate"] is None


def test_percentiles_are_over_requests() -> None:
    row = summarize(1, [answer(0.0, [i / 1000], 1.0, 1) for i in range(101)], {}, 1.0)
    assert row["ttft_ms"] == pytest.approx({"mean": 50, "p50": 50, "p90": 90, "p95": 95, "p99": 99})
    assert row["tpot_ms"] is row["itl_ms"] is None, "an answer of one token has no second"


def test_a_server_may_leave_out_that_nothing_was_cached() -> None:
    answers = [answer(0.0, [1.0], 1.0, 1, cached_tokens=5), answer(0.0, [1.0], 1.0, 1)]
    assert summarize(1, answers, {}, 1.0)["prefix_hit_rate"] == 0.25


def test_an_answer_without_text_came_with_its_end() -> None:
    row = summarize(1, [answer(0.0, [], 0.5, 1)], {}, 1.0)
    assert row["ttft_ms"]["p50"] == row["latency_ms"]["p50"] == 500


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=50))
def test_percentiles_lie_between_the_nearest_two_times(seconds: list[float]) -> None:
    found = summarize(1, [answer(0.0, [second], 1000.0, 1) for second in seconds], {}, 1.0)["ttft_ms"]
    ordered = sorted(seconds)
    for percent in (50, 90, 95, 99):
        place = percent / 100 * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        expected = 1000 * (low + (high - low) * (place - math.floor(place)))
        assert found[f"p{percent}"] == pytest.approx(expected, abs=1e-6)
    assert found["mean"] == pytest.approx(1000 * math.fsum(seconds) / len(seconds), abs=1e-6)


def test_tables_are_aligned_and_show_every_time() -> None:
    closed = summarize(4, [answer(1.0, [1.5, 1.7, 2.0], 2.1, 7)], {}, 2.0)
    open_loop = summarize(None, [], {"broken": 2}, 2.0, request_rate=2.5)
    rates, times = (part.splitlines() for part in table([closed, open_loop]).split("\n\n"))
    assert len({len(line) for line in rates}) == len({len(line) for line in times}) == 1
    assert len(rates) == 2 + 2 and len(times) == 2 + 2 * len(TIMES)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in times]
    assert cells[2] == ["concurrency 4", "TTFT", *5 * ["500.0"]]
    assert cells[-1] == ["request rate 2.5", "e2e", *5 * ["-"]]
