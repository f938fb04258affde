"""Fidelity: how near served predictions are to those without compression, watched while the server runs.

Of a sample of the answers it is kept with which probabilities their tokens were drawn: what users got, by
the kernels, graphs and cache that they got it from. When the engine has nothing else to do, the same tokens
are read with an exact cache, a slice at a time, and the predictions compared. Knows no scheduler and no text.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from turboquant_server.engine.divergence import Divergence, compare
from turboquant_server.engine.served_predictions import ServedPredictions

if TYPE_CHECKING:
    from turboquant_core import Timeline
    from turboquant_server.engine.exact_reader import ExactReader

# Answers of which something is kept, whether they are being written or wait to be compared.
MAX_ANSWERS = 8
# The newest predictions that are judged together: about as many as are measured at load.
NUM_JUDGED = 512
# The range that is measured at load ends at so many times the divergence, and the share of disagreement, that
# were measured; these count as being at least so much, below which single predictions decide.
MAX_RATIO = 3.0
MIN_KLD = 1e-4
MIN_DISAGREEMENT = 0.01
SKIP_REASONS = ("too_long", "too_short", "busy", "failed")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FidelityRange:
    """What is expected of served predictions.

    Attributes:
        measured: At load.
    """

    measured: Divergence

    @property
    def max_kld(self) -> float:
        """Return the highest KL divergence in it, in nats for each prediction."""
        return MAX_RATIO * max(self.measured.kld, MIN_KLD)

    @property
    def min_agreement(self) -> float:
        """Return the lowest top-1 agreement in it."""
        return max(0.0, 1 - MAX_RATIO * max(1 - self.measured.agreement, MIN_DISAGREEMENT))

    def __contains__(self, divergence: Divergence) -> bool:
        """Tell whether predictions are as expected."""
        return divergence.kld <= self.max_kld and divergence.agreement >= self.min_agreement

    def __str__(self) -> str:
        """Return what was measured and where the range ends."""
        return (
            f"KL divergence {self.measured.kld:.2g} and top-1 agreement {self.measured.agreement:.1%} "
            f"at load; alarm above {self.max_kld:.2g} or below {self.min_agreement:.1%}"
        )


@dataclass(frozen=True)
class FidelityState:
    """What has been found so far.

    Attributes:
        range: Measured at load; None until then.
        total: Of all comparisons.
        num_answers: How many answers these are of.
        num_skipped: By reason, how many answers were chosen and not compared.
        is_alarming: The newest predictions are outside the range.
    """

    range: FidelityRange | None = None
    total: Divergence = field(default_factory=Divergence)
    num_answers: int = 0
    num_skipped: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(SKIP_REASONS, 0))
    is_alarming: bool = False


class Fidelity:
    """Compare a sample of the answers with the model's own predictions.

    Until the range is set every answer is taken. All is done by the engine's thread; `state` may be read by
    any.

    Args:
        reader: Reads without compression.
        timeline: Of the served cache.
        sample_rate: Share of the answers that are taken, above 0.

    Attributes:
        state: What has been found so far.
        is_paused: There is no work for now.
    """

    def __init__(self, reader: ExactReader, timeline: Timeline, sample_rate: float) -> None:
        self.state = FidelityState()
        self.is_paused = False
        self._reader = reader
        self._timeline = timeline
        self._sample_rate = sample_rate
        self._random = random.Random(0)
        self._num_open = 0  # answers that are being written
        self._waiting: deque[tuple[Sequence[int], ServedPredictions]] = deque()
        self._comparison: Iterator[Divergence | None] | None = None
        self._newest: deque[Divergence] = deque()
        self._has_warned = False

    @property
    def max_tokens(self) -> int:
        """Up to so many tokens of a request can be compared."""
        return self._reader.max_tokens

    @property
    def has_work(self) -> bool:
        """Tell whether `work` has something to do."""
        return not self.is_paused and (self._comparison is not None or bool(self._waiting))

    def begin(self, num_prompt_tokens: int) -> ServedPredictions | None:
        """Decide about a new answer; if it is taken, return what its predictions go to until `end`."""
        if self.state.range is not None and self._random.random() >= self._sample_rate:
            return None
        if num_prompt_tokens > self.max_tokens:
            self._skip("too_long")
            return None
        if self._num_open + len(self._waiting) + (self._comparison is not None) >= MAX_ANSWERS:
            self._skip("busy")
            return None
        self._num_open += 1
        return ServedPredictions(self._timeline, num_prompt_tokens, self.max_tokens)

    def end(self, predictions: ServedPredictions, token_ids: Sequence[int]) -> None:
        """Take an answer that is complete, or will not be."""
        self._num_open -= 1
        if predictions.num_tokens:
            self._waiting.append((token_ids[: predictions.num_tokens], predictions))
        else:
            self._skip("too_short")

    def set_range(self) -> FidelityRange:
        """Let what has been compared so far be the range, and begin to count."""
        measured = FidelityRange(self.state.total)
        self._newest.clear()
        self.state = FidelityState(measured)
        return measured

    def work(self) -> None:
        """Do a slice of a comparison. If that fails only the comparison is lost."""
        try:
            if self._comparison is None:
                self._comparison = self._compare(*self._waiting[0])
                self._waiting.popleft()  # only now, so that there is work all the time
            divergence = next(self._comparison)
        except Exception as error:
            if self._comparison is None:
                self._waiting.popleft()
            self._comparison = None
            self._skip("failed")
            if not self._has_warned:
                logger.warning("an answer could not be compared without compression", exc_info=error)
            self._has_warned = True
            return
        if divergence is not None:
            self._comparison = None
            total = self.state.total + divergence
            self.state = replace(self.state, total=total, num_answers=self.state.num_answers + 1)
            self._judge(divergence)

    def _compare(
        self, token_ids: Sequence[int], predictions: ServedPredictions
    ) -> Iterator[Divergence | None]:
        """Yield None after each slice, and what was found in the end."""
        parts = []
        for part in self._reader.read(token_ids, predictions.token_ids):
            parts.append(part)
            yield None
        exact, exact_best = torch.cat(parts).tensor_split([-1], dim=1)
        yield compare(predictions.logprobs, exact, exact_best[:, 0])

    def _judge(self, divergence: Divergence) -> None:
        """Tell the log, once, when the newest predictions have left the range or come back."""
        expected = self.state.range
        self._newest.append(divergence)
        newest = sum(self._newest, Divergence())
        while newest.num_tokens - self._newest[0].num_tokens >= NUM_JUDGED:
            self._newest.popleft()
            newest = sum(self._newest, Divergence())
        if expected is None or newest.num_tokens < NUM_JUDGED:
            return
        is_alarming = newest not in expected
        if is_alarming == self.state.is_alarming:
            return
        self.state = replace(self.state, is_alarming=is_alarming)
        level, what = (logging.WARNING, "has left") if is_alarming else (logging.INFO, "is back in")
        logger.log(
            level,
            "fidelity %s its range: KL divergence %.2g and top-1 agreement %.1f%% in the newest %d "
            "predictions, of %d answers (%s)",
            what,
            newest.kld,
            100 * newest.agreement,
            newest.num_tokens,
            len(self._newest),
            expected,
        )
        self._newest.clear()  # the next word is about others

    def _skip(self, reason: str) -> None:
        counts = {**self.state.num_skipped, reason: self.state.num_skipped[reason] + 1}
        self.state = replace(self.state, num_skipped=counts)
