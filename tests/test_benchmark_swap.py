"""benchmark_swap.py: a prompt is computed, found, and found once more on the host only."""

from __future__ import annotations

import json

import benchmark_swap
import pytest


def test_a_prompt_comes_back_from_the_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_swap, "WARM_UP_LENGTH", 700)
    arguments = ["--length", "1k", "--repeats", "1", "--swap-space", "20MiB", "--kv-cache-memory", "20MiB"]
    benchmark_swap.main(arguments)
    *_, table_row, _, _, line = capsys.readouterr().out.splitlines()
    [row] = json.loads(line)["rows"]
    assert (row["prompt"], row["found"]) == (1024, 4 + 512)
    assert row["computed_ms"] > 0 and row["gpu_ms"] > 0 and row["host_ms"] > 0
    assert row["host_bytes"] > 0 and row["host_bytes"] % 8 == 0
    assert table_row.startswith("|  1,024 |   516 |")


def test_a_space_that_is_too_small_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^benchmark_swap.py: --swap-space of .+ holds not even 64 tokens"):
        benchmark_swap.main(["--swap-space", "16", "--kv-cache-memory", "20MiB"])
