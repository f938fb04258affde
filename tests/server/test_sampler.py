"""The sampler draws from the distribution that its parameters describe, and each row alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_server.engine import sampler
from turboquant_server.engine.sampler import (
    INVALID_TOKEN_ID,
    SamplingRow,
    gumbel_noise,
    keep_most_likely,
    sample,
)
from turboquant_server.engine.sampling_params import SamplingParams


def params(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> SamplingParams:
    return SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def sample_one(
    logits: torch.Tensor, sampling_params: SamplingParams, seed: int = 0, position: int = 0, choice: int = 0
) -> int:
    return int(sample(logits[None], [SamplingRow(sampling_params, seed, choice, position)]))


def draw(logits: torch.Tensor, sampling_params: SamplingParams, num_draws: int) -> np.ndarray:
    rows = [SamplingRow(sampling_params, 0, 0, position) for position in range(num_draws)]
    return np.bincount(sample(logits.expand(num_draws, -1), rows).numpy(), minlength=len(logits))


def noise_of(vocab_size: int, *keys: tuple[int, ...]) -> np.ndarray:
    """Return the noise ``[num_keys, vocab_size]`` of each (seed, choice index, position)."""
    rows = [SamplingRow(params(), seed, choice, position) for seed, choice, position in keys]
    return gumbel_noise(torch.tensor([row.noise_key for row in rows]), vocab_size).numpy()


def splitmix64(state: int) -> int:
    """Do what the published generator does, in plain Python integers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def reference_noise(vocab_size: int, row: SamplingRow) -> np.ndarray:
    key = splitmix64(splitmix64(splitmix64(row.seed % 2**64) ^ row.choice_index) ^ row.position)
    states = [(key + index * 0x9E3779B97F4A7C15) % 2**64 for index in range(vocab_size)]
    uniform = np.array([((splitmix64(state) >> 12) + 0.5) / 2**52 for state in states])
    return -np.log(-np.log(uniform))


def reference_probabilities(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> np.ndarray:
    """Do in float64 and loops what temperature, min_p, top_k and top_p mean; ties go to the lower id."""
    scores = logits.astype(np.float64) / temperature
    lowest = scores.max() + np.log(min_p) if min_p else -np.inf
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    order = [index for index in order if scores[index] >= lowest]
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


def reference_token(logits: np.ndarray, row: SamplingRow) -> int:
    """Do for one row, in float64, what the sampler does for many."""
    highest = logits.max()
    if not np.isfinite(highest):
        return INVALID_TOKEN_ID
    wanted = row.sampling_params
    if wanted.temperature == 0:
        return int(logits.argmax())
    probabilities = reference_probabilities(
        logits, wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p
    )
    scores = (logits.astype(np.float64) - highest) / wanted.temperature
    return int(np.where(probabilities > 0, scores + reference_noise(len(logits), row), -np.inf).argmax())


def chi_square_per_degree(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    possible = expected > 0
    assert not counts[~possible].any()
    degrees = max(int(possible.sum()) - 1, 1)
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum() / degrees)


def test_temperature_zero_takes_the_first_of_the_highest() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, -2.0], dtype=torch.bfloat16)
    assert sample_one(logits, params(temperature=0), seed=5, position=9) == 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        *(
            (1.0, 0, 1.0, 0.0),
            (0.5, 0, 1.0, 0.0),
            (2.0, 7, 1.0, 0.0),
            (1.0, 0, 0.8, 0.0),
            (1.3, 12, 0.7, 0.0),
        ),
        *((1.5, 0, 1.0, 0.04), (1.2, 12, 0.9, 0.06)),
    ],
)
def test_tokens_are_drawn_with_their_softmax_probability(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.5
    counts = draw(logits, params(temperature, top_k, top_p, min_p), num_draws=6000)
    probabilities = reference_probabilities(logits.numpy(), temperature, top_k, top_p, min_p)
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
    scores = (logits.double() - logits.max()) / temperature
    scores, token_ids = keep_most_likely(scores[None], [params(temperature, top_k, top_p)])
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
    assert sample_one(torch.tensor(bad), params(temperature)) == INVALID_TOKEN_ID


def test_the_same_seed_choice_and_position_give_the_same_token_and_others_do_not() -> None:
    def tokens(seed: int, choice: int) -> list[int]:
        rows = [SamplingRow(params(), seed, choice, position) for position in range(20)]
        return sample(torch.zeros(20, 1000), rows).tolist()

    assert tokens(7, 0) == tokens(7, 0)
    assert len(set(tokens(7, 0))) > 15
    assert len({tuple(tokens(seed, choice)) for seed in (6, 7, 8) for choice in (0, 1, 2)}) == 9


LOGITS = st.one_of(
    # Few distinct values make ties, both zeros among them; the rest makes rows of which none can be drawn.
    st.integers(-6, 6).map(lambda level: level / 2),
    st.just(-0.0),
    st.floats(-30, 30, width=32),
    st.just(-torch.inf),
)
ROWS = st.builds(
    SamplingRow,
    sampling_params=st.builds(
        params,
        temperature=st.sampled_from([0.0, 1e-300, 0.3, 1.0, 1.7]),
        top_k=st.sampled_from([0, 0, 1, 3, 2**70]),
        top_p=st.sampled_from([1.0, 1.0, 0.31, 0.93]),
        # No share that a logit lies exactly at, which rounding might put on either side.
        min_p=st.sampled_from([0.0, 0.0, 0.013, 0.27, 1.0]),
    ),
    seed=st.integers(),
    choice_index=st.integers(0, 3),
    position=st.integers(0, 10**6),
)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), vocab_size=st.integers(1, 19))
def test_a_row_gets_its_token_whatever_rows_are_beside_it(data: st.DataObject, vocab_size: int) -> None:
    one_row = st.lists(LOGITS, min_size=vocab_size, max_size=vocab_size)
    bad_row = one_row.map(lambda values: [*values[1:], torch.nan])
    batch = data.draw(st.lists(st.tuples(st.one_of(one_row, one_row, bad_row), ROWS), min_size=1, max_size=9))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    logits = torch.tensor([values for values, _ in batch]).to(dtype)
    rows = [row for _, row in batch]
    tokens = sample(logits, rows).tolist()
    order = data.draw(st.permutations(range(len(rows))))
    assert sample(logits[order], [rows[index] for index in order]).tolist() == [tokens[i] for i in order]
    for token, row_logits, row in zip(tokens, logits.double(), rows, strict=True):
        assert token == reference_token(row_logits.numpy(), row)


def test_noise_and_sorted_scores_are_the_same_to_the_bit_in_any_batch() -> None:
    keys = [(seed, seed % 2, seed * 7) for seed in range(9)]
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(9, 1003, generator=generator, dtype=torch.float64)
    scores -= scores.amax(dim=-1, keepdim=True)
    wanted = [params(top_k=40 * index, top_p=1 - index / 10) for index in range(9)]
    noise, (kept, token_ids) = noise_of(1003, *keys), keep_most_likely(scores, wanted)
    for index in range(9):
        assert np.array_equal(noise[index], noise_of(1003, keys[index])[0])
        kept_alone, token_ids_alone = keep_most_likely(scores[index : index + 1], wanted[index : index + 1])
        assert torch.equal(kept[index], kept_alone[0])
        assert torch.equal(token_ids[index], token_ids_alone[0])


def test_rows_taken_in_pieces_get_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(23, 50, generator=torch.Generator().manual_seed(3))
    wanted = [params(), params(top_p=0.7), params(temperature=0), params(1.4, top_k=8)]
    rows = [SamplingRow(wanted[index % 4], index, 0, 5) for index in range(23)]
    tokens = sample(logits, rows)
    for num_elements in (1, 100, 170):
        monkeypatch.setattr(sampler, "_MAX_ELEMENTS_AT_ONCE", num_elements)
        assert torch.equal(sample(logits, rows), tokens)


def test_no_rows_give_no_tokens_and_a_row_too_few_is_refused() -> None:
    assert sample(torch.zeros(0, 5), []).tolist() == []
    with pytest.raises(ValueError, match="2 rows"):
        sample(torch.zeros(2, 5), [SamplingRow(params(), 0, 0, 0)])


def test_the_noise_of_a_token_does_not_depend_on_the_vocabulary_size() -> None:
    assert np.array_equal(noise_of(50, (3, 1, 4)), noise_of(5000, (3, 1, 4))[:, :50])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 + 5])
def test_the_noise_is_finite_gumbel_noise_for_any_seed(seed: int) -> None:
    noise = noise_of(200_000, (seed, 0, 12))
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.015)
    assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.02)


def test_the_noise_follows_splitmix64() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the first output of the published implementation for state 0
    keys = [(11, 0, 5), (11, 1, 5), (-3, 2, 10**6)]
    reference = [reference_noise(100, SamplingRow(params(), *key)) for key in keys]
    np.testing.assert_allclose(noise_of(100, *keys), reference, rtol=1e-12)


def test_neighbouring_seeds_choices_positions_and_tokens_are_uncorrelated() -> None:
    noise = noise_of(20_000, *itertools.product(range(3), repeat=3))
    correlations = np.corrcoef(np.concatenate([noise[:, :-1], noise[:, 1:]]))
    assert np.abs(correlations - np.eye(len(correlations))).max() < 0.035
