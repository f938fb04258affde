"""Which tokens the grammars of a batch's answers allow next: computed on the host, applied to logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turboquant_server.engine.grammar import Matcher


def compute_masks(matchers: Sequence[Matcher | None], device: torch.device) -> Tensor:
    """Compute on the host which tokens may come next, for all answers at once.

    Args:
        matchers: One for each row, at least one of them; of a row without one, all tokens may come.
        device: Where the masks are wanted; nothing waits for it.

    Returns:
        uint8 ``[num_rows, num_bytes]``, on the device; bit i of byte b is that of token 8 * b + i.

    Raises:
        GrammarError: One of the answers cannot go on.
    """
    rows = [(matcher, row) for row, matcher in enumerate(matchers) if matcher is not None]
    grammar = rows[0][0].grammar
    num_bytes = -(-grammar.num_tokens // 32) * 4  # llguidance writes words
    is_cuda = device.type == "cuda"
    masks = torch.full((len(matchers), num_bytes), 255, dtype=torch.uint8, pin_memory=is_cuda)
    states = [(matcher.state, row) for matcher, row in rows]
    grammar.executor.unsafe_compute_mask_ptr(states, masks.data_ptr(), num_bytes, len(matchers))
    for matcher, _ in rows:
        if matcher.state.is_error():
            raise matcher.error
    return masks.to(device, non_blocking=is_cuda)


def keep_allowed(logits: Tensor, masks: Tensor) -> Tensor:
    """Return logits that are minus infinity where a token may not come.

    Args:
        logits: ``[num_rows, vocab_size]``.
        masks: Those of `compute_masks`, for no fewer tokens.
    """
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=masks.device)
    is_forbidden = (masks[:, :, None] & bits == 0).flatten(1)[:, : logits.shape[-1]]
    return logits.masked_fill(is_forbidden, -torch.inf)
