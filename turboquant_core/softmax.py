"""RunningSoftmax: attention over keys that come in pieces. Knows no cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class RunningSoftmax:
    """Average values by the softmax of scores, piece by piece, in float32.

    Args:
        rows: Shape of the queries, ``[..., num_queries]``.
        value_dim: Numbers of a value.
        device: Where scores and values lie.
        sink_scores: float32, broadcast to `rows`: scores of a key without a value, if there is one.
    """

    def __init__(
        self, rows: tuple[int, ...], value_dim: int, device: torch.device, sink_scores: Tensor | None = None
    ) -> None:
        self.total = torch.zeros(*rows, value_dim, device=device)
        if sink_scores is None:
            self.maximum = torch.full(rows, -torch.inf, device=device)
            self.denominator = torch.zeros(rows, device=device)
        else:
            self.maximum = sink_scores.expand(rows).clone()
            self.denominator = torch.ones(rows, device=device)

    def add(self, scores: Tensor, weigh: Callable[[Tensor], Tensor]) -> None:
        """Take in keys.

        Args:
            scores: ``[..., num_queries, num_keys]``, minus infinity where a query does not see a key; they
                become weights in place.
            weigh: Returns the values' sum, ``[..., num_queries, value_dim]``, for weights of that shape.
        """
        maximum = torch.maximum(self.maximum, scores.amax(-1))
        # A query that has seen no key yet has no maximum to subtract.
        shift = maximum.where(maximum > -torch.inf, 0)
        weights = scores.sub_(shift.unsqueeze(-1)).exp_()
        decay = (self.maximum - shift).exp_()
        self.denominator = self.denominator * decay + weights.sum(-1)
        self.total = self.total * decay.unsqueeze(-1) + weigh(weights)
        self.maximum = maximum

    def result(self) -> Tensor:
        """Return ``[..., num_queries, value_dim]``."""
        return self.total / self.denominator.unsqueeze(-1)
