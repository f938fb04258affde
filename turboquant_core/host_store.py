"""HostStore: host memory for blocks of a PagedStore, and the copies between the two.

A block lies there with all layers of a stack beside each other, so that few copies move many blocks. They are
made in stream order, like all that reads and writes the store: nobody waits for them, and no event is needed.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant_core.host_tier import Moves
from turboquant_core.paged_store import PagedStore, StoreLayer
from turboquant_core.upload import upload

# What copies take on the device: they are made in pieces of as many blocks as this holds, one at least.
PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _HostStack:
    """Blocks of layers that are alike, ``[num_blocks, num_layers, num_kv_heads, words]``.

    Attributes:
        group: Of the layers.
        device: A view of the store's.
        host: Contiguous.
    """

    group: int
    device: Tensor
    host: Tensor

    @property
    def num_words(self) -> int:
        """Words of a block."""
        return self.host[:1].numel()


class HostStore:
    """Hold blocks on the host.

    Where the store lies on a GPU, the memory is pinned for as long as this object lives.

    Args:
        store: Whose blocks move.
        num_blocks: Number of blocks of each layer group that there is room for.

    Raises:
        RuntimeError: The host does not have the memory, or CUDA cannot pin it.
    """

    def __init__(self, store: PagedStore, num_blocks: int) -> None:
        self._stacks: list[_HostStack] = []
        for group, records in store.stacked_records():
            # A record's size is a multiple of that of these words, which are copied faster than bytes.
            blocks = records.view(torch.int64).transpose(0, 1)
            host = torch.empty(num_blocks, *blocks.shape[1:], dtype=torch.int64)
            if store.device.type == "cuda":
                _pin(host, self, store.device)
            self._stacks.append(_HostStack(group, blocks, host))
        # So that no step finds no memory for it.
        num_words = self.device_bytes(store.layers) // 8
        self._piece = torch.empty(num_words, dtype=torch.int64, device=store.device)

    @staticmethod
    def device_bytes(layers: Mapping[int, StoreLayer]) -> int:
        """Return what copies take on the device of a store of these layers."""
        a_block = sum(layer.num_kv_heads * layer.codec.record_bytes for layer in layers.values())
        return max(PIECE_BYTES, a_block)

    def move(self, moves: Sequence[Moves]) -> None:
        """Copy blocks, in stream order and without waiting.

        Args:
            moves: Of each layer group.
        """
        for stack in self._stacks:
            of_group = moves[stack.group]
            for block_ids, runs, piece in self._pieces(stack, of_group.to_host):
                torch.index_select(stack.device, 0, block_ids, out=piece)
                for start, host_id, count in runs:
                    target = stack.host[host_id : host_id + count]
                    target.copy_(piece[start : start + count], non_blocking=True)
            for block_ids, runs, piece in self._pieces(stack, of_group.to_device):
                for start, host_id, count in runs:
                    source = stack.host[host_id : host_id + count]
                    piece[start : start + count].copy_(source, non_blocking=True)
                stack.device.index_copy_(0, block_ids, piece)

    def _pieces(
        self, stack: _HostStack, pairs: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[Tensor, list[tuple[int, int, int]], Tensor]]:
        """Cut copies into pieces, and these into runs of blocks that follow each other on the host.

        Args:
            stack: Whose blocks are copied.
            pairs: Of block ids on the device and on the host.

        Yields:
            Of a piece the block ids on the device; of each run its place in the piece, its first block on the
            host and its length; and room for the piece on the device.
        """
        pairs = sorted(pairs, key=lambda pair: pair[1])
        size = len(self._piece) // stack.num_words
        for first in range(0, len(pairs), size):
            part = pairs[first : first + size]
            runs: list[tuple[int, int, int]] = []
            for place, (_, host_id) in enumerate(part):
                if runs and host_id == runs[-1][1] + runs[-1][2]:
                    runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
                else:
                    runs.append((place, host_id, 1))
            block_ids = upload([block_id for block_id, _ in part], torch.int64, stack.device.device)
            piece = self._piece[: len(part) * stack.num_words].view(len(part), *stack.device.shape[1:])
            yield block_ids, runs, piece


def _pin(tensor: Tensor, owner: object, device: torch.device) -> None:
    """Pin the memory of a tensor until its owner is gone.

    Not as torch pins memory, which rounds gigabytes up to a power of two and keeps them afterwards.
    """
    cudart = torch.cuda.cudart()
    torch.cuda.check_error(cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))

    def unpin() -> None:
        torch.cuda.synchronize(device)
        cudart.cudaHostUnregister(tensor.data_ptr())

    weakref.finalize(owner, unpin).atexit = False
