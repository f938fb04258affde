"""Rotations are orthogonal, projections Gaussian, and neither depends on the state of torch."""

from __future__ import annotations

import math

import pytest
import torch

from turboquant_core.rotation import gaussian_matrix, rotation_matrix

DIMS = [16, 17, 64, 80, 96, 100, 128, 192, 256, 512, 1536]


@pytest.mark.parametrize("dim", DIMS)
def test_rotations_are_orthogonal(dim: int) -> None:
    rotation = rotation_matrix(dim, 0)
    assert rotation.dtype == torch.float32
    product = rotation.double() @ rotation.double().T
    assert (product - torch.eye(dim, dtype=torch.float64)).abs().max() < 1e-6


@pytest.mark.parametrize("dim", [16, 64, 128, 512])
def test_powers_of_two_use_a_signed_hadamard_matrix(dim: int) -> None:
    rotation = rotation_matrix(dim, 0)
    torch.testing.assert_close(rotation.abs(), torch.full((dim, dim), 1 / math.sqrt(dim)))
    assert len(set(rotation[0].sign().tolist())) == 2


@pytest.mark.parametrize("dim", [64, 96])
def test_the_seed_decides(dim: int) -> None:
    first = rotation_matrix(dim, 1).clone()
    rotation_matrix.cache_clear()
    assert torch.equal(rotation_matrix(dim, 1), first)
    assert not torch.equal(rotation_matrix(dim, 2), first)


@pytest.mark.parametrize("dim", [64, 96])
def test_the_global_state_of_torch_neither_matters_nor_changes(dim: int) -> None:
    expected = rotation_matrix(dim, 3).clone()
    rotation_matrix.cache_clear()
    state = torch.get_rng_state()
    with torch.device("meta"), torch.inference_mode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            rotation = rotation_matrix(dim, 3)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(rotation, expected)
    weights = torch.ones(dim, requires_grad=True)
    (weights @ rotation).sum().backward()  # raises for a tensor made in inference mode
    assert weights.grad is not None


@pytest.mark.parametrize("dim", [17, 96, 128])
def test_projections_are_standard_normal_and_do_not_repeat_what_the_rotation_is_made_of(dim: int) -> None:
    projection = gaussian_matrix(dim, 0)
    assert projection.dtype == torch.float32
    assert projection.mean().abs() < 4 / dim
    assert (projection.std() - 1).abs() < 4 / dim
    for dtype in (torch.float32, torch.float64):
        same_seed = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=dtype)
        assert (projection * same_seed).mean().abs() < 4 / dim
    assert (projection * rotation_matrix(dim, 0)).sum().abs() < 4 * math.sqrt(dim)
