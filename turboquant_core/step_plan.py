"""What one step of the engine asks of the store: positions and block tables as lists and tensors.

Made once a step from the requests' caches and read by every layer. Knows no keys and values.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant_core.config import BLOCK_SIZE
from turboquant_core.request_cache import RequestCache, Visibility
from turboquant_core.timeline import Timeline


@dataclass(frozen=True)
class Chunk:
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


# How long a tile of exact tokens takes, and half a block: measured on an H200 at 4 bits.
TILE_WORK, HALF_WORK = 3, 2


def decode_work(num_blocks: int, timeline: Timeline) -> int:
    """Return the work on a new token's attention in one kv head: on tiles of 16 places of its slot, and blocks."""
    return TILE_WORK * -(-timeline.num_exact // 16) + 2 * HALF_WORK * num_blocks


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
        work_starts: ``[batch + 1]``, `decode_work` of a kv head of all requests before each.
        has_free_rows: Whether there may be rows without a request.
    """

    slots: Tensor
    positions: Tensor
    exact_starts: Tensor
    first_visible: Tensor
    block_tables: Tensor
    block_starts: Tensor
    num_blocks: Tensor
    work_starts: Tensor
    has_free_rows: bool


@dataclass(frozen=True)
class DecodePlan:
    """One new token for each of several requests, as one group of layers sees it.

    Attributes:
        slots: int64 ``[batch]``.
        slot_rows: The same as an index; a slice, which copies nothing, where they follow each other.
        exact_indices: int64 ``[batch]``, where in its slot each new token goes.
        exact_mask: bool ``[batch, num_exact]``, which tokens of the slot the new one sees, itself included.
        block_ids: int64 ``[num_blocks]``, the blocks that requests see, one request after another.
        owners: int64 ``[num_blocks]``, row in the batch of each block's request.
        block_mask: bool ``[num_blocks, 64]``, which of their tokens are seen; None stands for all.
        new_block_ids: int64 ``[num_new]``, blocks that become due with these tokens.
        new_slots: int64 ``[num_new]``, slot of the request of each.
        new_starts: int64 ``[num_new]``, where in the slot the block's first token lies.
        tables: The same for kernels; on a GPU only.
    """

    slots: Tensor
    slot_rows: Tensor | slice
    exact_indices: Tensor
    exact_mask: Tensor
    block_ids: Tensor
    owners: Tensor
    block_mask: Tensor | None
    new_block_ids: Tensor
    new_slots: Tensor
    new_starts: Tensor
    tables: DecodeTables | None

    @classmethod
    def of_tables(cls, tables: DecodeTables) -> DecodePlan:
        """Return a plan for kernels only, in which no block becomes due."""
        empty = tables.slots.new_empty(0)
        return cls(empty, empty, empty, empty, empty, empty, None, empty, empty, empty, tables)


def plan_decode(
    chunks: Sequence[Chunk], group: int, visibility: Visibility, timeline: Timeline, device: torch.device
) -> DecodePlan:
    """Return the plan for chunks of one token each."""
    positions = torch.tensor([chunk.start for chunk in chunks]).unsqueeze(1)
    first_visible = torch.tensor([visibility.first_visible(chunk.start) for chunk in chunks]).unsqueeze(1)
    ranges = [visible_blocks(chunk, group, visibility, timeline) for chunk in chunks]
    num_visible = [timeline.num_visible_blocks(chunk.start, chunk.num_prompt_tokens) for chunk in chunks]
    exact_start = timeline.num_sinks + BLOCK_SIZE * torch.tensor(num_visible).unsqueeze(1)
    held = _exact_positions(positions, timeline)
    is_sink = torch.arange(timeline.num_exact) < timeline.num_sinks
    exact_mask = (held <= positions) & (held >= first_visible) & (is_sink | (held >= exact_start))

    block_mask = None
    if visibility != Visibility():
        starts = [blocks.start + BLOCK_SIZE * index for blocks in ranges for index in range(len(blocks.ids))]
        first = [
            limit
            for limit, blocks in zip(first_visible[:, 0].tolist(), ranges, strict=True)
            for _ in blocks.ids
        ]
        tokens = torch.tensor(starts, dtype=torch.int64).unsqueeze(1) + torch.arange(BLOCK_SIZE)
        block_mask = (tokens >= torch.tensor(first, dtype=torch.int64).unsqueeze(1)).to(device)
    due = due_blocks(chunks, group, timeline)

    def integers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    slots = [chunk.cache.slot for chunk in chunks]
    follow_each_other = slots == list(range(slots[0], slots[0] + len(slots)))
    return DecodePlan(
        slots=integers(slots),
        slot_rows=slice(slots[0], slots[-1] + 1) if follow_each_other else integers(slots),
        exact_indices=integers([timeline.exact_index(chunk.start) for chunk in chunks]),
        exact_mask=exact_mask.to(device),
        block_ids=integers(list(itertools.chain.from_iterable(blocks.ids for blocks in ranges))),
        owners=integers([row for row, blocks in enumerate(ranges) for _ in blocks.ids]),
        block_mask=block_mask,
        new_block_ids=integers([block_id for _, block_id, _ in due]),
        new_slots=integers([slot for slot, _, _ in due]),
        new_starts=integers([start for _, _, start in due]),
        tables=make_decode_tables(chunks, group, visibility, timeline, device)
        if device.type == "cuda"
        else None,
    )


def due_blocks(chunks: Sequence[Chunk], group: int, timeline: Timeline) -> list[tuple[int, int, int]]:
    """Return (slot, block id, place in the slot of its first token) of blocks that chunks make due."""
    return [
        (chunk.cache.slot, block_id, timeline.exact_index(timeline.num_sinks + BLOCK_SIZE * (first + offset)))
        for chunk in chunks
        for first, ids in [new_blocks(chunk, group, timeline)]
        for offset, block_id in enumerate(ids)
    ]


def make_decode_tables(
    chunks: Sequence[Chunk],
    group: int,
    visibility: Visibility,
    timeline: Timeline,
    device: torch.device,
    *,
    num_rows: int | None = None,
) -> DecodeTables:
    """Return the tables of chunks of one token each: what `step_plan.plan_decode` shows, in one copy.

    With `num_rows`, rows without a request follow.
    """
    num_added = (num_rows or len(chunks)) - len(chunks)
    ranges = [visible_blocks(chunk, group, visibility, timeline) for chunk in chunks]
    max_blocks = max((len(blocks.ids) for blocks in ranges), default=0)
    starts = [0, *itertools.accumulate(decode_work(len(blocks.ids), timeline) for blocks in ranges)]
    columns = [
        [chunk.cache.slot for chunk in chunks] + [-1] * num_added,
        [chunk.start for chunk in chunks] + [0] * num_added,
        [
            timeline.num_sinks
            + BLOCK_SIZE * timeline.num_visible_blocks(chunk.start, chunk.num_prompt_tokens)
            for chunk in chunks
        ]
        + [0] * num_added,
        [visibility.first_visible(chunk.start) for chunk in chunks] + [0] * num_added,
        [blocks.start for blocks in ranges] + [0] * num_added,
        [len(blocks.ids) for blocks in ranges] + [0] * num_added,
        starts + starts[-1:] * num_added,
        [block_id for blocks in ranges for block_id in blocks.ids + [0] * (max_blocks - len(blocks.ids))],
    ]
    numbers = torch.tensor([number for column in columns for number in column], dtype=torch.int32)
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    sizes = [len(column) for column in columns]
    slots, positions, exact_starts, first_visible, block_starts, num_blocks, work_starts, ids = torch.split(
        numbers.to(device, non_blocking=True), sizes
    )
    return DecodeTables(
        slots=slots,
        positions=positions,
        exact_starts=exact_starts,
        first_visible=first_visible,
        block_tables=ids.view(len(chunks), max_blocks),
        block_starts=block_starts,
        num_blocks=num_blocks,
        work_starts=work_starts,
        has_free_rows=num_rows is not None,
    )


def _exact_positions(positions: Tensor, timeline: Timeline) -> Tensor:
    """Return the position of the token in each place of a slot once `positions` are written, newest first.

    Places that nothing was written to yet get positions above the newest, or of sinks and below.
    """
    places = torch.arange(timeline.num_exact)
    in_ring = places - timeline.num_sinks
    newest = positions - timeline.num_sinks
    ring = timeline.num_sinks + newest - (newest - in_ring) % timeline.ring_size
    return torch.where(in_ring < 0, places, ring)
