"""TokenDrawer: the tokens that follow what a step has computed. Knows no model and no failure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from turboquant_core import upload
from turboquant_server.engine.logprobs import gather_logprobs
from turboquant_server.engine.sampler import INVALID_TOKEN_ID, SamplingRow, sample
from turboquant_server.engine.token_counts import TokenCounts
from turboquant_server.engine.token_masks import compute_masks, keep_allowed

if TYPE_CHECKING:
    from turboquant_server.engine.pending_step import PendingStep
    from turboquant_server.engine.request import Request
    from turboquant_server.engine.scheduler import ScheduledRequest

# Rows of logits that are sampled together; choices of one prompt have a copy of its row each.
MAX_ROWS = 256


class Drawn(NamedTuple):
    """Tokens that the device may still be computing.

    Attributes:
        token_ids: One for each choice, int64 ``[num_choices]``.
        logprobs: Rows of `gather_logprobs` for the choices that ask for them; None if none does.
        asking: The places of these choices.
    """

    token_ids: Tensor
    logprobs: Tensor | None
    asking: list[int]


class TokenDrawer:
    """Draw tokens for scheduled requests, and keep on the device what that takes.

    Args:
        device: Of the logits.
        num_slots: Most requests that run at once.
    """

    def __init__(self, device: torch.device, num_slots: int) -> None:
        self._device = device
        self._counts = TokenCounts(device, num_slots)

    def draw(
        self,
        scheduled: Sequence[ScheduledRequest],
        logits: Tensor,
        newest: Tensor,
        step_before: PendingStep | None = None,
    ) -> Drawn:
        """Draw a token for each choice.

        If choices follow grammars, this waits for the step before, while the device computes the logits.

        Args:
            scheduled: What was computed.
            logits: ``[num_requests, vocab_size]``, of each request's last token.
            newest: The tokens of the step before, as far as they are tokens.
            step_before: Tells the host what they are.

        Raises:
            GrammarError: A choice cannot go on as its grammar wants.
        """
        choices: list[tuple[int, Request, SamplingRow]] = []
        is_plain = True
        for index, item in enumerate(scheduled):
            position, is_plain_item = item.chunks[-1].end, item.request.sampling_params.is_plain
            is_plain = is_plain and is_plain_item and not item.request.looks_up_logprobs
            for choice in item.choices:
                row = SamplingRow(choice.sampling_params, choice.seed, choice.choice_index, position)
                choices.append((index, choice, row if is_plain_item else _more_of(row, choice, item)))
        if not is_plain:
            self._count(scheduled, newest, logits.shape[-1])
        tokens, logprobs = [newest.new_empty(0)], []
        asking: list[int] = []
        for start in range(0, len(choices), MAX_ROWS):
            indices, requests, rows = zip(*choices[start : start + MAX_ROWS], strict=True)
            is_whole = indices == tuple(range(len(logits)))
            part = logits if is_whole else logits[self._upload(indices)]
            if is_plain:  # nearly always, and then nobody has to be asked
                tokens.append(sample(part, rows))
                continue
            allowed = self._keep_allowed(part, requests, step_before)
            tokens.append(sample(allowed, rows, self._counts.table))
            told = [i for i, choice in enumerate(requests) if choice.looks_up_logprobs]
            if told:
                places = self._upload(told)
                logprobs.append(gather_logprobs(part[places], tokens[-1][places]))
                asking += [start + i for i in told]
        return Drawn(torch.cat(tokens), torch.cat(logprobs) if logprobs else None, asking)

    def _count(self, scheduled: Sequence[ScheduledRequest], newest: Tensor, vocab_size: int) -> None:
        """Count the tokens of the requests that need it for their penalties."""
        # Choices that are drawn together have the same tokens so far, and so the same counts.
        penalized = [
            item for item in scheduled if item.request.sampling_params.has_penalties and item.choices
        ]
        if penalized:
            self._counts.update(penalized, newest, vocab_size)

    def _keep_allowed(
        self, logits: Tensor, choices: Sequence[Request], step_before: PendingStep | None
    ) -> Tensor:
        """Return logits with which only tokens come that the grammars of the choices allow."""
        if all(choice.matcher is None for choice in choices):
            return logits
        newest: list[int] = []
        for choice in choices:
            if choice.matcher is None:
                continue
            new = choice.token_ids[choice.num_prompt_tokens + choice.matcher.num_tokens :]
            if new and new[-1] < 0:
                assert step_before is not None
                newest = newest or step_before.token_ids()
                new[-1] = newest[-1 - new[-1]]
            # A choice whose logits had no token is about to fail.
            choice.matcher.advance([token_id for token_id in new if token_id != INVALID_TOKEN_ID])
        return keep_allowed(logits, compute_masks([choice.matcher for choice in choices], self._device))

    def _upload(self, numbers: Sequence[int]) -> Tensor:
        return upload(numbers, torch.int64, self._device)


def _more_of(row: SamplingRow, choice: Request, item: ScheduledRequest) -> SamplingRow:
    """Return a row with what changes its logits."""
    return row._replace(slot=item.chunks[-1].cache.slot, banned_token_ids=choice.banned_token_ids)
