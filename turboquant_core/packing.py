"""The one definition of bit order: how codes of 1 to 8 bits lie in bytes.

A code is split into bit planes whose widths are powers of two, so that no code straddles a byte: 3 = 2 + 1,
5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1. The first, widest plane holds the highest bits of every code; the
planes follow each other. In a plane of width ``w``, code ``j`` lies in byte ``j // (8 / w)`` and starts at
bit ``w * (j % (8 / w))``, counted from the least significant one. Every plane is padded with zero bits to a
whole byte.

This file knows nothing of what a code means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_core.table import take_rows


def planes(bits: int) -> tuple[int, ...]:
    """Return the widths of the bit planes of a code, highest bits first: ``planes(7) == (4, 2, 1)``."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be from 1 to 8, got {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_size(dim: int, bits: int) -> int:
    """Return the number of bytes that ``dim`` codes of ``bits`` bits take."""
    return sum(_plane_size(dim, width) for width in planes(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8 ``[..., dim]``, every value below ``2 ** bits``.
        bits: Width of a code, 1 to 8.

    Returns:
        uint8 ``[..., packed_size(dim, bits)]``.
    """
    dim = codes.shape[-1]
    parts = []
    shift = bits
    for width in planes(bits):
        shift -= width
        per_byte = 8 // width
        plane = (codes >> shift) & ((1 << width) - 1)
        if dim % per_byte:
            plane = torch.nn.functional.pad(plane, (0, -dim % per_byte))
        packed = plane[..., 0::per_byte].clone()
        for position in range(1, per_byte):
            packed |= plane[..., position::per_byte] << (width * position)
        parts.append(packed)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def unpack(packed: Tensor, dim: int, bits: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8 ``[..., packed_size(dim, bits)]``.
        dim: Number of codes per vector.
        bits: Width of a code, 1 to 8.

    Returns:
        uint8 ``[..., dim]``.

    Raises:
        ValueError: If the last dimension of ``packed`` is not ``packed_size(dim, bits)``.
    """
    codes = packed.new_zeros((*packed.shape[:-1], dim))
    shift = bits
    for width, plane in _split(packed, dim, bits):
        shift -= width
        offsets = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        values = (plane.unsqueeze(-1) >> offsets) & ((1 << width) - 1)
        codes |= values.flatten(-2)[..., :dim] << shift
    return codes


def lookup_table(levels: Tensor, bits: int) -> Tensor:
    """Tabulate what :func:`lookup` reads in one go: all codes of one byte of the widest plane.

    The index joins one byte of the widest plane (low bits) with the bits of the narrower planes that belong
    to the same codes, so it has ``bits * 8 / planes(bits)[0]`` bits.

    Args:
        levels: float32 ``[2 ** bits]``, the value of every code.
        bits: Width of a code, 1 to 8.

    Returns:
        float32 ``[2 ** index_bits, codes_per_byte]``.
    """
    widths = planes(bits)
    per_byte = 8 // widths[0]
    index = torch.arange(1 << (bits * per_byte), device=levels.device)
    codes = torch.zeros(index.shape[0], per_byte, dtype=torch.long, device=levels.device)
    position = torch.arange(per_byte, device=levels.device)
    start = 0
    for width in widths:
        field = (index.unsqueeze(-1) >> (start + width * position)) & ((1 << width) - 1)
        codes = (codes << width) | field
        start += width * per_byte
    return levels[codes]


def lookup(packed: Tensor, table: Tensor, dim: int, bits: int) -> Tensor:
    """Return the value of every code, ``levels[unpack(packed, dim, bits)]``, by one gather per byte.

    Args:
        packed: uint8 ``[..., packed_size(dim, bits)]``.
        table: ``lookup_table(levels, bits)``.
        dim: Number of codes per vector.
        bits: Width of a code, 1 to 8.

    Returns:
        float32 ``[..., dim]``.

    Raises:
        ValueError: If the last dimension of ``packed`` is not ``packed_size(dim, bits)``.
    """
    (widest, plane), *narrower = _split(packed, dim, bits)
    per_byte = 8 // widest
    index = plane.long()
    start = 8
    for width, plane in narrower:
        # Every byte of a narrower plane serves several indices, `used` bits each.
        used = width * per_byte
        offsets = torch.arange(0, 8, used, dtype=torch.uint8, device=packed.device)
        fields = (plane.unsqueeze(-1) >> offsets) & ((1 << used) - 1)
        index |= fields.flatten(-2)[..., : index.shape[-1]].long() << start
        start += used
    return take_rows(table, index).flatten(-2)[..., :dim]


def _plane_size(dim: int, width: int) -> int:
    return -(-dim * width // 8)


def _split(packed: Tensor, dim: int, bits: int) -> list[tuple[int, Tensor]]:
    """Return ``(width, bytes)`` of every plane, widest first, or raise ValueError."""
    size = packed_size(dim, bits)
    if packed.shape[-1] != size:
        raise ValueError(f"packed codes must have {size} bytes per vector, got {packed.shape[-1]}")
    parts = []
    start = 0
    for width in planes(bits):
        end = start + _plane_size(dim, width)
        parts.append((width, packed[..., start:end]))
        start = end
    return parts
