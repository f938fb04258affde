"""Log-probabilities of chosen tokens and of the likeliest, by the model's own logits. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant_server.engine.sampling_params import MAX_LOGPROBS

# JSON has no infinity; OpenAI's number for a token that cannot come.
LOWEST_LOGPROB = -9999.0
# Bounds what log_softmax takes from the cache's memory: so many float32 are 32 MiB.
_MAX_ELEMENTS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, before anything that the request asks for changed its chance.

    Attributes:
        logprob: Natural logarithm of its probability.
        top: The likeliest tokens at its place and their log-probabilities, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


def gather_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Look up log-probabilities, without waiting for the device.

    Args:
        logits: ``[num_rows, vocab_size]``, any float dtype.
        token_ids: The token that was chosen in each row, int64 ``[num_rows]``.

    Returns:
        Float64 ``[num_rows, 1 + 2 * num_top]`` for `read_logprobs`, so that one copy brings all to the host.
    """
    num_top = min(MAX_LOGPROBS, logits.shape[-1])
    num_at_once = max(1, _MAX_ELEMENTS_AT_ONCE // logits.shape[-1])
    parts = []
    for some, chosen in zip(
        torch.split(logits, num_at_once), torch.split(token_ids, num_at_once), strict=True
    ):
        logprobs = torch.log_softmax(some, dim=-1, dtype=torch.float32)
        # Where there was no token the request fails, whatever is looked up.
        of_chosen = logprobs.gather(1, chosen.clamp(min=0)[:, None])
        values, tokens = logprobs.topk(num_top, dim=-1)
        parts.append(torch.cat([of_chosen.double(), values.double(), tokens.double()], dim=1))
    return torch.cat(parts)


def read_logprobs(row: Sequence[float], num_top: int) -> TokenLogprobs:
    """Return a row of `gather_logprobs` with the first of its likeliest tokens."""
    most = len(row) // 2
    values, token_ids = row[1 : 1 + most], row[1 + most :]
    top = [
        (int(token_id), max(value, LOWEST_LOGPROB))
        for value, token_id in zip(values[:num_top], token_ids[:num_top], strict=True)
    ]
    return TokenLogprobs(max(row[0], LOWEST_LOGPROB), tuple(top))
