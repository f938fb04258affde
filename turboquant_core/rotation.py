"""Seeded random matrices: rotations, which make any vector look like a random one, and projections."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# A projection must not repeat the Gaussian matrix behind a rotation; generators read 32 bits of a seed.
_GAUSSIAN_SEED_OFFSET = 0x514A4C


@functools.lru_cache(maxsize=32)
def rotation_matrix(dim: int, seed: int) -> Tensor:
    """Return the orthogonal matrix ``R`` of a dimension and a seed; its rows are the new axes.

    ``rotated = x @ R.T`` and ``x = rotated @ R``. A power of two gives a Hadamard matrix with random column
    signs, any other dimension an orthogonal matrix of the Haar measure (QR of a Gaussian matrix).

    Args:
        dim: Dimension of the vectors.
        seed: Seed of the signs or of the Gaussian matrix.

    Returns:
        float32 ``[dim, dim]`` on the CPU. Shared between callers: do not write to it.
    """
    # Whoever asks first may be in inference mode; a cached inference tensor would be useless to autograd.
    with torch.inference_mode(False):
        generator = torch.Generator(device="cpu").manual_seed(seed)
        is_power_of_two = dim & (dim - 1) == 0
        rotation = _signed_hadamard(dim, generator) if is_power_of_two else _haar(dim, generator)
        return rotation.to(torch.float32)


@functools.lru_cache(maxsize=32)
def gaussian_matrix(dim: int, seed: int) -> Tensor:
    """Return a matrix of independent standard normal numbers, independent of the rotation of the same seed.

    Args:
        dim: Number of rows and columns.
        seed: Seed of the numbers.

    Returns:
        float32 ``[dim, dim]`` on the CPU. Shared between callers: do not write to it.
    """
    with torch.inference_mode(False):
        generator = torch.Generator(device="cpu").manual_seed(seed + _GAUSSIAN_SEED_OFFSET)
        return torch.randn(dim, dim, generator=generator, dtype=torch.float32, device="cpu")


def _signed_hadamard(dim: int, generator: torch.Generator) -> Tensor:
    """Return Sylvester's Hadamard matrix, normalised, with random column signs."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (dim,), generator=generator, device="cpu") * 2 - 1
    return matrix.mul_(signs).div_(math.sqrt(dim))


def _haar(dim: int, generator: torch.Generator) -> Tensor:
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    # QR is unique only up to signs: a positive diagonal makes the result reproducible and Haar-distributed.
    orthogonal: Tensor = q * r.diagonal().sign()
    return orthogonal
