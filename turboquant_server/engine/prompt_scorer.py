"""PromptScorer: how likely the tokens of prompts were, looked up while a step reads them. Knows no answer.

The logits of a step's tokens would take gigabytes. They are made of the tokens' hidden states a slice at a
time, and what is looked up in them is all that stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboquant_core import upload
from turboquant_server.engine.logprobs import gather_logprobs
from turboquant_server.engine.split_forward import SplitForward

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from turboquant_core import Chunk
    from turboquant_server.engine.request import Request

# Logits that exist at a time; in float32 so many are 128 MiB.
MAX_ELEMENTS = 1 << 25


class PromptScorer:
    """Run forwards of prompts whose tokens' log-probabilities are wanted.

    Args:
        model: A causal language model of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._split: SplitForward | None = None
        self._scored: dict[tuple[Request, int], Tensor] = {}

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        wanted: Tensor,
        cache: Cache,
        chunks: Sequence[tuple[Request, Chunk]],
    ) -> Tensor:
        """Run the model and keep, until `take`, the log-probabilities that requests ask for.

        Args:
            input_ids: ``[1, num_tokens]``.
            position_ids: The same of their positions.
            wanted: ``[num_wanted]``, places whose logits are needed.
            cache: What the model gets for one.
            chunks: Whose tokens these are, one after another.

        Returns:
            Logits ``[1, num_wanted, vocab_size]``.
        """
        # Made once it is needed; hardly any server needs it.
        self._split = split = self._split or SplitForward(self._model)
        logits, states = split(input_ids, position_ids, wanted, cache)
        num_rows = max(1, MAX_ELEMENTS // logits.shape[-1])
        place = 0
        for request, chunk in chunks:
            first, place = place, place + chunk.num_tokens
            # Each token's logits tell of the next one; those of the prompt's last are of the answer.
            next_ids = request.token_ids[chunk.start + 1 : min(chunk.end + 1, request.num_prompt_tokens)]
            if not (request.scores_prompt and next_ids):
                continue
            parts = zip(
                torch.split(states[0, first : first + len(next_ids)], num_rows),
                torch.split(upload(next_ids, torch.int64, states.device), num_rows),
                strict=True,
            )
            num_top = request.sampling_params.prompt_logprobs or 0
            self._scored[request, chunk.start + 1] = torch.cat(
                [gather_logprobs(split.logits(part), token_ids, num_top) for part, token_ids in parts]
            )
        return logits

    def take(self) -> list[tuple[Request, int, Tensor]]:
        """Return what has been looked up since this was called before: rows of `gather_logprobs`.

        What was computed twice is there once.

        Returns:
            Requests, the places in their prompts of the first tokens that are told of, and rows for these and
            the ones after them.
        """
        scored, self._scored = self._scored, {}
        return [(request, start, rows) for (request, start), rows in scored.items()]
