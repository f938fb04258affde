"""Our cache beside other schemes, on the demo model and on the stress models, in one run.

    scripts/test --long -s tests/quality/test_side_by_side.py

On a GPU 53,000 predictions at 4,096 to 8,191 tokens of context, as in the README; without one a small part of
it. Prints the divergences as a table and, last, one JSON object.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from alternatives import ALTERNATIVES, SchemeCache
from quality_predictions import Predictions
from quality_reader import CacheReader
from stress_models import STRESS_MODELS
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel

from turboquant_core import TurboQuantCache, block_quantizer, measure_transforms, plan_bits

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "turboquant_server/demo"
SAMPLE_TEXT = ROOT / "turboquant_server/sample_text.txt"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_WINDOWS, CONTEXT = (13, 8192) if DEVICE == "cuda" else (1, 1024)
SAMPLE_SHAPE = (4, 1088)
BITS = ("4", "4:3", "3", "2")
BUDGETS = {"budget of 3bit_nc": 3.1875, "budget of 4 bits": 4.252, "budget of 3 bits": 3.252}
# Models that all schemes are measured on; the others are for vLLM's, which is nearest to ours.
FULLY_MEASURED = ("demo", "key bias 600")
# What uniform bits must reach on the demo model; on the stress models half as much again.
TARGETS = {"4": 0.002, "4:3": 0.004, "3": 0.007, "2": 0.025}

Results = dict[str, dict[str, float]]  # by cache and model


def windows_of(text: str, shape: tuple[int, int], prefix: list[int]) -> Tensor:
    """Return ``[num_windows, num_tokens]`` of a text, each window with the prefix in front."""
    token_ids = AutoTokenizer.from_pretrained(DEMO)(text, verbose=False)["input_ids"]
    width = shape[1] - len(prefix)
    rows = [[*prefix, *token_ids[i * width : (i + 1) * width]] for i in range(shape[0])]
    return torch.tensor(rows, device=DEVICE)


@contextmanager
def no_centring() -> Iterator[None]:
    """Store means of zero."""
    quantized_means = block_quantizer._quantized_means

    def zeros(y: Tensor) -> tuple[Tensor, Tensor]:
        means, steps = quantized_means(y)
        return torch.zeros_like(means), torch.zeros_like(steps)

    block_quantizer._quantized_means = zeros
    try:
        yield
    finally:
        block_quantizer._quantized_means = quantized_means


def open_caches(model: PreTrainedModel, name: str, sample: Tensor) -> dict[str, Callable[[], Cache]]:
    """Return what opens the caches of a model: ours as the server makes them, and other schemes'."""
    transforms = measure_transforms(model, sample)
    ours = functools.partial(TurboQuantCache, config=model.config)
    caches: dict[str, Callable[[], Cache]] = {}
    for bits in BITS:
        keys, _, values = bits.partition(":")
        rotated = functools.partial(ours, key_bits=int(keys), value_bits=int(values or keys))
        caches[bits] = functools.partial(rotated, transforms=transforms)
        if name == "demo":
            caches[f"{bits}, random rotation"] = rotated
    for budget_name, budget in BUDGETS.items() if name == "demo" else [*BUDGETS.items()][:1]:
        plan = plan_bits(model, sample, budget, context=CONTEXT, transforms=transforms)
        caches[budget_name] = functools.partial(ours, layer_bits=plan.layer_bits, transforms=transforms)
    for scheme_name, scheme in ALTERNATIVES.items():
        if name in FULLY_MEASURED or "vLLM" in scheme_name:
            caches[scheme_name] = functools.partial(SchemeCache, model.config, scheme)
    return caches


def measure(model: PreTrainedModel, model_name: str, found: Results) -> None:
    """Add the divergence of each cache of a model to the results, and print all that was measured."""
    prefix = [model.config.vocab_size - 1] if model_name == "sinks" else []
    windows = windows_of((DEMO / "held_out.txt").read_text("utf-8"), (NUM_WINDOWS, CONTEXT), prefix)
    sample = windows_of(SAMPLE_TEXT.read_text("utf-8"), SAMPLE_SHAPE, prefix)
    reader = CacheReader(model, tqdm(disable=True))
    exact = functools.partial(DynamicCache, config=model.config)
    reference = Predictions().add(reader, exact, windows, None)
    caches = open_caches(model, model_name, sample)
    uncentred = "4, no means"
    for name in (*caches, uncentred):
        predictions = Predictions()
        with no_centring() if name == uncentred else nullcontext():
            predictions.add(reader, caches["4" if name == uncentred else name], windows, reference)
        summary = predictions.summary()
        found.setdefault(name, {"bits": predictions.bits[0]})[model_name] = summary["kld_mean"]
        print(json.dumps({"model": model_name, "cache": name, **summary}), flush=True)


@pytest.fixture(scope="module")
def results() -> Results:
    torch.set_float32_matmul_precision("highest")
    demo = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).to(DEVICE).eval()
    found: Results = {}
    measure(demo, "demo", found)
    for name, change in STRESS_MODELS.items():
        measure(change(demo).to(DEVICE), name, found)
    show(found, ["bits", "demo", *STRESS_MODELS])
    return found


def show(results: Results, columns: list[str]) -> None:
    width = max(map(len, results))
    print("\n" + "mean KLD".ljust(width) + "".join(column.rjust(18) for column in columns))
    for name, row in results.items():
        cells = (f"{row[column]:.5f}" if column in row else "" for column in columns)
        print(name.ljust(width) + "".join(cell.rjust(18) for cell in cells))
    print(json.dumps({"context": CONTEXT, "windows": NUM_WINDOWS, "device": DEVICE, "results": results}))


@pytest.mark.parametrize("bits", TARGETS)
def test_every_model_keeps_its_predictions(results: Results, bits: str) -> None:
    found = results[bits]
    assert found["demo"] <= TARGETS[bits]
    for model in STRESS_MODELS:
        assert found[model] <= 1.5 * TARGETS[bits], model


def test_means_carry_models_with_offsets(results: Results) -> None:
    for model in ("key bias 200", "key bias 600", "common mean"):
        assert results["4, no means"][model] > 20 * results["4"][model], model


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("4:3", "vLLM 4bit_nc"),
        ("budget of 3bit_nc", "vLLM 3bit_nc"),
        ("4", "vLLM 4bit_nc, one bf16 layer at each end"),
        ("3", "vLLM 3bit_nc, one bf16 layer at each end"),
    ],
)
def test_a_fifth_of_vllms_divergence_in_no_more_bytes(results: Results, ours: str, theirs: str) -> None:
    assert results[ours]["bits"] <= results[theirs]["bits"]
    assert results[ours]["demo"] <= results[theirs]["demo"] / 2
    for model in STRESS_MODELS:
        assert results[ours][model] <= results[theirs][model] / 5, model


@pytest.mark.parametrize("bits", ["4", "3"])
def test_a_budget_beats_uniform_bits_of_the_same_size(results: Results, bits: str) -> None:
    assert results[f"budget of {bits} bits"]["bits"] <= results[bits]["bits"]
    assert results[f"budget of {bits} bits"]["demo"] <= 0.8 * results[bits]["demo"]
