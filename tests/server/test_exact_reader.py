"""What is read without compression is what plain transformers predicts, for models of all kinds."""

from __future__ import annotations

import copy

import architectures
import pytest
import torch
from engine_bench import Parts, plain_attention
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from turboquant_core import Timeline, use_paged_attention
from turboquant_server.attention_check import ModelAttention, find_attention
from turboquant_server.engine import exact_reader
from turboquant_server.engine.exact_reader import ExactReader

TOKENS = [3 + 7 * index % 290 for index in range(1500)]
SHORT_TIMELINE = Timeline(residual_length=64, segment_size=64)


def build(model: PreTrainedModel, attention: ModelAttention, timeline: Timeline) -> tuple[ExactReader, Parts]:
    parts = Parts(
        model,
        attention,
        timeline,
        num_blocks=24,
        num_slots=1,
        bits=None,
        max_num_batched_tokens=2048,
        caches_prefixes=False,
    )
    states = parts.runner._states
    is_paged, one_shot = attention.is_paged, attention.one_shot
    reader = ExactReader(model, parts.store, states, parts.manager, is_paged=is_paged, one_shot=one_shot)
    return reader, parts


def check(reader: ExactReader, plain: PreTrainedModel, tokens: list[int], num_predictions: int) -> int:
    """Compare with a plain forward, and return the number of slices."""
    with torch.inference_mode():
        logits = plain(torch.tensor([tokens])).logits[0, len(tokens) - num_predictions :]
    expected = logits.double().log_softmax(-1)
    wanted = torch.arange(3 * num_predictions).view(-1, 3) % expected.shape[1]
    slices = list(reader.read(tokens, wanted))
    found = torch.cat(slices)
    assert found.shape == (num_predictions, 4) and found.dtype == torch.float64
    torch.testing.assert_close(found[:, :3], expected.gather(1, wanted), atol=2e-4, rtol=0)
    torch.testing.assert_close(found[:, 3], expected.amax(-1), atol=2e-4, rtol=0)
    return len(slices)


@pytest.fixture
def paged_model(tiny_model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(tiny_model)
    assert use_paged_attention(model)
    return model


@pytest.mark.parametrize(("length", "num_predictions"), [(1, 1), (4, 4), (5, 2), (300, 41), (1500, 700)])
def test_it_is_that_of_a_plain_forward(
    tiny_model: PreTrainedModel, paged_model: PreTrainedModel, length: int, num_predictions: int
) -> None:
    reader, parts = build(paged_model, plain_attention(paged_model.config), Timeline())
    assert reader.max_tokens >= length
    assert check(reader, tiny_model, TOKENS[:length], num_predictions) == 1 + -(-max(0, length - 4) // 64)
    parts.manager.check_integrity()
    assert parts.manager.num_running == 0


def test_logits_exist_for_a_few_tokens_at_a_time(
    tiny_model: PreTrainedModel, paged_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_reader, "MAX_ELEMENTS", 300 * 10)
    reader, _ = build(paged_model, plain_attention(paged_model.config), Timeline())
    sizes: list[int] = []
    logits_of = reader._split.logits

    def logits(states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return logits_of(states)

    monkeypatch.setattr(reader._split, "logits", logits)
    check(reader, tiny_model, TOKENS[:200], 100)
    assert sum(sizes) == 100 and max(sizes) == 10


def test_one_that_is_left_in_the_middle_gives_back_its_cache(
    tiny_model: PreTrainedModel, paged_model: PreTrainedModel
) -> None:
    reader, parts = build(paged_model, plain_attention(paged_model.config), Timeline())
    reading = iter(reader.read(TOKENS[:900], torch.zeros(1, 1, dtype=torch.int64)))
    next(reading)
    assert parts.manager.num_running == 1
    del reading
    assert parts.manager.num_running == 0
    check(reader, tiny_model, TOKENS[:900], 10)


@pytest.mark.parametrize(
    "name", ["gemma3_text", "llama4_text", "falcon", "jamba", "qwen3_next", "deepseek_v3", "ctrl"]
)
def test_models_of_all_kinds_are_read(name: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = architectures.build(name)
    attention = find_attention(model, tiny_tokenizer, architectures.NUM_POSITIONS)
    reader, parts = build(model, attention, SHORT_TIMELINE)
    tokens = [3 + 5 * index % 120 for index in range(250)]
    for length in (250, 20, 200):
        num_slices = check(reader, architectures.build(name), tokens[:length], length // 2)
        assert num_slices == 1 if attention.one_shot else num_slices == 1 + -(-(length - 4) // 64)
    parts.manager.check_integrity()
