"""LayerStack: tokens and blocks of layers that are alike, and how blocks are made in all of them at once."""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from turboquant_core.config import BLOCK_SIZE
from turboquant_core.reference import Codec


class LayerStack(NamedTuple):
    """Layers with the same sizes, and codecs that differ in nothing but transforms.

    Attributes:
        indices: Of the layers.
        records: uint8 ``[num_layers, num_blocks, num_kv_heads, record_bytes]``.
        keys: ``[num_layers, num_rows, num_kv_heads, num_places, key_dim]``; a row is a slot, or new tokens.
        values: Likewise.
    """

    indices: list[int]
    records: Tensor
    keys: Tensor
    values: Tensor


def make_blocks(
    stack: LayerStack,
    codecs: Sequence[Codec],
    rows: Tensor,
    starts: Tensor,
    block_ids: Tensor,
    *,
    uses_kernels: bool,
) -> None:
    """Make blocks of 64 tokens each, of the same tokens in all layers.

    Args:
        stack: Where tokens are, and where records go.
        codecs: Of the layers.
        rows: Integers ``[num_blocks]``, where the tokens of each lie.
        starts: ``[num_blocks]``, the place of its first token there; the others follow.
        block_ids: ``[num_blocks]``, which these become.
        uses_kernels: Make them in one launch.
    """
    if uses_kernels:
        from turboquant_core.kernels.triton_encode import encode_blocks  # Triton is there where a GPU is

        encode_blocks(stack.keys, stack.values, rows, starts, stack.records, block_ids, codecs)
        return
    places = starts[:, None] + torch.arange(BLOCK_SIZE, device=starts.device)
    for codec, records, *layer in zip(codecs, stack.records, stack.keys, stack.values, strict=True):
        # Indices on both sides of the heads put the indexed dimensions first: [blocks, 64, heads, dim].
        tokens = [states[rows[:, None], :, places].permute(2, 0, 1, 3) for states in layer]
        # Copies whole records, in a fraction of the time that indexing takes.
        records.index_copy_(0, block_ids, codec.encode(*tokens).transpose(0, 1))
