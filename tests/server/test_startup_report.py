"""The start-up lines tell what was loaded and what the cache holds, aligned, in figures that add up."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import PreTrainedModel

from turboquant_core import BitPlan, Visibility
from turboquant_server import startup_report
from turboquant_server.cache_plan import CachePlan
from turboquant_server.cache_size import CacheSize
from turboquant_server.startup_report import format_report

# A token has 2 layers of 2 heads with keys and values of 64 numbers: 512 numbers.
SIZE = CacheSize(
    groups=(Visibility(),),
    num_slots=10,
    num_blocks=(100,),
    exact_bytes=196 * 512 * 4,
    state_bytes=0,
    block_bytes=(64 * 512 * 4385 // 8000,),
    bf16_block_bytes=(64 * 512 * 2,),
)
NUM_TOKENS = 100 * 64 + 10 * 196


# Without codes, of a model in 16 bits.
EXACT_SIZE = dataclasses.replace(SIZE, exact_bytes=196 * 512 * 2, block_bytes=(64 * 512 * 2,))


def report(model: PreTrainedModel, plan: CachePlan, size: CacheSize = SIZE, **weights: str) -> list[str]:
    weights = {"load_format": "auto", "quantize": "none", **weights}
    *lines, answers = format_report(
        "tiny",
        model,
        load_seconds=1.234,
        chat_format="as hermes",
        cache_plan=plan,
        cache_size=size,
        max_model_len=2048,
        **weights,
    ).splitlines()
    assert answers.split("  ")[0] == "answers" and answers.endswith("  as hermes")
    return lines


def test_the_lines_are_aligned_and_exact(tiny_model: PreTrainedModel) -> None:
    num_bytes = 10 * 196 * 512 * 4 + 100 * 17_960
    assert report(tiny_model, CachePlan(4, 4), quantize="int8") == [
        "model      tiny (llama, 471K parameters, weights in int8, float32 on cpu)",
        "loaded in  1.2 s",
        "context    2,048 tokens",
        f"KV cache   4-bit codes, {17_960 * 8 / (64 * 512):.3f} bits per value; a request's first 4 and "
        "newest 128 tokens stay float32",
        f"memory     {num_bytes / 2**20:.2f} MiB for {NUM_TOKENS:,} tokens; in bfloat16 it would hold "
        f"{num_bytes // (512 * 2):,}",
        # The prompt's part up to 4 + 3 * 512 tokens is in 24 blocks, that of an answer in as many as 29.
        "requests   up to 10 at a time, 3 of full context",
    ]


def test_random_weights_are_told(tiny_model: PreTrainedModel) -> None:
    line = report(tiny_model, CachePlan(4, 4), load_format="dummy")[0]
    assert line == "model      tiny (llama, 471K parameters, random weights, float32 on cpu)"


def test_bits_of_keys_and_values_are_told_apart(tiny_model: PreTrainedModel) -> None:
    lines = report(tiny_model, CachePlan(4, 3))
    assert lines[3].startswith(
        "KV cache   keys in 4-bit codes, values in 3-bit codes, 4.385 bits per value; "
    )
    assert len(lines) == 6


def test_a_plan_is_told_layer_by_layer_in_order(tiny_model: PreTrainedModel) -> None:
    bit_plan = BitPlan({10: (2, 8), 2: (4, 3), 0: (8, 2)}, bits_per_value=4.375, divergence=0.01)
    lines = report(tiny_model, CachePlan(4, 4, bit_plan))
    assert len(lines) == 8
    assert lines[3].startswith("KV cache      codes of 2 to 8 bits by layer, 4.385 bits per value; ")
    assert lines[4:6] == ["  key bits    8 4 2", "  value bits  2 3 8  (layers in order)"]
    assert all(line[14] != " " and line[13] == " " for line in lines)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_in_the_models_type_claims_no_compression(
    tiny_model: PreTrainedModel, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    lines = report(copy.deepcopy(tiny_model).to(dtype), CachePlan(16, 16, exact_dtype=dtype), EXACT_SIZE)
    assert lines[0].endswith(f" {name} on cpu)")
    assert lines[3:5] == [
        f"KV cache   {name}, not compressed, 16.000 bits per value",
        f"memory     {NUM_TOKENS * 512 * 2 / 2**20:.2f} MiB for {NUM_TOKENS:,} tokens",
    ]
    assert len(lines) == 6


def test_a_model_in_float32_is_told_that_its_cache_is_rounded(tiny_model: PreTrainedModel) -> None:
    size = dataclasses.replace(EXACT_SIZE, exact_bytes=SIZE.exact_bytes)
    lines = report(tiny_model, CachePlan(16, 16, exact_dtype=torch.bfloat16), size)
    num_bytes = 10 * 196 * 512 * 4 + 100 * 64 * 512 * 2
    assert lines[3:5] == [
        "KV cache   float32 rounded to bfloat16, 16.000 bits per value; a request's first 4 and newest 128 "
        "tokens stay float32",
        f"memory     {num_bytes / 2**20:.2f} MiB for {NUM_TOKENS:,} tokens",
    ]


@pytest.mark.parametrize(
    ("num_slots", "num_blocks", "text"),
    [
        (3, 29 * 3, "up to 3 at a time, even of full context"),
        (3, 29 * 3 - 1, "up to 3 at a time, 2 of full context"),
        (1, 29, "one at a time"),
        (1000, 29 * 1000, "up to 1,000 at a time, even of full context"),
    ],
)
def test_requests_are_counted_at_any_and_at_full_length(
    tiny_model: PreTrainedModel, num_slots: int, num_blocks: int, text: str
) -> None:
    size = dataclasses.replace(SIZE, num_slots=num_slots, num_blocks=(num_blocks,))
    assert report(tiny_model, CachePlan(4, 4), size)[-1] == f"requests   {text}"


def test_a_model_that_only_has_states_claims_no_tokens(tiny_model: PreTrainedModel) -> None:
    size = CacheSize((), 10, (), 0, 2**20, (), ())
    assert report(tiny_model, CachePlan(4, 4), size)[3:] == [
        "KV cache   none, only states of recurrent layers",
        "memory     11.00 MiB of states",
        "requests   up to 10 at a time, even of full context",
    ]


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (123_456, "123K"), (13_382_016, "13.4M"), (8_030_261_248, "8.03B")]
)
def test_parameters_have_three_digits(number: int, text: str) -> None:
    assert startup_report._format_count(number) == text
