"""The bundled model keeps what its card says of it, in full precision and compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_quality import evaluate, open_cache_factory
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).resolve().parents[1] / "turboquant_server" / "demo"


def measure(settings: list[str], context: int, num_windows: int, samples: int) -> dict[str, dict[str, Any]]:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    caches = {
        setting: open_cache_factory(setting, model, tokenizer, context) for setting in ["bf16", *settings]
    }
    text = (DEMO / "held_out.txt").read_text("utf-8")
    return evaluate(model, tokenizer, text, caches, context=context, samples=samples, max_windows=num_windows)


def test_four_bits_recall_and_predict_at_one_thousand_tokens() -> None:
    results = measure(["4"], context=1024, num_windows=2, samples=2)
    for result in results.values():
        assert {cell["length"] for cell in result["needle"]} == {1024}
        assert all(cell["exact"] == 1 for cell in result["needle"])
    assert results["4"]["perplexity"] < 1.01 * results["bf16"]["perplexity"]
    assert results["4"]["kld_mean"] < 0.005


@pytest.mark.long
def test_four_and_two_bits_recall_and_predict_at_eight_thousand_tokens() -> None:
    results = measure(["4", "2"], context=8192, num_windows=1, samples=1)
    for kv, (most_change, most_kld) in {"4": (0.005, 0.004), "2": (0.05, 0.05)}.items():
        assert results[kv]["perplexity"] < (1 + most_change) * results["bf16"]["perplexity"], kv
        assert results[kv]["kld_mean"] < most_kld, kv
        assert len(results[kv]["needle"]) == 4 * 5
        assert all(cell["exact"] == 1 for cell in results[kv]["needle"]), kv
