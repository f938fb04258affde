"""The Triton kernels make and read blocks as `ExactCodec` does, on a GPU if there is one, or interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

from turboquant_core.exact_codec import ExactCodec
from turboquant_core.kernels.triton_encode import encode_blocks
from turboquant_core.kernels.triton_read import read_blocks

LAYERS, ROWS, HEADS, PLACES, RECORDS = 2, 3, 2, 200, 5
# Of each block: its row, where in it its tokens start, and its record in the store.
BLOCKS = ((2, 69, 1), (0, 136, 4), (2, 5, 0))


def slots_of_any_strides(dim: int, dtype: torch.dtype) -> Tensor:
    """Return ``[layers, rows, heads, places, dim]`` with NaN where no token of a block is, and in between."""
    wide = torch.full((LAYERS, ROWS, PLACES, HEADS + 1, 2 * dim + 3), torch.nan, dtype=dtype)
    slots = wide[..., 1:, 1:-2:2].transpose(2, 3)
    for row, start, _ in BLOCKS:
        slots[:, row, :, start : start + 64] = torch.randn(LAYERS, HEADS, 64, dim).to(dtype)
    return wide.to(DEVICE)[..., 1:, 1:-2:2].transpose(2, 3)


def integers(numbers: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [
        ((128, 128), torch.bfloat16),
        ((64, 64), torch.float16),
        ((80, 16), torch.float32),
        ((24, 72), torch.bfloat16),
        ((256, 96), torch.float16),
    ],
)
def test_blocks_are_those_of_the_codec_and_read_back(dims: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    codec = ExactCodec(*dims, dtype)
    tokens = [slots_of_any_strides(dim, dtype) for dim in dims]
    records = torch.full((LAYERS, RECORDS, HEADS, codec.record_bytes), 255, dtype=torch.uint8, device=DEVICE)
    rows, starts, ids = ([*each, -1] for each in zip(*BLOCKS, strict=True))  # the last one is not to be made
    encode_blocks(
        *tokens, integers(rows), integers(starts, torch.int32), records, integers(ids), [codec] * LAYERS
    )
    for row, start, block_id in BLOCKS:
        blocks = [states[:, row, :, start : start + 64] for states in tokens]
        assert torch.equal(records[:, block_id], codec.encode(*blocks))
    assert (records[:, [2, 3]] == 255).all()

    keys, values = (torch.full((HEADS, 192, dim), torch.nan, dtype=dtype, device=DEVICE) for dim in dims)
    read_blocks(records[1], integers(ids[:3], torch.int32), codec, keys, values)
    for place, (row, start, _) in enumerate(BLOCKS):
        for read, states in zip((keys, values), tokens, strict=True):
            assert torch.equal(read[:, 64 * place :][:, :64], states[1, row, :, start : start + 64])
