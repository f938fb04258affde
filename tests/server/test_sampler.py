"""The sampler draws from the distribution that its parameters describe, and the same for the same seed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_server.engine.sampler import INVALID_TOKEN_ID, gumbel_noise, keep_most_likely, sample
from turboquant_server.engine.sampling_params import SamplingParams

CPU = torch.device("cpu")


def params(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> SamplingParams:
    return SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)


def draw(logits: torch.Tensor, sampling_params: SamplingParams, num_draws: int, seed: int = 0) -> np.ndarray:
    tokens = [int(sample(logits, sampling_params, seed, position)) for position in range(num_draws)]
    return np.bincount(tokens, minlength=len(logits))


def reference_probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Do in float64 and loops what temperature, then top_k, then top_p mean; ties go to the lower id."""
    scores = logits.astype(np.float64) / temperature
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    kept = order[:top_k] if top_k else order
    weights = {index: np.exp(scores[index] - scores[order[0]]) for index in kept}
    total = sum(weights.values())
    probabilities = np.zeros(len(scores))
    reached = 0.0
    for index in kept:
        if top_p < 1 and reached >= top_p:
            break
        probabilities[index] = weights[index] / total
        reached += probabilities[index]
    return probabilities / probabilities.sum()


def chi_square_per_degree(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    possible = expected > 0
    assert not counts[~possible].any()
    degrees = max(int(possible.sum()) - 1, 1)
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum() / degrees)


def test_temperature_zero_takes_the_first_of_the_highest() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, -2.0], dtype=torch.bfloat16)
    assert int(sample(logits, params(temperature=0), seed=5, position=9)) == 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 7, 1.0), (1.0, 0, 0.8), (1.3, 12, 0.7)],
)
def test_tokens_are_drawn_with_their_softmax_probability(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.5
    counts = draw(logits, params(temperature, top_k, top_p), num_draws=6000)
    probabilities = reference_probabilities(logits.numpy(), temperature, top_k, top_p)
    # Chi-square over its degrees of freedom has mean 1; at 6 degrees or more it is below 2 in 94%.
    assert chi_square_per_degree(counts, probabilities) < 2


@settings(deadline=None, max_examples=150)
@given(
    # Few distinct values, so that most examples have ties, also at the place where a set is cut off.
    levels=st.lists(st.integers(-6, 6), min_size=1, max_size=30),
    temperature=st.sampled_from([0.25, 0.7, 1.0, 1.9]),
    top_k=st.integers(0, 33),
    top_p=st.one_of(st.just(1.0), st.sampled_from([0.05, 0.31, 0.52, 0.77, 0.93, 0.999])),
)
def test_top_k_and_top_p_keep_exactly_the_reference_set(
    levels: list[int], temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.tensor(levels, dtype=torch.float32) / 2
    scores, token_ids = keep_most_likely(logits.double() / temperature, top_k, top_p)
    kept = token_ids[scores > -torch.inf].tolist()
    reference = reference_probabilities(logits.numpy(), temperature, top_k, top_p)
    assert sorted(kept) == np.flatnonzero(reference).tolist()


def test_top_k_keeps_exactly_k_of_equal_tokens() -> None:
    assert set(np.flatnonzero(draw(torch.zeros(9), params(top_k=4), num_draws=200))) == {0, 1, 2, 3}


def test_top_k_of_one_is_greedy() -> None:
    logits = torch.tensor([0.0, 2.0, 2.0])
    assert draw(logits, params(temperature=1.9, top_k=1), num_draws=50).tolist() == [0, 50, 0]


def test_top_p_keeps_the_token_that_reaches_it_and_always_one() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert set(np.flatnonzero(draw(logits, params(top_p=0.5), num_draws=200))) == {0}
    assert set(np.flatnonzero(draw(logits, params(top_p=0.51), num_draws=200))) == {0, 1}
    assert set(np.flatnonzero(draw(logits, params(top_p=1e-9), num_draws=50))) == {0}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy_and_not_a_nan(temperature: float) -> None:
    logits = torch.tensor([-80.0, 40.0, 39.0, -torch.inf])
    assert draw(logits, params(temperature), num_draws=20).tolist() == [0, 20, 0, 0]


def test_a_banned_token_is_never_drawn() -> None:
    logits = torch.tensor([0.0, -torch.inf, 0.0])
    assert draw(logits, params(temperature=2.0), num_draws=300)[1] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]])
def test_logits_that_are_no_numbers_are_reported(bad: list[float], temperature: float) -> None:
    assert int(sample(torch.tensor(bad), params(temperature), seed=0, position=0)) == INVALID_TOKEN_ID


def test_the_same_seed_and_position_give_the_same_token_and_others_do_not() -> None:
    logits = torch.zeros(1000)
    first = [int(sample(logits, params(), seed=7, position=position)) for position in range(20)]
    assert first == [int(sample(logits, params(), seed=7, position=position)) for position in range(20)]
    assert len(set(first)) > 15
    assert first != [int(sample(logits, params(), seed=8, position=position)) for position in range(20)]


def test_the_noise_of_a_token_does_not_depend_on_the_vocabulary_size() -> None:
    assert torch.equal(gumbel_noise(50, 3, 4, CPU), gumbel_noise(5000, 3, 4, CPU)[:50])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 + 5])
def test_the_noise_is_finite_gumbel_noise_for_any_seed(seed: int) -> None:
    noise = gumbel_noise(200_000, seed, 12, CPU).numpy()
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.015)
    assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.02)


def test_the_noise_follows_splitmix64() -> None:
    """Compare with the published generator, written out in plain Python integers."""

    def splitmix64(state: int) -> int:
        z = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the reference implementation for state 0
    key = splitmix64(splitmix64(11) ^ 5)
    states = [(key + index * 0x9E3779B97F4A7C15) % 2**64 for index in range(100)]
    uniform = np.array([((splitmix64(state) >> 12) + 0.5) / 2**52 for state in states])
    np.testing.assert_allclose(gumbel_noise(100, 11, 5, CPU).numpy(), -np.log(-np.log(uniform)), rtol=1e-12)


def test_neighbouring_seeds_positions_and_tokens_are_uncorrelated() -> None:
    noise = {
        (seed, position): gumbel_noise(20_000, seed, position, CPU).numpy()
        for seed, position in itertools.product(range(3), range(3))
    }
    for one, other in itertools.combinations(noise.values(), 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    for one in noise.values():
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("stop", ("",)),
    ],
)
def test_sampling_params_name_the_field_that_is_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="stop string" if field == "stop" else field):
        SamplingParams(**{"max_tokens": 5, field: value})
