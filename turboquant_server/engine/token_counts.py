"""TokenCounts: how often requests have used each token, on the device. Knows no penalty and no logits.

The newest token may be one that only the device knows; so counts are kept there, a row for each slot of a
request that needs them, and take in what a request has got since it was last asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from turboquant_core import upload

if TYPE_CHECKING:
    from turboquant_server.engine.request import Request
    from turboquant_server.engine.scheduler import ScheduledRequest

# What a count is larger by where the prompt has the token; more than an answer has tokens.
IN_PROMPT = 1 << 28


class TokenCounts:
    """Count the tokens of requests.

    Args:
        device: Where the counts are.
        num_slots: Most requests that run at once.

    Attributes:
        table: int32 ``[num_slots, vocab_size]``: how often the answer in a slot has each token, and IN_PROMPT
            more where its prompt has it. What lies in a slot that `update` has not been called for means
            nothing. Empty until the first call, and then of the size that memory was planned for.
    """

    def __init__(self, device: torch.device, num_slots: int) -> None:
        self.table = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self._num_slots = num_slots
        # Whose tokens a slot's row counts, and how many of them.
        self._counted: dict[int, tuple[ReferenceType[Request], int]] = {}

    def update(self, scheduled: Sequence[ScheduledRequest], newest: Tensor, vocab_size: int) -> None:
        """Count all tokens that these requests have.

        Args:
            scheduled: At least one request.
            newest: The tokens of the step before, int64, which those that the host does not know are among.
            vocab_size: Tokens from here on are not counted.
        """
        started: list[int] = []
        known: list[tuple[int, int]] = []  # places in the flat table, and what is to be added there
        unknown: list[tuple[int, int]] = []  # starts of rows, and places among the newest
        counted = {}
        for item in scheduled:
            request, slot = item.request, item.chunks[-1].cache.slot
            owner, num_counted = self._counted.get(slot, (None, 0))
            first = slot * vocab_size
            if owner is None or owner() is not request:
                started.append(slot)
                num_counted = request.num_prompt_tokens
                prompt = set(request.token_ids[:num_counted])
                known += [(first + token_id, IN_PROMPT) for token_id in prompt if token_id < vocab_size]
            for token_id in request.token_ids[num_counted:]:
                if token_id < 0:
                    unknown.append((first, -1 - token_id))
                else:
                    known.append((first + token_id, 1))
            counted[slot] = ref(request), request.num_tokens
        if not self.table.numel():
            self.table = self.table.new_zeros(self._num_slots, vocab_size)
        device = self.table.device
        if started:
            self.table.index_fill_(0, upload(started, torch.int64, device), 0)
        flat = self.table.view(-1)
        if known:
            places, amounts = upload([*zip(*known, strict=True)], torch.int64, device)
            flat.index_add_(0, places, amounts.int())
        if unknown:
            rows, places = upload([*zip(*unknown, strict=True)], torch.int64, device)
            flat.index_add_(0, rows + newest[places], torch.ones_like(rows, dtype=torch.int32))
        self._counted.update(counted)
