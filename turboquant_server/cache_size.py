"""CacheSize: the slots and blocks that an amount of memory holds, and what fits into them.

Arithmetic only: knows neither a device nor a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turboquant_core import BLOCK_SIZE, StoreLayer, Timeline, Visibility
from turboquant_server.load_error import ModelLoadError

if TYPE_CHECKING:
    import torch

    from turboquant_server.attention_check import ModelAttention
    from turboquant_server.config import ServerConfig

TIMELINE = Timeline()
MAX_AUTO_SLOTS = 256
# Where the number of slots is ours to choose, they may take this part of the memory.
SLOT_SHARE = 0.25
BF16_BYTES = 2


@dataclass(frozen=True)
class CacheSize:
    """The parts of a cache and their bytes.

    Attributes:
        groups: What each group of layers sees.
        num_slots: Most requests that run at once.
        num_blocks: Blocks of 64 tokens, of each group.
        exact_bytes: What a request's first and newest tokens, which no block holds, take in a slot.
        state_bytes: What the states of recurrent layers take for a slot, and once more for rows of a step
            without a request.
        block_bytes: What a block takes in all layers of its group.
        bf16_block_bytes: The same for keys and values in bfloat16.
    """

    groups: tuple[Visibility, ...]
    num_slots: int
    num_blocks: tuple[int, ...]
    exact_bytes: int
    state_bytes: int
    block_bytes: tuple[int, ...]
    bf16_block_bytes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """What the whole cache takes."""
        return self._num_bytes(self.exact_bytes, self.block_bytes)

    @property
    def bits_per_value(self) -> float:
        """What a number of a key or value takes in a block, norms, means and padding included."""
        return 8 * BF16_BYTES * sum(self.block_bytes) / max(1, sum(self.bf16_block_bytes))

    @property
    def num_tokens(self) -> int:
        """Tokens that fit: into the blocks of the group that has most, and into the slots."""
        return BLOCK_SIZE * max(self.num_blocks, default=0) + TIMELINE.num_exact * self.num_slots

    @property
    def num_bf16_tokens(self) -> int:
        """Tokens that would fit into the same memory with all keys and values in bfloat16."""
        exact = TIMELINE.num_exact * sum(self.bf16_block_bytes) // BLOCK_SIZE
        bf16_bytes = self._num_bytes(exact, self.bf16_block_bytes)
        return self.num_tokens * self.num_bytes // max(1, bf16_bytes)

    def _num_bytes(self, exact_bytes: int, block_bytes: Sequence[int]) -> int:
        """Return what all slots and blocks take, were they of these sizes."""
        slots = self.num_slots * exact_bytes + (self.num_slots + 1) * self.state_bytes
        return slots + _total(self.num_blocks, block_bytes)

    def count_requests(self, num_tokens: int) -> int:
        """Return how many requests of a length run at once."""
        needs = [_blocks_of_request(visibility, num_tokens) for visibility in self.groups]
        counts = [held // need for held, need in zip(self.num_blocks, needs, strict=True) if need]
        return min([self.num_slots, *counts])


def divide_memory(
    num_bytes: int,
    attention: ModelAttention,
    layers: dict[int, StoreLayer],
    dtype: torch.dtype,
    max_model_len: int,
    config: ServerConfig,
) -> CacheSize:
    """Return the largest cache that memory holds, or as much as requests in all slots can use.

    Args:
        num_bytes: Of memory.
        attention: How the model attends.
        layers: What it stores.
        dtype: Of the tokens in slots.
        max_model_len: Most tokens of a request.
        config: Says how many requests run at a time and how many tokens a step reads.

    Raises:
        ModelLoadError: The memory does not hold even the slots.
    """
    groups = attention.groups
    numbers = sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in layers.values())
    exact_bytes = TIMELINE.num_exact * numbers * dtype.itemsize
    slot_bytes = exact_bytes + attention.state_bytes
    block_bytes, bf16_block_bytes = [0] * len(groups), [0] * len(groups)
    for layer in layers.values():
        dims = layer.key_dim + layer.value_dim
        block_bytes[layer.group] += layer.num_kv_heads * layer.codec.record_bytes
        bf16_block_bytes[layer.group] += layer.num_kv_heads * dims * BLOCK_SIZE * BF16_BYTES
    num_slots = config.max_num_seqs or _choose_slots(num_bytes, slot_bytes)
    all_slots_bytes = num_slots * slot_bytes + attention.state_bytes
    left = num_bytes - all_slots_bytes
    if left < 0:
        requests = f"{num_slots:,} requests at a time" if num_slots > 1 else "even one request"
        remedy = " or a smaller --max-num-seqs" if num_slots > 1 else ""
        raise ModelLoadError(
            f"{format_bytes(num_bytes)} are too few for a cache of {requests}, whose first and newest "
            f"tokens alone take {format_bytes(all_slots_bytes)}; give more memory{remedy}"
        )
    # First for one request that is as long as possible and read in steps as large as possible.
    first = [
        _blocks_of_request(visibility, max_model_len, config.max_num_batched_tokens) for visibility in groups
    ]
    num_blocks = _spread(left, block_bytes, first)
    left -= _total(num_blocks, block_bytes)
    others = [(num_slots - 1) * _blocks_of_request(visibility, max_model_len) for visibility in groups]
    more = _spread(left, block_bytes, others)
    return CacheSize(
        tuple(groups),
        num_slots,
        tuple(a + b for a, b in zip(num_blocks, more, strict=True)),
        exact_bytes,
        attention.state_bytes,
        tuple(block_bytes),
        tuple(bf16_block_bytes),
    )


def format_bytes(num_bytes: int) -> str:
    """Return a size as a person reads it."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes / 2**10:.2f} KiB"


def _choose_slots(num_bytes: int, slot_bytes: int) -> int:
    return max(1, min(MAX_AUTO_SLOTS, int(num_bytes * SLOT_SHARE) // max(1, slot_bytes)))


def _blocks_of_request(
    visibility: Visibility, num_tokens: int, step_size: int = TIMELINE.segment_size
) -> int:
    """Return how many blocks of a group a request holds at a time that is read in steps of a size."""
    num_blocks = TIMELINE.num_blocks(num_tokens, num_tokens)
    if visibility.reach is None:
        return num_blocks
    # What the first query of a step sees, which may begin inside a block, and what becomes of the step.
    return min(num_blocks, (visibility.reach - 1 + BLOCK_SIZE - 1 + step_size) // BLOCK_SIZE)


def _spread(num_bytes: int, block_bytes: Sequence[int], limits: Sequence[int]) -> list[int]:
    """Give all groups the same number of blocks, but none more than its limit."""
    num_blocks = [0] * len(limits)
    reached = 0
    for limit in sorted(set(limits)):
        growing = [index for index, most in enumerate(limits) if most >= limit]
        cost = sum(block_bytes[index] for index in growing)
        count = min(limit - reached, num_bytes // cost)
        for index in growing:
            num_blocks[index] += count
        num_bytes -= count * cost
        reached = limit
    return num_blocks


def _total(counts: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))
