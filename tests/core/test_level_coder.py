"""LevelCoder finds the nearest level of any number and reads packed levels back."""

from __future__ import annotations

import math

import pytest
import torch

from turboquant_core.codebook import Codebook, e4m3_codebook, lloyd_max_codebook
from turboquant_core.level_coder import LevelCoder, level_coder
from turboquant_core.packing import pack

CPU = torch.device("cpu")
CODEBOOKS = [
    *((e4m3_codebook(dim, bits), bits) for dim in (16, 100, 128) for bits in (2, 3, 4)),
    *((lloyd_max_codebook(64, bits), bits) for bits in range(1, 9)),
    (Codebook(centroids=(-3e5, -1.0, 1e-7, 7e4), boundaries=(-150_000.5, -0.5, 35_000.0)), 2),
]


@pytest.mark.parametrize(("codebook", "bits"), CODEBOOKS)
def test_numbers_beside_a_boundary_and_on_it_take_the_right_level(codebook: Codebook, bits: int) -> None:
    """On the boundary that is the lower one."""
    boundaries = torch.tensor(codebook.boundaries, dtype=torch.float32)
    up = torch.full_like(boundaries, math.inf)
    near = torch.stack([boundaries.nextafter(-up), boundaries, boundaries.nextafter(up)])
    codes = LevelCoder(codebook, bits, CPU).nearest(near)
    lower = torch.arange(len(boundaries))
    assert torch.equal(codes.long(), torch.stack([lower, lower, lower + 1]))


@pytest.mark.parametrize(("codebook", "bits"), CODEBOOKS)
def test_the_level_of_a_code_is_the_nearest(codebook: Codebook, bits: int) -> None:
    x = torch.randn(3, 1000, 20, generator=torch.Generator().manual_seed(0)) / 8
    coder = LevelCoder(codebook, bits, CPU)
    codes = coder.nearest(x)
    assert (codes.shape, codes.dtype) == (x.shape, torch.uint8)
    centroids = torch.tensor(codebook.centroids)
    nearest = (x.unsqueeze(-1) - centroids).abs().amin(-1)
    torch.testing.assert_close((x - coder.levels(codes)).abs(), nearest, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("codebook", "bits"), CODEBOOKS)
def test_near_levels_are_the_nearest_but_for_rounding(codebook: Codebook, bits: int) -> None:
    x = torch.randn(3, 1000, 20, generator=torch.Generator().manual_seed(0)) / 8
    coder = LevelCoder(codebook, bits, CPU)
    levels = coder.near_levels(x)
    assert torch.isin(levels, torch.tensor(codebook.centroids)).all()
    nearest = (x - coder.levels(coder.nearest(x))).abs()
    assert ((x - levels).abs() <= nearest + 2.0**-10 * x.abs() + 2.0**-24).all()


@pytest.mark.parametrize(("codebook", "bits"), CODEBOOKS)
def test_numbers_of_any_size_and_nan_have_a_code(codebook: Codebook, bits: int) -> None:
    coder = LevelCoder(codebook, bits, CPU)
    huge = torch.tensor([math.inf, 3e38, 1e6, -1e6, -3e38, -math.inf])
    assert coder.nearest(huge).tolist() == [2**bits - 1] * 3 + [0] * 3
    tiny = torch.tensor([1e-45, 1e-39, 3e-8, 0.0, -0.0, -3e-8, -1e-39, -1e-45])
    expected = torch.bucketize(tiny, torch.tensor(codebook.boundaries))
    assert torch.equal(coder.nearest(tiny).long(), expected)
    assert 0 <= coder.nearest(torch.tensor([math.nan])).item() < 2**bits


@pytest.mark.parametrize(("codebook", "bits"), CODEBOOKS)
@pytest.mark.parametrize("dim", [16, 17, 96])
def test_packed_codes_are_read_as_their_levels(codebook: Codebook, bits: int, dim: int) -> None:
    coder = LevelCoder(codebook, bits, CPU)
    codes = torch.randint(0, 2**bits, (4, 5, dim), generator=torch.Generator().manual_seed(1))
    levels = coder.levels(codes)
    assert levels.dtype == torch.float32
    assert torch.equal(levels, torch.tensor(codebook.centroids)[codes])
    assert torch.equal(coder.unpack(pack(codes.to(torch.uint8), bits), dim), levels)


def test_all_quantizers_of_a_codebook_share_one_coder() -> None:
    assert level_coder(e4m3_codebook(64, 4), 4, CPU) is level_coder(e4m3_codebook(64, 4), 4, CPU)
    assert level_coder(e4m3_codebook(64, 4), 4, CPU) is not level_coder(e4m3_codebook(128, 4), 4, CPU)


def test_a_coder_made_in_inference_mode_works_outside() -> None:
    level_coder.cache_clear()
    with torch.inference_mode():
        coder = level_coder(e4m3_codebook(64, 4), 4, CPU)
    weights = torch.ones(3, requires_grad=True)
    levels = coder.levels(coder.nearest(torch.tensor([-1.0, 0.01, 1.0])))
    (weights * levels).sum().backward()
    assert torch.equal(weights.grad, levels)
