"""BlockQuantizer: the codec of the compressed cache, 64 tokens of one kv head at a time.

A block is stored as the mean of its tokens and the quantized differences from that mean as it is stored, so
that what rounding the mean loses is quantized with the rest. This file knows nothing of layers or models.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from turboquant_core.codebook import check_dim, e4m3_codebook
from turboquant_core.config import BLOCK_SIZE, SUPPORTED_BITS
from turboquant_core.packing import packed_size
from turboquant_core.quantizer import ScaleRule, TurboQuantMSE, normalize, to_norms
from turboquant_core.rotation import rotation_matrix


class QuantizedBlocks(NamedTuple):
    """Hold what is stored of blocks with leading shape ``[...]``.

    Attributes:
        codes: uint8 ``[..., 64, packed_size(dim, bits)]``.
        norms: float16 ``[..., 64]``.
        means: bfloat16 ``[..., dim]``.
    """

    codes: Tensor
    norms: Tensor
    means: Tensor


class BlockQuantizer:
    """Quantize blocks of 64 keys or values of one kv head.

    Differences from the block's mean are rotated; 2, 3 and 4 bits use
    :func:`~turboquant_core.codebook.e4m3_codebook`, 8 bits are int8 (two's complement) with a step per
    token of the largest magnitude / 127, kept in place of the norm. Blocks may lie on any device.

    A coordinate whose mean is not finite is not centred (its stored mean is 0), so that a token which holds
    inf or NaN dequantizes to NaN and leaves the others finite.

    Args:
        dim: Head dimension, at least 16.
        bits: Width of a code: 2, 3, 4 or 8.
        scale: How norms are chosen, see :class:`TurboQuantMSE`; 8 bits ignore it.
        seed: Seed of the rotation.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, dim: int, bits: int, *, scale: ScaleRule, seed: int = 0) -> None:
        if bits not in SUPPORTED_BITS:
            raise ValueError(f"bits must be 2, 3, 4 or 8, got {bits}")
        check_dim(dim)
        self.dim = dim
        self.bits = bits
        self.scale = scale
        self.seed = seed
        self._codecs: dict[torch.device, _Codec] = {}
        self._codec(torch.device("cpu"))

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedBlocks:
        """Quantize whole blocks.

        Args:
            x: ``[..., 64, dim]``, any floating-point type, any strides.

        Raises:
            TypeError: If ``x`` is not floating-point.
            ValueError: If ``x`` has another shape.
        """
        if x.dim() < 2 or x.shape[-2:] != (BLOCK_SIZE, self.dim):
            raise ValueError(f"blocks must have shape [..., {BLOCK_SIZE}, {self.dim}], got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"blocks must be floating-point, got {x.dtype}")
        x = x if x.dtype == torch.float64 else x.float()
        means = x.mean(-2).to(torch.bfloat16)
        means = means.where(means.isfinite(), 0)
        codes, norms = self._codec(x.device).quantize(x - means.unsqueeze(-2))
        return QuantizedBlocks(codes, norms, means)

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
        x = self._codec(blocks.codes.device).dequantize(blocks.codes, blocks.norms)
        return x.add_(blocks.means.unsqueeze(-2)).to(dtype)

    def _codec(self, device: torch.device) -> _Codec:
        codec = self._codecs.get(device)
        if codec is None:
            if self.bits == 8:
                codec = _RotatedInt8(self.dim, self.seed, device)
            else:
                codebook = e4m3_codebook(self.dim, self.bits)
                codec = TurboQuantMSE(
                    self.dim, self.bits, device=device, seed=self.seed, scale=self.scale, codebook=codebook
                )
            self._codecs[device] = codec
        return codec


class _Codec(Protocol):
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def dequantize(self, codes: Tensor, norms: Tensor) -> Tensor: ...


class _RotatedInt8:
    """Round rotated vectors to multiples of a step per vector, a 127th of the largest magnitude."""

    def __init__(self, dim: int, seed: int, device: torch.device) -> None:
        self.rotation = rotation_matrix(dim, seed).to(device)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        unit, lengths = normalize(x)
        rotated = unit @ self.rotation.T
        peaks = rotated.abs().amax(-1)
        # A zero vector has a peak of 0, one that is not finite a peak of NaN: both get codes of 0.
        codes = rotated.mul_((127 / peaks).unsqueeze(-1)).round_().nan_to_num_(nan=0)
        return codes.to(torch.int8).view(torch.uint8), to_norms(lengths * peaks / 127)

    def dequantize(self, codes: Tensor, norms: Tensor) -> Tensor:
        x = codes.view(torch.int8).float() @ self.rotation
        return x.mul_(norms.unsqueeze(-1))
