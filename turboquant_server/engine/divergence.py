"""Divergence: how far apart two distributions of the next token are, over many predictions. Runs no model.

Of the served distribution the likeliest tokens are known; all others count as one. So what is called KL
divergence here is that of the coarser distributions, and at most that of the full ones.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from turboquant_server.engine.logprobs import LOWEST_LOGPROB

# What float32 cannot tell from nothing, of probabilities that add up to 1.
_ROUNDING = 1e-7


@dataclass(frozen=True)
class Divergence:
    """Sums over predictions.

    Attributes:
        num_tokens: How many there are.
        total_kld: Their KL divergences, in nats.
        num_agreeing: How many have the same likeliest token.
    """

    num_tokens: int = 0
    total_kld: float = 0.0
    num_agreeing: int = 0

    @property
    def kld(self) -> float:
        """Return the KL divergence of a prediction."""
        return self.total_kld / max(1, self.num_tokens)

    @property
    def agreement(self) -> float:
        """Return the share of the predictions that have the same likeliest token."""
        return self.num_agreeing / max(1, self.num_tokens)

    def __add__(self, other: Divergence) -> Divergence:
        """Return the sums over the predictions of both."""
        return Divergence(
            self.num_tokens + other.num_tokens,
            self.total_kld + other.total_kld,
            self.num_agreeing + other.num_agreeing,
        )


def compare(served: Tensor, exact: Tensor, exact_best: Tensor) -> Divergence:
    """Return how the served distributions diverge from the exact ones.

    Args:
        served: Log-probabilities of the likeliest tokens, the likeliest first, float64
            ``[num_predictions, num_top]``.
        exact: What the model gives these tokens without compression, of the same shape.
        exact_best: What it gives its own likeliest, ``[num_predictions]``.
    """
    # Of tokens that tie for the first place, each is the likeliest.
    is_first = served == served[:, :1]
    agrees = (is_first & (exact == exact_best[:, None])).any(-1)
    served, exact = served.clamp(min=LOWEST_LOGPROB), exact.clamp(min=LOWEST_LOGPROB)
    rests = [(1 - known.exp().sum(-1)).clamp(min=_ROUNDING) for known in (served, exact)]
    kld = (exact.exp() * (exact - served)).sum(-1) + rests[1] * (rests[1] / rests[0]).log()
    return Divergence(len(served), float(kld.clamp(min=0).sum()), int(agrees.sum()))
