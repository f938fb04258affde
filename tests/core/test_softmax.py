"""Keys that come in pieces are weighed as if they had come at once."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant_core.softmax import RunningSoftmax

CPU = torch.device("cpu")
ROWS = (2, 3)  # heads, queries


def average(scores: Tensor, values: Tensor, sizes: list[int], sink_scores: Tensor | None = None) -> Tensor:
    """Average values ``[2, num_keys, dim]`` by scores ``[2, 3, num_keys]``, in pieces of some sizes."""
    softmax = RunningSoftmax(ROWS, values.shape[-1], CPU, sink_scores)
    for some_scores, some_values in zip(scores.split(sizes, -1), values.split(sizes, 1), strict=True):
        softmax.add(some_scores.clone(), functools.partial(torch.matmul, other=some_values))
    return softmax.result()


def expected(scores: Tensor, values: Tensor, sink_scores: Tensor | None = None) -> Tensor:
    scores = scores.double()
    if sink_scores is not None:
        scores = torch.cat([scores, sink_scores.double().expand(ROWS).unsqueeze(-1)], -1)
    return scores.softmax(-1)[..., : values.shape[1]] @ values.double()


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    offset=st.sampled_from([-1e4, 0.0, 1e4]),
    share_seen=st.sampled_from([0.03, 0.5, 1.0]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_the_average_is_that_of_all_keys_at_once(
    sizes: list[int], spread: float, offset: float, share_seen: float, has_sinks: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_keys = sum(sizes)
    scores = offset + spread * torch.randn(*ROWS, num_keys, generator=generator)
    is_seen = torch.rand(*ROWS, num_keys, generator=generator) < share_seen
    is_seen[..., seed % num_keys] = True  # every query sees some key, in the first piece or in the last
    scores = scores.masked_fill(~is_seen, -torch.inf)
    values = torch.randn(2, num_keys, 5, generator=generator)
    sink_scores = offset + torch.randn(ROWS, generator=generator) if has_sinks else None
    result = average(scores, values, sizes, sink_scores)
    torch.testing.assert_close(
        result.double(), expected(scores, values, sink_scores), rtol=1e-5, atol=1e-5, check_stride=False
    )


def test_sink_scores_are_broadcast_to_the_queries() -> None:
    scores, values = torch.zeros(*ROWS, 4), torch.ones(2, 4, 1)
    sink_scores = torch.tensor([0.0, 1.0, -torch.inf])
    result = average(scores, values, [1, 3], sink_scores)
    assert torch.allclose(result[:, :, 0], 4 / (4 + sink_scores.exp()))


def test_a_query_that_sees_only_its_sink_gets_zero() -> None:
    scores = torch.full((*ROWS, 4), -torch.inf)
    assert torch.equal(average(scores, torch.ones(2, 4, 5), [2, 2], torch.zeros(3)), torch.zeros(*ROWS, 5))


@pytest.mark.parametrize("sizes", [[1] * 64, [64]])
def test_weights_add_up_to_one(sizes: list[int]) -> None:
    scores = 5 * torch.randn(*ROWS, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(average(scores, torch.ones(2, 64, 1), sizes), torch.ones(*ROWS, 1))
