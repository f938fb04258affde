"""The engine computes what plain transformers computes, whatever the architecture."""

from __future__ import annotations

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, NUM_POSITIONS, VOCAB_SIZE
from engine_bench import Parts
from tiny_tokenizer import build_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from turboquant_core import Timeline, use_paged_attention
from turboquant_server.attention_check import UnsupportedModelError, find_attention
from turboquant_server.engine.detokenizer import Detokenizer
from turboquant_server.engine.request import FinishReason, Request
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.rope import freeze_rope

SERVED = [name for name, architecture in ARCHITECTURES.items() if architecture.serving != "unsupported"]
# Several chunks and blocks beside a prompt of neither; the last tokens are generated, in one batch.
PROMPT_LENGTHS = (NUM_POSITIONS - 50, 75, 21)
NUM_GENERATED = 5
# Of the largest logit. Wrong windows, caps, sinks or states make it 0.03 and more, and float32 at most 1e-5.
TOLERANCE = 1e-5
TIMELINE = Timeline(residual_length=64, segment_size=64)


def random_prompts() -> list[list[int]]:
    """Return prompts with the tokens that are generated after them."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, VOCAB_SIZE, (length + NUM_GENERATED,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """Compute logits ``[num_tokens, vocab_size]`` with plain transformers and no cache."""
    logits: Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits


def run_with_engine(model: PreTrainedModel, prompts: list[list[int]]) -> list[dict[int, Tensor]]:
    """Compute all prompts beside each other; return the logits ``[vocab_size]`` that each has by position.

    Of a prompt that the engine cuts, only the last token of a step has logits. Blocks lose nothing.
    """
    attention = find_attention(model, build_tokenizer(), NUM_POSITIONS)
    if attention.is_paged:
        use_paged_attention(model)
    parts = Parts(
        model,
        attention,
        TIMELINE,
        num_blocks=16,
        num_slots=len(prompts),
        bits=None,
        max_num_batched_tokens=130,
        caches_prefixes=False,
    )
    scheduler = parts.scheduler
    for index, token_ids in enumerate(prompts):
        prompt = token_ids[:-NUM_GENERATED]
        detokenizer = Detokenizer(build_tokenizer(), prompt)
        params = SamplingParams(max_tokens=len(token_ids))
        scheduler.add(Request(str(index), prompt, params, detokenizer))
    computed: list[dict[int, Tensor]] = [{} for _ in prompts]
    while scheduler.running or scheduler.waiting:
        batch = scheduler.schedule()
        for scheduled, is_decode in ((batch.prefills, False), (batch.decodes, True)):
            for item, logits in zip(
                scheduled,
                parts.runner.forward(scheduled, is_decode=is_decode) if scheduled else [],
                strict=True,
            ):
                scheduler.advance(item)
                request, index = item.request, int(item.request.request_id)
                computed[index][item.chunks[-1].end - 1] = logits
                if item.chunks[-1].end == len(prompts[index]):
                    scheduler.finish(request, FinishReason.LENGTH)
                elif item.chunks[-1].end == request.num_tokens:
                    request.token_ids.append(prompts[index][request.num_tokens])
    parts.manager.check_integrity()
    return computed


def test_at_least_70_architectures_are_served() -> None:
    model_types = {ARCHITECTURES[name].options.get("model_type", name) for name in SERVED}
    assert len(model_types) >= 70


def test_what_is_not_served_has_a_reason_and_what_is_served_none() -> None:
    for name, architecture in ARCHITECTURES.items():
        assert bool(architecture.reason) == (name not in SERVED), name


@pytest.mark.parametrize("name", SERVED)
def test_logits_are_those_of_plain_transformers(name: str) -> None:
    model = architectures.build(name)
    freeze_rope(model, NUM_POSITIONS)
    prompts = random_prompts()
    expected = [reference_logits(model, token_ids) for token_ids in prompts]
    computed = run_with_engine(model, prompts)
    for token_ids, rows, reference in zip(prompts, computed, expected, strict=True):
        generated = range(len(token_ids) - NUM_GENERATED - 1, len(token_ids))
        assert rows.keys() >= set(generated)
        for position, logits in rows.items():
            error = (logits - reference[position]).abs().max() / reference.abs().max()
            assert error < TOLERANCE, (len(token_ids), position)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - set(SERVED)))
def test_what_is_not_served_is_refused_in_one_line(name: str) -> None:
    model = architectures.build(name)
    with pytest.raises(UnsupportedModelError, match=r"^[^\n]+$") as error:
        find_attention(model, build_tokenizer(), NUM_POSITIONS)
    print(f"{name}: {error.value} [{ARCHITECTURES[name].reason}]")
