"""Counts on the device are those of a plain loop over each request's tokens, whoever had the slot before."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from turboquant_server.engine.request import Request
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.engine.token_counts import IN_PROMPT, TokenCounts

VOCAB_SIZE = 23
PENALIZED = SamplingParams(max_tokens=1000, presence_penalty=1.0)


def scheduled(request: Request, slot: int) -> Any:
    return SimpleNamespace(request=request, chunks=[SimpleNamespace(cache=SimpleNamespace(slot=slot))])


def reference(request: Request, newest: list[int]) -> list[int]:
    token_ids = [token_id if token_id >= 0 else newest[-1 - token_id] for token_id in request.token_ids]
    answer = Counter(token_ids[request.num_prompt_tokens :])
    prompt = set(token_ids[: request.num_prompt_tokens])
    return [answer[token_id] + IN_PROMPT * (token_id in prompt) for token_id in range(VOCAB_SIZE)]


@pytest.mark.parametrize("seed", range(8))
def test_requests_that_come_go_wait_and_move_are_counted_right(seed: int) -> None:
    draw = random.Random(seed)
    counts = TokenCounts(torch.device("cpu"), 12)
    slots: dict[int, Request] = {}
    away: list[Request] = []  # preempted ones, which come back to any slot
    for _ in range(60):
        slot = draw.randrange(12)
        if slot in slots and draw.random() < 0.3:
            request = slots.pop(slot)
            if draw.random() < 0.6:
                away.append(request)
        elif slot not in slots and away and draw.random() < 0.5:
            slots[slot] = away.pop(draw.randrange(len(away)))
        elif slot not in slots:
            # Some models have tokens, such as those of images, that no logit belongs to.
            prompt = [draw.randrange(VOCAB_SIZE + 3) for _ in range(draw.randrange(1, 9))]
            slots[slot] = Request("r", prompt, PENALIZED, cast(Any, None))
        newest = [draw.randrange(VOCAB_SIZE) for _ in range(5)]
        asked = {slot: request for slot, request in slots.items() if draw.random() < 0.7}
        for request in asked.values():
            for _ in range(draw.choice([0, 1, 1, 3])):
                request.token_ids.append(draw.randrange(VOCAB_SIZE))
            if draw.random() < 0.5:
                request.token_ids.append(-1 - draw.randrange(5))
        if not asked:
            continue
        items = [scheduled(request, slot) for slot, request in asked.items()]
        for _ in range(draw.choice([1, 1, 2])):  # sampling that failed is tried again
            counts.update(items, torch.tensor(newest), VOCAB_SIZE)
        for slot, request in asked.items():
            assert counts.table[slot].tolist() == reference(request, newest)
            # The step has ended: the host knows the token, too.
            request.token_ids = [
                token_id if token_id >= 0 else newest[-1 - token_id] for token_id in request.token_ids
            ]


def test_the_table_takes_no_memory_until_it_is_needed_and_then_what_was_planned() -> None:
    counts = TokenCounts(torch.device("cpu"), 5)
    assert counts.table.numel() == 0
    for slot in (0, 4, 2):
        request = Request("r", [1, 2], PENALIZED, cast(Any, None))
        counts.update([scheduled(request, slot)], torch.tensor([0]), VOCAB_SIZE)
        assert counts.table.shape == (5, VOCAB_SIZE)
