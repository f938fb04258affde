"""BlockQuantizer: the codec of the compressed cache, 64 tokens of one kv head at a time.

    y = A x                     transform.py: a rotation, or one balanced by second moments
    m = mean of the block's y   stored in int8 with a step
    y - m                       quantized: codes, and a norm per token

What rounding the mean loses is quantized with the rest. This file knows nothing of layers or models.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from turboquant_core.codebook import check_dim, e4m3_codebook
from turboquant_core.config import BLOCK_SIZE, SUPPORTED_BITS
from turboquant_core.level_coder import LevelCoder, level_coder
from turboquant_core.packing import pack, packed_size
from turboquant_core.quantizer import ScaleRule, normalize, scale_factor, to_norms
from turboquant_core.transform import Transform, rotation

# Measured (README.md): keys are compared with each other, so their lengths count; values are averaged, so it
# counts that nothing shrinks.
KEY_SCALE: ScaleRule = "norm_corrected"
VALUE_SCALE: ScaleRule = "unbiased"

# Codes are chosen for these lengths of a vector too, and those are kept that point best in its direction: at
# 4 / 3 / 2 bits and dim 128 this takes 12 / 5 / 1% off the squared error; more lengths would take 2% more.
TRIAL_LENGTHS = (0.84, 0.92, 1.08, 1.16)
_INT8_MAX = 127


class EncodedBlocks(NamedTuple):
    """Hold what is kept of blocks with leading shape ``[...]``, one code a byte.

    Attributes:
        codes: uint8 ``[..., 64, dim]``; 8 bits are the bytes of int8 numbers.
        norms: float16 ``[..., 64]``.
        means: int8 ``[..., dim]``, of the transformed vectors.
        mean_steps: float16 ``[...]``; a mean is its int8 numbers times its step.
    """

    codes: Tensor
    norms: Tensor
    means: Tensor
    mean_steps: Tensor


class QuantizedBlocks(NamedTuple):
    """Hold what is stored of blocks with leading shape ``[...]``: as :class:`EncodedBlocks`, codes packed.

    Attributes:
        codes: uint8 ``[..., 64, packed_size(dim, bits)]``.
        norms: float16 ``[..., 64]``.
        means: int8 ``[..., dim]``.
        mean_steps: float16 ``[...]``.
    """

    codes: Tensor
    norms: Tensor
    means: Tensor
    mean_steps: Tensor


class BlockQuantizer:
    """Quantize blocks of 64 keys or values.

    2, 3 and 4 bits use :func:`~turboquant_core.codebook.e4m3_codebook`; 8 bits are int8 (two's complement)
    with a step per token of the largest magnitude / 127, kept in place of the norm. Blocks may lie on any
    device.

    A token that holds inf or NaN, or that the transform takes there, dequantizes to NaN throughout and
    leaves the others as they would be without it.

    Args:
        dim: Head dimension, at least 16.
        bits: Width of a code: 2, 3, 4 or 8.
        scale: How norms are chosen, see :class:`TurboQuantMSE`; 8 bits ignore it.
        transform: What vectors are multiplied by first; the rotation of seed 0 by default.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, bits: int, *, scale: ScaleRule, transform: Transform | None = None) -> None:
        if bits not in SUPPORTED_BITS:
            raise ValueError(f"bits must be 2, 3, 4 or 8, got {bits}")
        check_dim(dim)
        self.dim = dim
        self.bits = bits
        self.scale = scale
        self.transform = transform or rotation(dim, 0)
        if self.transform.dim != dim:
            raise ValueError(f"the transform is for dim {self.transform.dim}, not {dim}")

    def quantize(self, x: Tensor) -> QuantizedBlocks:
        """Quantize whole blocks; arguments and errors are those of `encode`."""
        codes, *rest = self.encode(x)
        return QuantizedBlocks(pack(codes, self.bits), *rest)

    @torch.no_grad()
    def encode(self, x: Tensor) -> EncodedBlocks:
        """Quantize whole blocks and leave it to the caller how codes lie in bytes.

        Args:
            x: ``[..., num_heads, num_blocks, 64, dim]``, any floating-point type, any strides; with a
                transform that all heads share, any leading shape.

        Raises:
            TypeError: If ``x`` is not floating-point.
            ValueError: If ``x`` has another shape.
        """
        if x.dim() < 2 or x.shape[-2:] != (BLOCK_SIZE, self.dim):
            raise ValueError(f"blocks must have shape [..., {BLOCK_SIZE}, {self.dim}], got {list(x.shape)}")
        num_heads = self.transform.num_heads
        if num_heads > 1 and (x.dim() < 4 or x.shape[-4] != num_heads):
            raise ValueError(f"blocks must have {num_heads} heads in their fourth last dimension")
        if not x.is_floating_point():
            raise TypeError(f"blocks must be floating-point, got {x.dtype}")
        y = self._per_head(self.transform.apply, x.float())
        means, mean_steps = _quantized_means(y)
        codes, norms = self._quantize_centred(y.sub_(_to_means(means, mean_steps).unsqueeze(-2)))
        return EncodedBlocks(codes, norms, means, mean_steps)

    @torch.no_grad()
    def dequantize(self, blocks: QuantizedBlocks, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the keys or values of blocks, ``[..., 64, dim]``; computed in float32.

        Raises:
            ValueError: If the shapes do not belong to this quantizer.
        """
        shape = (BLOCK_SIZE, packed_size(self.dim, self.bits))
        if blocks.codes.shape[-2:] != shape:
            raise ValueError(
                f"codes must have shape [..., {shape[0]}, {shape[1]}], got {list(blocks.codes.shape)}"
            )
        if self.bits == 8:
            y = blocks.codes.view(torch.int8).float()
        else:
            y = self._coder(blocks.codes.device).unpack(blocks.codes, self.dim)
        y.mul_(blocks.norms.unsqueeze(-1)).add_(_to_means(blocks.means, blocks.mean_steps).unsqueeze(-2))
        return self._per_head(self.transform.undo, y).to(dtype)

    def _per_head(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a function of ``[..., num_heads, num_vectors, dim]`` to blocks."""
        return function(x.flatten(-3, -2)).view(x.shape) if x.dim() > 2 else function(x)

    def _coder(self, device: torch.device) -> LevelCoder:
        return level_coder(e4m3_codebook(self.dim, self.bits), self.bits, device)

    def _quantize_centred(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and norms of transformed vectors ``[..., dim]``."""
        unit, lengths = normalize(y)
        if self.bits == 8:
            peaks = unit.abs().amax(-1)
            # A zero vector has a peak of 0, one that is not finite a peak of NaN: both get codes of 0.
            codes = unit.mul_((_INT8_MAX / peaks).unsqueeze(-1)).round_().nan_to_num_(nan=0)
            return codes.to(torch.int8).view(torch.uint8), to_norms(lengths * peaks / _INT8_MAX)
        coder = self._coder(y.device)
        chosen = torch.ones_like(lengths)
        best = _cosine(unit, coder.near_levels(unit))
        for length in TRIAL_LENGTHS:
            cosine = _cosine(unit, coder.near_levels(unit * length))
            chosen = torch.where(cosine > best, length, chosen)
            best = torch.maximum(cosine, best)
        codes = coder.nearest(unit * chosen.unsqueeze(-1))
        return codes, to_norms(lengths * scale_factor(unit, coder.levels(codes), self.scale))


def _cosine(unit: Tensor, levels: Tensor) -> Tensor:
    return (unit * levels).sum(-1) * levels.square().sum(-1).rsqrt()


def _quantized_means(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 means over the second last dimension, of the vectors that are finite, and their steps."""
    is_finite = y.abs().amax(-1, keepdim=True).isfinite()
    means = y.where(is_finite, 0).sum(-2) / is_finite.sum(-2).clamp_min(1)
    steps = to_norms(means.abs().amax(-1) / _INT8_MAX)
    codes = (means / steps.float().where(steps > 0, 1).unsqueeze(-1)).round_()
    return codes.clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8), steps


def _to_means(codes: Tensor, steps: Tensor) -> Tensor:
    return codes.float() * steps.float().unsqueeze(-1)
