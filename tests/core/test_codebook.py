"""Codebooks fulfil the Lloyd conditions on the exact marginal, by Simpson's rule on the density itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from turboquant_core.codebook import Codebook, e4m3_codebook, lloyd_max_codebook

DIMS = [16, 17, 64, 80, 96, 100, 128, 192, 256, 512, 1536]
BITS = range(1, 9)
SIMPSON_INTERVALS = 2000


def cell_moments(dim: int, edges: torch.Tensor) -> torch.Tensor:
    """Integrate 1, t and t^2 times the density of a coordinate over every cell, ``[3, num_cells]``."""
    steps = torch.linspace(0, 1, SIMPSON_INTERVALS + 1, dtype=torch.float64)
    weights = torch.ones_like(steps)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    widths = edges.diff().unsqueeze(-1)
    t = edges[:-1].unsqueeze(-1) + widths * steps
    # The surface of the unit sphere gives the constant of (1 - t^2)^((dim - 3) / 2).
    log_constant = math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2) - math.log(math.pi) / 2
    density = torch.exp(log_constant + (dim - 3) / 2 * torch.log1p(-(t**2)))
    weighted = density * weights * widths / (3 * SIMPSON_INTERVALS)
    return torch.stack([(weighted * t**power).sum(-1) for power in range(3)])


def codebook_moments(dim: int, codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor]:
    end = min(1.0, 14 / math.sqrt(dim))
    edges = torch.tensor([-end, *codebook.boundaries, end], dtype=torch.float64)
    return torch.tensor(codebook.centroids, dtype=torch.float64), cell_moments(dim, edges)


def distortion(dim: int, codebook: Codebook) -> float:
    """Return the mean squared error of a unit vector whose coordinates become the codebook's levels."""
    centroids, (mass, first, second) = codebook_moments(dim, codebook)
    assert mass.sum().item() == pytest.approx(1, abs=1e-10)
    return dim * (second - 2 * centroids * first + centroids**2 * mass).sum().item()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_lloyd_conditions_hold(dim: int, bits: int) -> None:
    codebook = lloyd_max_codebook(dim, bits)
    centroids, (mass, first, _) = codebook_moments(dim, codebook)
    assert len(centroids) == 2**bits
    assert (centroids.diff() > 0).all()
    # Every level is the conditional mean of its cell, every boundary the midpoint of its neighbours.
    assert (centroids - first / mass).abs().max().item() * math.sqrt(dim) < 1e-8
    midpoints = (centroids[1:] + centroids[:-1]) / 2
    torch.testing.assert_close(
        torch.tensor(codebook.boundaries, dtype=torch.float64), midpoints, rtol=1e-15, atol=0
    )


@pytest.mark.parametrize(("bits", "expected"), [(1, 0.3609), (2, 0.1160), (3, 0.0340), (4, 0.0093)])
def test_mean_squared_error_at_dim_128(bits: int, expected: float) -> None:
    assert distortion(128, lloyd_max_codebook(128, bits)) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("dim", DIMS)
def test_every_bit_lowers_the_error_by_four_to_six_decibels(dim: int) -> None:
    errors = [distortion(dim, lloyd_max_codebook(dim, bits)) for bits in BITS]
    ratios = [high / low for high, low in itertools.pairwise(errors)]
    assert all(4 < 10 * math.log10(ratio) < 6.05 for ratio in ratios)


def test_the_limit_is_the_table_of_max_for_a_gaussian() -> None:
    dim = 1_000_000
    for bits, magnitudes in {
        1: [0.7980],
        2: [0.4528, 1.510],
        3: [0.2451, 0.7560, 1.344, 2.152],
        4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
    }.items():
        positive = lloyd_max_codebook(dim, bits).centroids[2 ** (bits - 1) :]
        assert [c * math.sqrt(dim) for c in positive] == pytest.approx(magnitudes, abs=6e-4)


@pytest.mark.parametrize(("bits", "limit"), [(2, 1.001), (3, 1.004), (4, 1.014)])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256, 512])
def test_e4m3_levels_cost_little(dim: int, bits: int, limit: float) -> None:
    ratio = distortion(dim, e4m3_codebook(dim, bits)) / distortion(dim, lloyd_max_codebook(dim, bits))
    assert 1 <= ratio < limit


@pytest.mark.parametrize(("bits", "unit"), [(2, 13.24614), (3, 12.04197), (4, 8.73919)])
def test_e4m3_levels_are_exact_in_float8_up_to_one_factor(bits: int, unit: float) -> None:
    levels = torch.tensor(e4m3_codebook(128, bits).centroids, dtype=torch.float64) * unit * math.sqrt(128)
    exact = levels.to(torch.float32).to(torch.float8_e4m3fn).to(torch.float64)
    torch.testing.assert_close(levels, exact, rtol=1e-12, atol=0)


def test_codebooks_are_cached() -> None:
    assert lloyd_max_codebook(128, 4) is lloyd_max_codebook(128, 4)
    assert e4m3_codebook(128, 4) is e4m3_codebook(128, 4)


def test_the_global_state_of_torch_does_not_matter() -> None:
    expected = lloyd_max_codebook(72, 5)
    lloyd_max_codebook.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            codebook = lloyd_max_codebook(72, 5)
        finally:
            torch.set_default_dtype(torch.float32)
    assert codebook == expected


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="dim must be at least 16, got 8"):
        lloyd_max_codebook(8, 4)
    with pytest.raises(ValueError, match="bits must be from 1 to 8, got 0"):
        lloyd_max_codebook(128, 0)
    with pytest.raises(ValueError, match="dim must be at least 16, got 15"):
        e4m3_codebook(15, 4)
    with pytest.raises(ValueError, match="bits must be 2, 3 or 4"):
        e4m3_codebook(128, 8)
