"""TurboQuantMSE and TurboQuantProd: quantize and dequantize vectors of any shape (arXiv 2504.19874).

A vector is divided by its length and rotated, after which every coordinate has one known distribution. Each
coordinate becomes the nearest level of a codebook made for that distribution, and one number per vector,
its norm, is kept.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from turboquant_core.codebook import Codebook, check_dim, lloyd_max_codebook
from turboquant_core.level_coder import level_coder
from turboquant_core.packing import lookup, lookup_table, pack, packed_size
from turboquant_core.rotation import gaussian_matrix, rotation_matrix

ScaleRule = Literal["least_squares", "norm_corrected", "unbiased"]

_MAX_NORM = 65504.0  # the largest float16
_TINY = 1e-12  # keeps the scale of a zero vector finite
# Vectors are worked on in pieces so that temporaries stay small: 1 MB, which a CPU's cache holds (a third
# faster on long prompts), or 64 MB, which keeps a GPU busy.
_CPU_CHUNK_VALUES = 1 << 18
_GPU_CHUNK_VALUES = 1 << 24


class TurboQuantMSE:
    """Quantize vectors for a small mean squared error (arXiv 2504.19874, algorithm 1).

    With ``y`` the rotated unit vector and ``c`` its levels, the stored norm is ``||x||`` times

    - ``least_squares``: ``<y, c> / <c, c>``, the smallest mean squared error;
    - ``norm_corrected``: ``1 / ||c||``, which keeps the length of the vector;
    - ``unbiased``: ``1 / <y, c>``, which keeps ``<x, x_hat> = <x, x>``, so nothing shrinks on average.

    A zero vector dequantizes to zeros, a vector that holds inf or NaN to NaN throughout, and neither
    touches its neighbours. Norms are float16: they are clamped to 65504, lose precision below 6e-5 and are
    0 below 3e-8.

    Args:
        dim: Dimension of the vectors, at least 16.
        bits: Width of a code, 1 to 8.
        device: Where the vectors lie; the CPU by default.
        seed: Seed of the rotation.
        scale: How the stored norm is chosen.
        codebook: Levels for the coordinates of a rotated unit vector; Lloyd-Max by default.

    Raises:
        ValueError: If ``dim``, ``bits``, ``scale`` or the size of ``codebook`` is out of range.
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        *,
        device: torch.device | str | None = None,
        seed: int = 0,
        scale: ScaleRule = "least_squares",
        codebook: Codebook | None = None,
    ) -> None:
        check_dim(dim)
        if scale not in ("least_squares", "norm_corrected", "unbiased"):
            raise ValueError(f"scale must be least_squares, norm_corrected or unbiased, got {scale!r}")
        codebook = codebook or lloyd_max_codebook(dim, bits)
        num_levels = len(codebook.centroids)
        if num_levels != 2**bits:
            raise ValueError(f"a codebook for {bits} bits must have {2**bits} centroids, got {num_levels}")
        self.dim = dim
        self.bits = bits
        self.scale = scale
        self.rotation = rotation_matrix(dim, seed).to(device or "cpu")
        self._coder = level_coder(codebook, bits, self.rotation.device)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize vectors.

        Args:
            x: ``[..., dim]``, any floating-point type, any strides.

        Returns:
            Packed codes, uint8 ``[..., packed_size(dim, bits)]``, and norms, float16 ``[...]``.

        Raises:
            TypeError: If ``x`` is not floating-point.
            ValueError: If ``x`` has another last dimension or lies on another device.
        """
        _check_vectors(x, self.dim, self.rotation.device)
        flat = x.reshape(-1, self.dim)
        codes = x.new_empty((flat.shape[0], packed_size(self.dim, self.bits)), dtype=torch.uint8)
        norms = x.new_empty(flat.shape[0], dtype=torch.float16)
        for chunk in _chunks(flat):
            unit, lengths = normalize(flat[chunk])
            rotated = unit @ self.rotation.T
            indices = self._coder.nearest(rotated)
            codes[chunk] = pack(indices, self.bits)
            factors = scale_factor(rotated, self._coder.levels(indices), self.scale)
            norms[chunk] = to_norms(lengths * factors)
        return codes.view(*x.shape[:-1], codes.shape[-1]), norms.view(x.shape[:-1])

    @torch.no_grad()
    def dequantize(self, codes: Tensor, norms: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the vectors that codes and norms stand for.

        Args:
            codes: uint8 ``[..., packed_size(dim, bits)]``.
            norms: float16 ``[...]``.
            dtype: Type of the result, which is computed in float32.

        Returns:
            ``[..., dim]``.

        Raises:
            ValueError: If the shapes do not belong to each other or to this quantizer.
        """
        if codes.shape[:-1] != norms.shape:
            raise ValueError(f"codes {list(codes.shape)} and norms {list(norms.shape)} do not match")
        flat_codes = codes.reshape(norms.numel(), codes.shape[-1])
        flat_norms = norms.reshape(-1, 1)
        x = torch.empty(norms.numel(), self.dim, dtype=dtype, device=codes.device)
        for chunk in _chunks(x):
            rotated = self._coder.unpack(flat_codes[chunk], self.dim)
            x[chunk] = (rotated @ self.rotation).mul_(flat_norms[chunk])
        return x.view(*norms.shape, self.dim)


class ProdCodes(NamedTuple):
    """Hold what :class:`TurboQuantProd` stores of vectors with leading shape ``[...]``.

    Attributes:
        codes: uint8 ``[..., packed_size(dim, bits - 1)]``; no bytes at 1 bit.
        norms: float16 ``[...]``; zeros at 1 bit.
        signs: uint8 ``[..., packed_size(dim, 1)]``.
        residual_norms: float16 ``[...]``.
    """

    codes: Tensor
    norms: Tensor
    signs: Tensor
    residual_norms: Tensor


class TurboQuantProd:
    """Quantize vectors for unbiased inner products (arXiv 2504.19874, algorithm 2).

    All bits but one go to :class:`TurboQuantMSE`; the last one keeps the signs of ``S r``, where ``r`` is
    what that quantizer missed and ``S`` a dense standard normal matrix (QJL). Over ``S``, the estimate of
    ``<y, x>`` has the mean ``<y, x>``, and for unit vectors a variance of ``(pi / 2 - 1 / dim) / dim``
    times the mean squared error of the first part. It is biased for vectors whose norms float16 cannot
    hold, see :class:`TurboQuantMSE`.

    Args:
        dim: Dimension of the vectors, at least 16.
        bits: Bits per coordinate, 1 to 8; 1 bit is the signs alone.
        device: Where the vectors lie; the CPU by default.
        seed: Seed of the rotation and of ``S``.

    Raises:
        ValueError: If ``dim`` or ``bits`` is out of range.
    """

    def __init__(
        self, dim: int, bits: int, *, device: torch.device | str | None = None, seed: int = 0
    ) -> None:
        check_dim(dim)
        if not 1 <= bits <= 8:
            raise ValueError(f"bits must be from 1 to 8, got {bits}")
        self.dim = dim
        self.bits = bits
        self.mse = TurboQuantMSE(dim, bits - 1, device=device, seed=seed) if bits > 1 else None
        self.projection = gaussian_matrix(dim, seed).to(device or "cpu")
        self._sign_table = lookup_table(self.projection.new_tensor([-1.0, 1.0]), 1)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> ProdCodes:
        """Quantize vectors ``[..., dim]`` of any floating-point type.

        Raises:
            TypeError: If ``x`` is not floating-point.
            ValueError: If ``x`` has another last dimension or lies on another device.
        """
        _check_vectors(x, self.dim, self.projection.device)
        if self.mse is None:
            codes = x.new_empty((*x.shape[:-1], 0), dtype=torch.uint8)
            norms = x.new_zeros(x.shape[:-1], dtype=torch.float16)
            residual = x
        else:
            codes, norms = self.mse.quantize(x)
            residual = x - self.mse.dequantize(codes, norms)
        unit, lengths = normalize(residual)
        signs = pack((unit @ self.projection.T > 0).to(torch.uint8), 1)
        return ProdCodes(codes, norms, signs, to_norms(lengths))

    @torch.no_grad()
    def dequantize(self, q: ProdCodes, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return vectors ``[..., dim]`` whose inner products are unbiased; computed in float32.

        Raises:
            ValueError: If the shapes do not belong to each other or to this quantizer.
        """
        x = lookup(q.signs, self._sign_table, self.dim, 1) @ self.projection
        x.mul_(q.residual_norms.unsqueeze(-1)).mul_(math.sqrt(math.pi / 2) / self.dim)
        if self.mse is not None:
            x += self.mse.dequantize(q.codes, q.norms)
        return x.to(dtype)

    @torch.no_grad()
    def inner_product(self, query: Tensor, q: ProdCodes) -> Tensor:
        """Estimate ``<query, x>`` from the codes of ``x``.

        Args:
            query: ``[..., dim]``; its leading shape and that of ``q`` broadcast against each other.
            q: Codes of vectors.

        Returns:
            float32, of the broadcast leading shape.

        Raises:
            TypeError: If ``query`` is not floating-point.
            ValueError: If ``query`` has another last dimension or lies on another device.
        """
        _check_vectors(query, self.dim, self.projection.device)
        return torch.einsum("...d,...d->...", query.float(), self.dequantize(q))


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit vectors (float32 ``[..., dim]``) and lengths (float32 ``[...]``) of ``x``.

    Nothing overflows or underflows on the way. A zero vector stays zero; inf or NaN makes the length NaN.
    """
    x = x if x.dtype == torch.float64 else x.float()
    peaks = x.abs().amax(-1, keepdim=True)
    scaled = (x / peaks.where(peaks > 0, 1)).float()
    lengths = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    # Only a zero vector is shorter than 1 once its largest coordinate is 1.
    return scaled.div_(lengths.clamp_min(1)), (peaks * lengths).float().squeeze(-1)


def scale_factor(unit: Tensor, levels: Tensor, scale: ScaleRule) -> Tensor:
    """Return what the lengths of vectors are multiplied by to become their norms.

    Args:
        unit: Rotated unit vectors, float32 ``[..., dim]``.
        levels: Their levels, of the same shape.
        scale: The rule, see :class:`TurboQuantMSE`.

    Returns:
        float32 ``[...]``.
    """
    projection = (unit * levels).sum(-1).clamp_min_(_TINY)
    energy = levels.square().sum(-1).clamp_min_(_TINY)
    if scale == "least_squares":
        return projection / energy
    return energy.rsqrt() if scale == "norm_corrected" else projection.reciprocal()


def to_norms(lengths: Tensor) -> Tensor:
    """Round lengths to float16, clamped to its range; NaN stays NaN."""
    return lengths.clamp(max=_MAX_NORM).to(torch.float16)


def _check_vectors(x: Tensor, dim: int, device: torch.device) -> None:
    if not x.is_floating_point():
        raise TypeError(f"vectors must be floating-point, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != dim:
        raise ValueError(f"vectors must have shape [..., {dim}], got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"vectors must be on {device}, got {x.device}")


def _chunks(vectors: Tensor) -> list[slice]:
    num_vectors, dim = vectors.shape
    num_values = _CPU_CHUNK_VALUES if vectors.device.type == "cpu" else _GPU_CHUNK_VALUES
    size = max(1, num_values // dim)
    return [slice(start, start + size) for start in range(0, num_vectors, size)]
