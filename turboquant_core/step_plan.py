"""What one step of the engine asks of the store: positions and block tables as lists and tensors.

Made once a step from the requests' caches and read by every layer. Knows no keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from turboquant_core.config import BLOCK_SIZE
from turboquant_core.request_cache import RequestCache, Visibility
from turboquant_core.timeline import Timeline


class Chunk(NamedTuple):
    """Tokens of one request that are computed together: queries that see the same blocks.

    Attributes:
        cache: The request's.
        start: Position of the first token.
        end: Position after the last token: ``timeline.chunk_end(start, num_prompt_tokens)``, or less if the
            tokens are generated.
        num_prompt_tokens: Of the request.
    """

    cache: RequestCache
    start: int
    end: int
    num_prompt_tokens: int

    @property
    def num_tokens(self) -> int:
        """Count the tokens."""
        return self.end - self.start


@dataclass(frozen=True)
class BlockRange:
    """Blocks that a chunk reads.

    Attributes:
        ids: Block ids, in order of their tokens.
        start: Position of their first token.
    """

    ids: list[int]
    start: int


def visible_blocks(chunk: Chunk, group: int, visibility: Visibility, timeline: Timeline) -> BlockRange:
    """Return the blocks of a group that at least one query of a chunk sees."""
    num_blocks = timeline.num_visible_blocks(chunk.start, chunk.num_prompt_tokens)
    first = max(0, visibility.first_visible(chunk.start) - timeline.num_sinks) // BLOCK_SIZE
    ids = [_existing(block_id) for block_id in chunk.cache.block_tables[group][first:num_blocks]]
    return BlockRange(ids, timeline.num_sinks + min(first, num_blocks) * BLOCK_SIZE)


def new_blocks(chunk: Chunk, group: int, timeline: Timeline) -> tuple[int, list[int]]:
    """Return the index of the first block that is made once a chunk is computed, and the ids of all."""
    first = timeline.num_blocks(chunk.start, chunk.num_prompt_tokens)
    last = timeline.num_blocks(chunk.end, chunk.num_prompt_tokens)
    return first, [_existing(block_id) for block_id in chunk.cache.block_tables[group][first:last]]


def _existing(block_id: int | None) -> int:
    assert block_id is not None, "a step needs a block that its request does not hold"
    return block_id


@dataclass(frozen=True)
class DecodeTables:
    """One new token for each of several requests, as one group of layers sees it; int32, on the device.

    Attributes:
        slots: ``[batch]``, slot of each request in the exact tokens; -1 for a row without a request.
        positions: ``[batch]``, position of the new token.
        exact_starts: ``[batch]``, position of the first token after the visible blocks; of those before it
            only the sinks are seen as they came.
        first_visible: ``[batch]``, first position that the new token sees, 0 without a window.
        block_tables: ``[batch, max_blocks]``, ids of the blocks it sees, from the first with a visible token.
        block_starts: ``[batch]``, position of the first token of the first of them.
        num_blocks: ``[batch]``, how many; the rest of the row is undefined.
        counts_before: ``[2, batch + 1]``, how many requests are before each row, and blocks that they see.
        has_free_rows: Whether there may be rows without a request.
    """

    slots: Tensor
    positions: Tensor
    exact_starts: Tensor
    first_visible: Tensor
    block_tables: Tensor
    block_starts: Tensor
    num_blocks: Tensor
    counts_before: Tensor
    has_free_rows: bool


@dataclass(frozen=True)
class DecodePlan:
    """One new token for each of several requests, as one group of layers sees it.

    Kernels read the tables. What the reference reads is made of them when it is asked for, without free rows.

    Attributes:
        tables: What each request sees.
        timeline: Where tokens lie in a slot.
    """

    tables: DecodeTables
    timeline: Timeline

    @cached_property
    def slots(self) -> Tensor:
        """Slot of each request, int64 ``[batch]``."""
        return self.tables.slots.long()

    @cached_property
    def slot_rows(self) -> Tensor | slice:
        """The same as an index; a slice, which copies nothing, where they follow each other."""
        slots = self.slots.tolist()
        follow_each_other = slots == list(range(slots[0], slots[0] + len(slots)))
        return slice(slots[0], slots[-1] + 1) if follow_each_other else self.slots

    @cached_property
    def exact_indices(self) -> Tensor:
        """Where in its slot each new token goes, int64 ``[batch]``."""
        positions = self.tables.positions
        places = [self.timeline.exact_index(position) for position in positions.tolist()]
        return torch.tensor(places, dtype=torch.int64, device=positions.device)

    @cached_property
    def exact_mask(self) -> Tensor:
        """Which tokens of the slot the new one sees, itself included, bool ``[batch, num_exact]``."""
        positions, first_visible, exact_starts = (
            numbers.unsqueeze(1)
            for numbers in (self.tables.positions, self.tables.first_visible, self.tables.exact_starts)
        )
        held = _exact_positions(positions, self.timeline)
        is_sink = torch.arange(self.timeline.num_exact, device=held.device) < self.timeline.num_sinks
        return (held <= positions) & (held >= first_visible) & (is_sink | (held >= exact_starts))

    @cached_property
    def block_ids(self) -> Tensor:
        """The blocks that requests see, one request after another, int64 ``[num_blocks]``."""
        return self.tables.block_tables[self._are_blocks].long()

    @cached_property
    def owners(self) -> Tensor:
        """Row in the batch of each block's request, int64 ``[num_blocks]``."""
        return self._are_blocks.nonzero()[:, 0]

    @cached_property
    def block_mask(self) -> Tensor | None:
        """Which of their tokens are seen, bool ``[num_blocks, 64]``; None stands for all."""
        tables = self.tables
        if not tables.first_visible.any():
            return None
        numbers = torch.arange(tables.block_tables.shape[1], device=tables.slots.device)
        starts = (tables.block_starts.unsqueeze(1) + BLOCK_SIZE * numbers)[self._are_blocks]
        tokens = starts.unsqueeze(1) + torch.arange(BLOCK_SIZE, device=starts.device)
        return tokens >= tables.first_visible[self.owners].unsqueeze(1)

    @cached_property
    def _are_blocks(self) -> Tensor:
        """Which entries of the block tables are blocks that are seen."""
        block_tables = self.tables.block_tables
        numbers = torch.arange(block_tables.shape[1], device=block_tables.device)
        return numbers < self.tables.num_blocks.unsqueeze(1)


def due_blocks(chunks: Sequence[Chunk], group: int, timeline: Timeline) -> list[tuple[int, int, int]]:
    """Return (slot, block id, place in the slot of its first token) of blocks that generated tokens make due.

    Args:
        chunks: Of one token each.
        group: Of layers.
        timeline: Of the requests.
    """
    exact = timeline.num_sinks + timeline.residual_length
    return [
        (chunk.cache.slot, block_id, timeline.exact_index(timeline.num_sinks + BLOCK_SIZE * (first + offset)))
        for chunk in chunks
        if (chunk.end - exact) % BLOCK_SIZE == 0  # as of few
        for first, ids in [new_blocks(chunk, group, timeline)]
        for offset, block_id in enumerate(ids)
    ]


def _exact_positions(positions: Tensor, timeline: Timeline) -> Tensor:
    """Return the position of the token in each place of a slot once `positions` are written, newest first.

    Places that nothing was written to yet get positions above the newest, or of sinks and below.
    """
    places = torch.arange(timeline.num_exact, device=positions.device)
    in_ring = places - timeline.num_sinks
    newest = positions - timeline.num_sinks
    ring = timeline.num_sinks + newest - (newest - in_ring) % timeline.ring_size
    return torch.where(in_ring < 0, places, ring)
