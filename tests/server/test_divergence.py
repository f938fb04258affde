"""The divergence of coarser distributions is right to the definition, and the alarm speaks once each way."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant_core import Timeline
from turboquant_server.engine.divergence import Divergence, compare
from turboquant_server.engine.fidelity import NUM_JUDGED, Fidelity, FidelityRange

NUM_TOP = 4


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(5, 60), st.floats(0.01, 30), st.floats(0, 3))
def test_it_is_at_most_that_of_the_full_distributions(
    seed: int, vocab_size: int, spread: float, noise: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = spread * rng.normal(size=(7, vocab_size))
    pair = torch.tensor(logits), torch.tensor(logits + noise * rng.normal(size=logits.shape))
    exact, served = (part.log_softmax(-1) for part in pair)
    values, token_ids = served.topk(NUM_TOP)
    found = compare(values, exact.gather(1, token_ids), exact.amax(-1))
    full = float((exact.exp() * (exact - served)).sum())
    coarse = 0.0
    for p, q, top in zip(exact.exp().numpy(), served.exp().numpy(), token_ids.tolist(), strict=True):
        # What is left of 1 in float32 is no less than its rounding.
        parts = [(p[top], q[top]), *[[max(np.delete(part, top).sum(), 1e-7) for part in (p, q)]]]
        p, q = (np.append(*part) for part in zip(*parts, strict=True))
        coarse += max(0.0, float((p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300))).sum()))
    assert found.total_kld == pytest.approx(coarse, rel=1e-6, abs=1e-9)
    assert found.total_kld <= full + 7e-5
    assert found.num_agreeing == int((exact.argmax(-1) == served.argmax(-1)).sum())
    assert found.num_tokens == 7


def test_tokens_that_tie_for_the_first_place_agree() -> None:
    served = torch.tensor([[0.4, 0.4, 0.1], [0.5, 0.4, 0.1]], dtype=torch.float64).log()
    exact = torch.tensor([[0.3, 0.5, 0.1], [0.4, 0.5, 0.1]], dtype=torch.float64).log()
    assert compare(served, exact, exact.amax(-1)).num_agreeing == 1


def test_tokens_that_cannot_come_leave_a_number() -> None:
    served = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    assert compare(served, served, served[:, 0]) == Divergence(1, 0.0, 1)
    apart = compare(served, torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(), torch.zeros(1))
    assert apart.total_kld > 1000 and np.isfinite(apart.total_kld)


def test_sums_and_means() -> None:
    total = Divergence(3, 0.3, 2) + Divergence(1, 0.1, 1)
    assert (total.num_tokens, total.kld, total.agreement) == (4, pytest.approx(0.1), 0.75)
    assert (Divergence().kld, Divergence().agreement) == (0, 0)


@pytest.mark.parametrize(
    ("measured", "max_kld", "min_agreement"),
    [
        (Divergence(1000, 2.0, 980), 0.006, 0.94),
        (Divergence(1000, 0.001, 1000), 3e-4, 0.97),
        (Divergence(1000, 2000.0, 100), 6.0, 0.0),
    ],
)
def test_the_range_ends_at_three_times_what_was_measured(
    measured: Divergence, max_kld: float, min_agreement: float
) -> None:
    expected = FidelityRange(measured)
    assert expected.max_kld == pytest.approx(max_kld)
    assert expected.min_agreement == pytest.approx(min_agreement)
    assert measured in expected
    assert Divergence(1000, 1000.01 * max_kld, 1000) not in expected
    assert min_agreement == 0 or Divergence(1000, 0, int(1000 * min_agreement) - 1) not in expected


class ScriptedReader:
    """Stand in for the ExactReader: finds a token less likely, and another the likeliest, if told so."""

    max_tokens = 10**6

    def __init__(self) -> None:
        self.log_ratio = 0.0
        self.is_other = False

    def read(self, token_ids: Sequence[int], wanted: Tensor) -> Iterator[Tensor]:
        exact = SERVED.expand(len(wanted), -1).clone()
        exact[:, 0] -= self.log_ratio
        best = exact[:, :1] + self.is_other
        yield torch.cat([exact, best], dim=1)


SERVED = torch.tensor([0.7, 0.1], dtype=torch.float64).log()
ROW = [SERVED[0].item(), 1.0, *SERVED.tolist(), 5.0, 6.0]


class Answers:
    """Give a Fidelity answers."""

    def __init__(self) -> None:
        self.reader = ScriptedReader()
        self.fidelity = Fidelity(cast(Any, self.reader), Timeline(), 1.0)
        self.give(NUM_JUDGED)
        self.fidelity.set_range()

    def give(self, num_tokens: int) -> None:
        predictions = self.fidelity.begin(300)
        assert predictions is not None
        for index in range(301, 301 + num_tokens):
            predictions.append(index, ROW)
        self.fidelity.end(predictions, [5] * (301 + num_tokens))
        while self.fidelity.has_work:
            self.fidelity.work()


@pytest.mark.parametrize("by_agreement", [False, True])
def test_the_alarm_is_one_line_and_so_is_its_end(
    caplog: pytest.LogCaptureFixture, by_agreement: bool
) -> None:
    caplog.set_level(logging.INFO)
    answers = Answers()
    assert answers.fidelity.state.total == Divergence()
    answers.give(NUM_JUDGED)
    answers.reader.log_ratio, answers.reader.is_other = (0.0, True) if by_agreement else (1.0, False)
    for _ in range(20):
        answers.give(100)
    [alarm] = caplog.records
    assert alarm.levelno == logging.WARNING and answers.fidelity.state.is_alarming
    text = alarm.getMessage()
    assert "has left its range: KL divergence" in text and "alarm above 0.0003 or below 97.0%" in text
    answers.reader.log_ratio, answers.reader.is_other = 0.0, False
    answers.give(100)
    assert answers.fidelity.state.is_alarming  # not by a hundred predictions
    for _ in range(20):
        answers.give(100)
    _, end = caplog.records
    assert end.levelno == logging.INFO and "is back in its range" in end.getMessage()
    state = answers.fidelity.state
    assert not state.is_alarming and state.num_answers == 42
    assert state.total.num_tokens == 41 * 100 + NUM_JUDGED


def test_few_predictions_raise_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    answers = Answers()
    answers.reader.is_other = True
    answers.give(NUM_JUDGED - 1)
    assert not caplog.records and not answers.fidelity.state.is_alarming
    answers.give(1)
    assert len(caplog.records) == 1 and answers.fidelity.state.is_alarming


def test_old_predictions_are_forgotten() -> None:
    answers = Answers()
    for _ in range(30):
        answers.give(NUM_JUDGED)
    answers.reader.is_other = True
    answers.give(NUM_JUDGED)
    assert answers.fidelity.state.is_alarming
