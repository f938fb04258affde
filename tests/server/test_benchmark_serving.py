"""The load generator against the real server: it counts as the server does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from benchmark_serving import main

if TYPE_CHECKING:
    from conftest import RunningServer


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_every_answer_has_its_length(
    server: RunningServer, endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ["--num-requests=4", "--concurrency=2", "--input-tokens=100", "--output-tokens=6"]
    with pytest.raises(SystemExit) as exit:
        main(["--base-url", f"{server.url}/v1", "--endpoint", endpoint, *load])
    assert exit.value.code == 0
    [row] = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (row["failed"], row["short"], row["counted_by_chunks"]) == (0, 0, 0)
    assert row["output_tokens_mean"] == 6
    assert row["input_tokens_mean"] == pytest.approx(100, rel=0.1)
    assert row["ttft_ms"]["p50"] <= row["latency_ms"]["p50"]
