"""ServedPredictions: with which probabilities the tokens of one answer were drawn. Knows no model.

Kept on the host, 160 bytes a token, and only of predictions that read something compressed: the others have
nothing to tell of the compression.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from turboquant_core import Timeline


class ServedPredictions:
    """Take down an answer's predictions, as it is written.

    Args:
        timeline: Says what a prediction reads compressed.
        num_prompt_tokens: Of the request.
        max_tokens: Predictions from more tokens are left out.

    Attributes:
        num_tokens: From so many of the request's first tokens comes the last prediction that was kept.
    """

    def __init__(self, timeline: Timeline, num_prompt_tokens: int, max_tokens: int) -> None:
        self.num_tokens = 0
        self._timeline = timeline
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self._logprobs = array("f")  # as precise as they are computed
        self._token_ids = array("i")
        self._num_top = 0

    def append(self, index: int, row: Sequence[float]) -> None:
        """Keep the prediction of a token.

        Args:
            index: Of the token in the request; the one after that of the last call.
            row: Of `gather_logprobs`.
        """
        if index > self._max_tokens or not self._timeline.num_visible_blocks(
            index - 1, self._num_prompt_tokens
        ):
            return
        self.num_tokens = index
        self._num_top = len(row) // 2 - 1
        self._logprobs.extend(row[2 : 2 + self._num_top])
        self._token_ids.extend(map(int, row[2 + self._num_top :]))

    @property
    def logprobs(self) -> Tensor:
        """Log-probabilities of the likeliest tokens, float64 ``[num_predictions, num_top]``."""
        return torch.tensor(self._logprobs, dtype=torch.float64).view(-1, self._num_top)

    @property
    def token_ids(self) -> Tensor:
        """The tokens, int64 of the same shape."""
        return torch.tensor(self._token_ids, dtype=torch.int64).view(-1, self._num_top)
