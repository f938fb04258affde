"""benchmark_overhead.py: each token in a chunk of its own, and what the server costs beside the model."""

from __future__ import annotations

import asyncio
import json

import benchmark_overhead
import pytest

# A fifth, and five times, of what the server must reach on two cores, as a machine of tests is shared.
MIN_CHUNKS_PER_SECOND = 1600
MAX_ADDED_MS = 10


def test_many_streams_are_fast_and_one_request_is_answered_soon(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark_overhead.main(["--streams", "64", "--max-tokens", "64", "--requests", "50", "--repeats", "3"])
    *_, heading, _, chat, plain, last = capsys.readouterr().out.splitlines()
    assert [line.count("|") for line in (heading, chat, plain)] == [7] * 3
    rows = json.loads(last)["rows"]
    assert [row["endpoint"] for row in rows] == ["chat/completions", "completions"]
    for row in rows:
        assert row["chunks_per_second"] >= MIN_CHUNKS_PER_SECOND
        assert 0 < row["added_ms"] <= MAX_ADDED_MS


def test_chunks_are_counted_however_the_stream_is_cut() -> None:
    event = b'1f\r\ndata: {"text": "data: \\n"}\n\n\r\n'
    stream = b"200 OK\r\n\r\n" + event * 3 + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

    async def count(size: int) -> int:
        counter = benchmark_overhead.ChunkCounter(b"")
        for start in range(0, len(stream), size):
            assert not counter.done.done()
            counter.data_received(stream[start : start + size])
        assert counter.done.done()
        return counter.num_events

    assert [asyncio.run(count(size)) for size in range(1, len(stream) + 1)] == [4] * len(stream)
