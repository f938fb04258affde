"""The start-up lines tell the measured figures, aligned."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from turboquant_core import BitPlan
from turboquant_server import startup_report
from turboquant_server.cache_plan import CachePlan
from turboquant_server.cache_probe import CacheMeasurement, CacheSize
from turboquant_server.startup_report import format_report


@pytest.fixture(autouse=True)
def one_gibibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup_report, "free_memory", lambda device: 2**30)


MEASUREMENT = CacheMeasurement(
    compressed=CacheSize(num_tokens=1024, num_bytes=2**20, bytes_per_token=256),
    bf16=CacheSize(num_tokens=1024, num_bytes=2**21, bytes_per_token=1024),
    bits_per_value=7.8281,
    bits_per_further_value=4.375,
)


def test_the_lines_are_aligned_and_exact(tiny_model: PreTrainedModel) -> None:
    report = format_report("tiny", tiny_model, "int8", 1.234, CachePlan(4, 4), MEASUREMENT, 2048)
    assert report.splitlines() == [
        "model      tiny (llama, 471K parameters, weights in int8, float32 on cpu)",
        "loaded in  1.2 s",
        "context    2,048 tokens",
        "KV cache   4-bit codes, 4.375 bits per value with norms and means; "
        "7.83 measured at 1,024 tokens, the first and the newest in float32",
        f"room for   {1024 + (2**30 - 2**20) // 256:,} tokens in 1.0 GiB (50% of the available memory), "
        f"against {1024 + (2**30 - 2**21) // 1024:,} in bfloat16",
    ]


def test_bits_of_keys_and_values_are_told_apart(tiny_model: PreTrainedModel) -> None:
    lines = format_report("tiny", tiny_model, "none", 1, CachePlan(4, 3), MEASUREMENT, 2048).splitlines()
    assert len(lines) == 5
    assert lines[3] == (
        "KV cache   keys in 4-bit codes, values in 3-bit codes, 4.375 bits per value with norms and means; "
        "7.83 measured at 1,024 tokens, the first and the newest in float32"
    )


def test_a_plan_is_told_layer_by_layer_in_order(tiny_model: PreTrainedModel) -> None:
    bit_plan = BitPlan({10: (2, 8), 2: (4, 3), 0: (8, 2)}, bits_per_value=4.375, divergence=0.01)
    plan = CachePlan(4, 4, bit_plan)
    lines = format_report("tiny", tiny_model, "none", 1, plan, MEASUREMENT, 2048).splitlines()
    assert len(lines) == 7
    assert lines[3] == (
        "KV cache      codes of 2 to 8 bits by layer, 4.375 bits per value with norms and means; "
        "7.83 measured at 1,024 tokens, the first and the newest in float32"
    )
    assert lines[4:6] == ["  key bits    8 4 2", "  value bits  2 3 8  (layers in order)"]
    assert all(line[14] != " " and line[13] == " " for line in lines)


def test_a_model_that_forgets_has_room_for_any_number_of_tokens(tiny_model: PreTrainedModel) -> None:
    size = CacheSize(1024, 1000, 0)
    measurement = CacheMeasurement(size, size, 5, 0)
    report = format_report("tiny", tiny_model, "none", 1, CachePlan(4, 4), measurement, 2048)
    assert "room for   any number of tokens in 1.0 GiB" in report


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (123_456, "123K"), (13_382_016, "13.4M"), (8_030_261_248, "8.03B")]
)
def test_parameters_have_three_digits(number: int, text: str) -> None:
    assert startup_report._format_count(number) == text
