"""Looking numbers up in a table, on as many cores as torch has."""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import math

import torch
from torch import Tensor

_NUM_ROWS = 16
_ROW_DTYPES = {1: torch.float32, 2: torch.float64, 4: torch.complex128}


def take(table: Tensor, index: Tensor) -> Tensor:
    """Return ``table[index]``.

    Of torch's ways to do so, gather is the fastest that runs on several cores, and it does so only if there
    are several rows.

    Args:
        table: One-dimensional.
        index: int64, any shape.
    """
    num_rows = math.gcd(index.numel(), _NUM_ROWS)
    return table.expand(num_rows, -1).gather(1, index.reshape(num_rows, -1)).view(index.shape)


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Return ``table[index]`` of a float32 table ``[num_rows, width]``: ``[..., width]``.

    A row that is seen as one number is copied several times faster.
    """
    width = table.shape[1]
    if width not in _ROW_DTYPES:
        return table[index]
    return (
        take(table.view(_ROW_DTYPES[width]).squeeze(1), index).view(torch.float32).view(*index.shape, width)
    )
