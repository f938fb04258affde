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
        rank: Its place among all tokens, 1 for the likeliest; equally likely ones share the best place.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int


def gather_logprobs(logits: Tensor, token_ids: Tensor, num_top: int = MAX_LOGPROBS) -> Tensor:
    """Look up log-probabilities, without waiting for the device.

    Args:
        logits: ``[num_rows, vocab_size]``, any float dtype.
        token_ids: The token that came in each row, int64 ``[num_rows]``.
        num_top: How many of the likeliest tokens to look up, too.

    Returns:
        Float64 ``[num_rows, 2 + 2 * num_top]`` for `read_logprobs`, so that one copy brings all to the host.
    """
    vocab_size = logits.shape[-1]
    num_top = min(num_top, vocab_size)
    num_at_once = max(1, _MAX_ELEMENTS_AT_ONCE // vocab_size)
    parts = []
    for some, came in zip(torch.split(logits, num_at_once), torch.split(token_ids, num_at_once), strict=True):
        logprobs = torch.log_softmax(some, dim=-1, dtype=torch.float32)
        # Where there was no token the request fails, whatever is looked up. Some models take more tokens than
        # they have logits for; those cannot come.
        places, is_unknown = came.clamp(0, vocab_size - 1)[:, None], (came >= vocab_size)[:, None]
        own = some.gather(1, places).masked_fill(is_unknown, -torch.inf)
        own_logprobs = logprobs.gather(1, places).masked_fill(is_unknown, -torch.inf)
        ranks = 1 + (some > own).sum(dim=-1, keepdim=True)
        values, tokens = logprobs.topk(num_top, dim=-1)
        parts.append(torch.cat([part.double() for part in (own_logprobs, ranks, values, tokens)], dim=1))
    return torch.cat(parts)


def read_logprobs(row: Sequence[float], num_top: int) -> TokenLogprobs:
    """Return a row of `gather_logprobs` with the first of its likeliest tokens."""
    most = len(row) // 2 - 1
    values, token_ids = row[2 : 2 + most], row[2 + most :]
    top = [
        (int(token_id), max(value, LOWEST_LOGPROB))
        for value, token_id in zip(values[:num_top], token_ids[:num_top], strict=True)
    ]
    return TokenLogprobs(max(row[0], LOWEST_LOGPROB), tuple(top), int(row[1]))
