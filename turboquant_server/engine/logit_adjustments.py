"""What requests have changed about their logits: biases, penalties, tokens that may not come yet.

In vLLM's order: logit_bias is added, then repetition_penalty, frequency_penalty and presence_penalty are
taken, then tokens that would end the answer too early are made impossible. Rows never meet, and all is done
in float64. Knows no temperature and draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboquant_core import upload
from turboquant_server.engine.token_counts import IN_PROMPT

if TYPE_CHECKING:
    from turboquant_server.engine.sampler import SamplingRow


def adjust_logits(logits: Tensor, rows: Sequence[SamplingRow], counts: Tensor | None) -> Tensor:
    """Return what the rows' parameters make of their logits.

    Args:
        logits: ``[num_rows, vocab_size]``, any float dtype; not changed.
        rows: One for each row of the logits.
        counts: `TokenCounts.table`, if a row has penalties.

    Returns:
        Float64 of the logits' shape.
    """
    logits = logits.to(torch.float64, copy=True)
    vocab_size = logits.shape[-1]  # some models count more tokens than they have logits
    biases = [
        (index, token_id, bias)
        for index, row in enumerate(rows)
        for token_id, bias in row.sampling_params.logit_bias
        if token_id < vocab_size
    ]
    if biases:
        indices, token_ids, amounts = zip(*biases, strict=True)
        places = upload([indices, token_ids], torch.int64, logits.device).unbind()
        logits[places] += upload(amounts, torch.float64, logits.device)
    penalized = [index for index, row in enumerate(rows) if row.sampling_params.has_penalties]
    if penalized:
        assert counts is not None
        slots = [rows[index].slot for index in penalized]
        places, slots_there = upload([penalized, slots], torch.int64, logits.device)
        logits[places] = _penalize(logits[places], [rows[index] for index in penalized], counts[slots_there])
    banned = [
        (index, token_id)
        for index, row in enumerate(rows)
        for token_id in row.banned_token_ids
        if token_id < vocab_size
    ]
    if banned:
        indices, token_ids = zip(*banned, strict=True)
        logits[upload([indices, token_ids], torch.int64, logits.device).unbind()] = -torch.inf
    return logits


def _penalize(logits: Tensor, rows: Sequence[SamplingRow], counts: Tensor) -> Tensor:
    """Return logits with the penalties for the tokens that were counted, each ``[num_rows, vocab_size]``."""
    wanted = [row.sampling_params for row in rows]
    repetition, frequency, presence = upload(
        [
            [params.repetition_penalty for params in wanted],
            [params.frequency_penalty for params in wanted],
            [params.presence_penalty for params in wanted],
        ],
        torch.float64,
        logits.device,
    )[:, :, None]
    if any(params.repetition_penalty != 1 for params in wanted):
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(counts > 0, repeated, logits)
    in_answer = counts.bitwise_and(IN_PROMPT - 1).double()
    logits = logits - frequency * in_answer
    return logits.sub_(in_answer.clamp_(max=1).mul_(presence))
