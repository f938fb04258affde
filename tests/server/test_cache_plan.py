"""The cache is planned on the text that comes along, cut as requests will be, within its budget.

More than 300 lines, for all the ways in which a sample may be cut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import MptConfig, MptForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from turboquant_core import BitPlan, ExactCodec, LayerShape, LayerTransforms, Visibility, rotation
from turboquant_server import cache_plan
from turboquant_server.attention_check import ModelAttention, UnsupportedModelError
from turboquant_server.cache_plan import LARGE_FOR_A_CPU, SAMPLE_TEXT, CachePlan, plan_cache
from turboquant_server.config import ServerConfig
from turboquant_server.load_error import ModelLoadError

pytestmark = pytest.mark.usefixtures("no_variables")

Sampled = Callable[..., Tensor]


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan on the one window that large models get on a CPU, for speed."""
    monkeypatch.setattr(cache_plan, "LARGE_FOR_A_CPU", 0)


@pytest.fixture
def sampled(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Sampled:
    """Plan a cache and return the tokens that it was measured on."""
    samples = []

    def measure(model: PreTrainedModel, input_ids: Tensor) -> dict[int, LayerTransforms]:
        samples.append(input_ids)
        return {}

    def sampled(max_model_len: int = 2048, tokenizer: PreTrainedTokenizerFast | None = None) -> Tensor:
        plan_cache(ServerConfig(), tiny_model, tokenizer or tiny_tokenizer, max_model_len)
        return samples.pop()

    monkeypatch.setattr(cache_plan, "measure_transforms", measure)
    return sampled


@pytest.fixture
def text(tiny_tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens of the sample text, nothing before them."""
    return list(tiny_tokenizer(SAMPLE_TEXT.read_text("utf-8"), add_special_tokens=False)["input_ids"])


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts special tokens around every text, 1 for [A] and 2 for [B]."""
    changed = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("[A]", 1), ("[B]", 2)]
    )
    return changed


def test_the_sample_is_four_windows_of_the_text_in_order(sampled: Sampled, text: list[int]) -> None:
    sample = sampled()
    assert sample.shape == (4, 1088)
    assert sample.flatten().tolist() == text[: 4 * 1088]


@pytest.mark.parametrize(
    ("template", "prefix"),
    [("[A] $A", [1]), ("[A] [B] $A", [1, 2]), ("[A] $A [B]", [1]), ("$A [B]", []), ("$A", [])],
)
def test_every_window_begins_as_the_tokenizer_begins_a_text(
    sampled: Sampled,
    text: list[int],
    tiny_tokenizer: PreTrainedTokenizerFast,
    template: str,
    prefix: list[int],
) -> None:
    sample = sampled(tokenizer=with_template(tiny_tokenizer, template))
    assert sample.shape == (4, 1088)
    assert sample[:, : len(prefix)].tolist() == [prefix] * 4
    assert sample[:, len(prefix) :].flatten().tolist() == text[: 4 * (1088 - len(prefix))]


@pytest.mark.parametrize("max_model_len", [2, 100, 1087])
def test_no_window_is_longer_than_the_context(
    sampled: Sampled, text: list[int], tiny_tokenizer: PreTrainedTokenizerFast, max_model_len: int
) -> None:
    sample = sampled(max_model_len, with_template(tiny_tokenizer, "[A] $A"))
    assert sample.shape == (4, max_model_len)
    assert sample[:, 0].tolist() == [1] * 4
    assert sample[:, 1:].flatten().tolist() == text[: 4 * (max_model_len - 1)]


@pytest.mark.parametrize(
    ("num_characters", "shape"), [(300, (1, 301)), (1087, (1, 1088)), (2500, (2, 1088)), (4348, (4, 1088))]
)
def test_a_text_that_is_too_short_for_four_makes_fewer_whole_windows(
    sampled: Sampled,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    num_characters: int,
    shape: tuple[int, int],
) -> None:
    text = tmp_path / "text"
    text.write_text("§" * (num_characters // 2) + "x" * (num_characters % 2), "utf-8")  # a token a byte
    monkeypatch.setattr(cache_plan, "SAMPLE_TEXT", text)
    assert sampled(tokenizer=with_template(tiny_tokenizer, "[A] $A")).shape == shape


@pytest.mark.usefixtures("small_sample")
def test_a_large_model_on_a_cpu_gets_one_small_window(sampled: Sampled, text: list[int]) -> None:
    assert sampled().tolist() == [text[:512]]


def test_a_model_is_large_above_a_number_of_parameters(
    sampled: Sampled, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_plan, "LARGE_FOR_A_CPU", tiny_model.num_parameters())
    assert sampled().shape == (4, 1088)
    monkeypatch.setattr(cache_plan, "LARGE_FOR_A_CPU", tiny_model.num_parameters() - 1)
    assert sampled().shape == (1, 512)
    assert LARGE_FOR_A_CPU == 100_000_000


def test_a_large_model_elsewhere_gets_the_whole_sample(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples: list[Tensor] = []
    monkeypatch.setattr(cache_plan, "measure_transforms", lambda model, sample: samples.append(sample) or {})
    model: Any = SimpleNamespace(device=torch.device("meta"), num_parameters=lambda: 10**12)
    plan_cache(ServerConfig(), model, tiny_tokenizer, 2048)
    assert samples[0].shape == (4, 1088) and samples[0].device == model.device


def test_the_text_fills_the_sample_of_a_tokenizer_of_long_words() -> None:
    # Even at 3.6 characters a token, more than English takes on average with any current tokenizer.
    assert len(SAMPLE_TEXT.read_text("utf-8")) > 4 * 1088 * 3.6


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_a_cache_of_16_bits_has_the_models_type_if_that_has_16_bits_and_nothing_is_measured(
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    kept: torch.dtype,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was measured")

    for name in ("sample_windows", "measure_transforms", "plan_bits"):
        monkeypatch.setattr(cache_plan, name, fail)
    model: Any = SimpleNamespace(dtype=dtype)
    plan = plan_cache(ServerConfig(kv_cache_dtype="bf16"), model, tiny_tokenizer, 2048)
    assert (plan.bit_plan, plan.transforms) == (None, {})
    dims = (64, 32), (8, 40)
    codecs = [layer.codec for _, layer in sorted(plan.store_layers(attention_of(*dims)).items())]
    for codec, (key_dim, value_dim) in zip(codecs, dims, strict=True):
        assert isinstance(codec, ExactCodec) and codec.dtype == kept
        keys, values = torch.randn(2, 1, 64, key_dim), torch.randn(2, 1, 64, value_dim)
        for stored, states in zip(codec.decode(codec.encode(keys, values)), (keys, values), strict=True):
            assert torch.equal(stored, states.to(kept).float())


@pytest.mark.usefixtures("small_sample")
@pytest.mark.parametrize(
    ("arguments", "bits"),
    [({}, (4, 4)), ({"bits": 3}, (3, 3)), ({"kv_bits": "8,2"}, (8, 2))],
    ids=str,
)
def test_without_a_budget_all_layers_have_the_bits_that_were_asked_for(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, Any],
    bits: tuple[int, int],
) -> None:
    plan = plan_cache(ServerConfig(**arguments), tiny_model, tiny_tokenizer, 2048)
    assert (plan.key_bits, plan.value_bits, plan.bit_plan) == (*bits, None)
    assert set(plan.transforms) == {0, 1}
    assert bits_of(plan) == [bits, bits]


def attention_of(*dims: tuple[int, int]) -> ModelAttention:
    """Layers with keys and values of these dimensions, by pairs; every second one sees a window."""
    return ModelAttention(
        True,
        False,
        {index: LayerShape(2, key_dim, value_dim) for index, (key_dim, value_dim) in enumerate(dims)},
        {index: Visibility(window=8 if index % 2 else None) for index in range(len(dims))},
    )


def bits_of(plan: CachePlan) -> list[tuple[int, int]]:
    """Return the bits of keys and values, by layer, by the bytes of a block of one head."""
    layers = plan.store_layers(attention_of((64, 64), (64, 64)))
    bits = []
    for _, layer in sorted(layers.items()):
        quantizers: Any = layer.codec._quantizers  # type: ignore[union-attr]
        bits.append((quantizers[0].bits, quantizers[1].bits))
        # Codes, a 16-bit norm of each token, and a mean of 8 bits a number and its 16-bit step.
        num_bytes = 64 * 64 * sum(bits[-1]) // 8 + 2 * (64 * 2 + 64 + 2)
        assert num_bytes <= layer.codec.record_bytes < 1.01 * num_bytes
    return bits


def test_a_layer_is_stored_as_it_was_found() -> None:
    layers = CachePlan(4, 3).store_layers(attention_of((64, 32), (16, 128), (24, 16)))
    assert [(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in layers.values()] == [
        (2, 64, 32),
        (2, 16, 128),
        (2, 24, 16),
    ]
    assert [layer.group for layer in layers.values()] == [0, 1, 0]


@pytest.mark.parametrize("dims", [(8, 64), (64, 15)])
def test_heads_that_are_too_small_are_refused(dims: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        CachePlan(4, 4).store_layers(attention_of((64, 64), dims))
    assert str(caught.value) == f"its heads are too small (dim must be at least 16, got {min(dims)})"


def test_layers_use_their_transforms_and_rotations_where_they_have_none() -> None:
    own = rotation(64, 7)
    plan = CachePlan(8, 8, transforms={1: LayerTransforms(own, None)})
    layers = plan.store_layers(attention_of((64, 64), (64, 64)))
    used: Any = [[q.transform for q in layer.codec._quantizers] for layer in layers.values()]  # type: ignore[union-attr]
    assert used[1][0] is own
    probes = torch.randn(5, 64)
    for transform in (*used[0], used[1][1]):
        assert torch.equal(transform.apply(probes), rotation(64, 0).apply(probes))


def test_layers_get_the_bits_of_their_plan_and_others_those_of_all() -> None:
    bit_plan = BitPlan({0: (8, 3), 1: (2, 4)}, bits_per_value=4.75, divergence=0.1)
    assert bits_of(CachePlan(4, 4, bit_plan)) == [(8, 3), (2, 4)]
    bit_plan = BitPlan({1: (2, 4)}, bits_per_value=4.75, divergence=0.1)
    assert bits_of(CachePlan(3, 8, bit_plan)) == [(3, 8), (2, 4)]


@pytest.mark.usefixtures("small_sample")
def test_a_budget_gives_every_layer_bits_and_the_same_ones_each_time(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = ServerConfig(kv_budget_bits=3.7)
    first, second = (plan_cache(config, tiny_model, tiny_tokenizer, 2048) for _ in range(2))
    assert first.bit_plan is not None
    assert first.bit_plan.bits_per_value <= 3.7
    assert bits_of(first) == [first.bit_plan.layer_bits[0], first.bit_plan.layer_bits[1]]
    assert first.bit_plan == second.bit_plan
    probes = torch.randn(2, 5, 64)
    for layer_idx in (0, 1):
        for name in ("keys", "values"):
            transforms = [getattr(plan.transforms[layer_idx], name) for plan in (first, second)]
            assert torch.equal(*(transform.apply(probes) for transform in transforms))
            assert torch.equal(*(transform.undo(probes) for transform in transforms))


def test_a_budget_is_spent_with_the_transforms_at_the_longest_context(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    transforms = {0: LayerTransforms(None, None)}
    plan = BitPlan({0: (2, 4)}, bits_per_value=3.5, divergence=0.1)

    def plan_bits(*args: Any, **options: Any) -> BitPlan:
        given.extend((args, options))
        return plan

    monkeypatch.setattr(cache_plan, "measure_transforms", lambda *args: given.append(args) or transforms)
    monkeypatch.setattr(cache_plan, "plan_bits", plan_bits)
    result = plan_cache(ServerConfig(kv_budget_bits=3.7), tiny_model, tiny_tokenizer, 1500)
    measured, planned, options = given
    assert planned == (*measured, 3.7)
    assert options == {"context": 1500, "transforms": transforms}
    assert (result.bit_plan, result.transforms) == (plan, transforms)


@pytest.mark.usefixtures("small_sample")
@pytest.mark.parametrize(
    ("budget", "max_model_len", "reason"),
    [
        # 2 bits, a 64th of a norm's 16, a 64th of a mean's 8, and of its step's 16 a 64th of a 64th.
        (2.3, 2048, "2 bits everywhere take 2.379 per value, with norms and means, and the budget is 2.3"),
        (8.0, 259, "windows must have at least 260 tokens, got 259"),
    ],
)
def test_a_budget_that_cannot_be_met_is_told_in_one_sentence(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    budget: float,
    max_model_len: int,
    reason: str,
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        plan_cache(ServerConfig(kv_budget_bits=budget), tiny_model, tiny_tokenizer, max_model_len)
    assert str(caught.value) == f"--kv-budget-bits cannot be met: {reason}"


@pytest.mark.usefixtures("small_sample")
@pytest.mark.parametrize("budget", [None, 3.7])
def test_rotations_take_the_place_of_transforms_that_cannot_be_measured(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    budget: float | None,
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(cache_plan, "measure_transforms", fail)
    with caplog.at_level(logging.WARNING):
        plan = plan_cache(ServerConfig(kv_budget_bits=budget), tiny_model, tiny_tokenizer, 2048)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "keys and values could not be measured (RuntimeError: no such kernel); "
        "random rotations take the transforms' place"
    )
    assert plan.transforms == {}
    assert (plan.bit_plan is None) == (budget is None)
    assert len(bits_of(plan)) == 2


def test_a_gpu_without_memory_for_the_sample_is_no_failure_to_measure(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cache_plan, "measure_transforms", fail)
    with pytest.raises(torch.OutOfMemoryError):
        plan_cache(ServerConfig(), tiny_model, tiny_tokenizer, 2048)


@pytest.mark.usefixtures("small_sample")
@pytest.mark.parametrize(
    "kind",
    ["attention through the interface", "attention of its own", "prompts shorter than the text"],
)
def test_measuring_leaves_nothing_in_the_log(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    model = tiny_model
    if kind == "attention of its own":
        model = MptForCausalLM(MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=300)).eval()
    tokenizer = with_template(tiny_tokenizer, "$A")
    tokenizer.model_max_length = 2048 if kind == "prompts shorter than the text" else 10**6
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.INFO):
        plan_cache(ServerConfig(kv_budget_bits=3.7), model, tokenizer, 2048)
    assert [record.getMessage() for record in caplog.records] == []


def test_a_context_no_longer_than_the_beginning_of_a_text_is_no_obstacle(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_template(tiny_tokenizer, "[A] [B] $A")
    assert plan_cache(ServerConfig(), tiny_model, tokenizer, 2).transforms == {}
    with pytest.raises(ModelLoadError, match="windows must have at least 260 tokens"):
        plan_cache(ServerConfig(kv_budget_bits=4), tiny_model, tokenizer, 2)
