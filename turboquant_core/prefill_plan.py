"""PrefillPlan: what successive chunks of a request ask of the store, as one group of layers sees it.

Made once a step from a request's cache and read by every layer. Knows no keys and values.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turboquant_core.config import BLOCK_SIZE
from turboquant_core.request_cache import Visibility
from turboquant_core.step_plan import Chunk, new_blocks, visible_blocks
from turboquant_core.timeline import Timeline
from turboquant_core.upload import upload


@dataclass(frozen=True)
class PlannedChunk:
    """One chunk of a plan.

    Attributes:
        rows: Which of the plan's tokens it has.
        exact_start: Position of the first token after the blocks that it sees; of those before it only the
            sinks are seen as they came.
        blocks: Which of the plan's blocks it sees.
    """

    rows: slice
    exact_start: int
    blocks: slice


@dataclass(frozen=True)
class PrefillPlan:
    """Chunks of one request that follow each other. Tensors are int64, on the device.

    Attributes:
        chunks: At least one.
        slot: Of the request.
        start: Position of the first token.
        exact_starts: ``[num_tokens]``, see `PlannedChunk`.
        first_visible: ``[num_tokens]``, first position that each token sees; None where all see everything.
        block_ids: ``[num_blocks]``, blocks that chunks see, and what lies between.
        blocks_start: Position of the first token of the first of them.
        num_sinks: Sinks before the chunks; where they start at 0, the first tokens of them are the sinks.
        held_places: ``[num_held]``, where in the slot these lie, and exact tokens right before the chunks.
        kept_rows: ``[num_kept]``, which tokens the slot keeps.
        kept_places: ``[num_kept]``, and where.
        new_block_ids: ``[num_new]``, blocks that are made of the chunks.
        new_starts: ``[num_new]``, where each one's first token lies: see `are_new_in_slot`.
        are_new_in_slot: Whether that is in the slot; else among the plan's tokens.
    """

    chunks: list[PlannedChunk]
    slot: int
    start: int
    exact_starts: Tensor
    first_visible: Tensor | None
    block_ids: Tensor
    blocks_start: int
    num_sinks: int
    held_places: Tensor
    kept_rows: Tensor
    kept_places: Tensor
    new_block_ids: Tensor
    new_starts: Tensor
    are_new_in_slot: bool

    @property
    def num_tokens(self) -> int:
        """Count the tokens of all chunks."""
        return len(self.exact_starts)


def plan_prefill(
    chunks: Sequence[Chunk], group: int, visibility: Visibility, timeline: Timeline, device: torch.device
) -> list[PrefillPlan]:
    """Return the plans of chunks in their order; those of a request that follow each other have one."""
    runs: list[list[Chunk]] = []
    for chunk in chunks:
        if runs and runs[-1][-1].cache is chunk.cache and runs[-1][-1].end == chunk.start:
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    parts = [_plan(run, group, visibility, timeline) for run in runs]
    lists = [column for _, columns in parts for column in columns.values()]
    # One copy for all tensors.
    numbers = upload(list(itertools.chain.from_iterable(lists)), torch.int64, device)
    tensors = iter(numbers.split([len(column) for column in lists]))
    plans = []
    for rest, columns in parts:
        on_device: dict[str, Any] = {name: next(tensors) for name in columns}
        if visibility == Visibility():
            on_device["first_visible"] = None
        plans.append(PrefillPlan(**rest, **on_device))
    return plans


def _plan(
    run: Sequence[Chunk], group: int, visibility: Visibility, timeline: Timeline
) -> tuple[dict[str, Any], dict[str, Sequence[int]]]:
    """Return the fields of a plan, and apart from the others those that become tensors."""
    start, end, cache = run[0].start, run[-1].end, run[0].cache
    exact_starts = [_exact_start(chunk, timeline) for chunk in run]
    ranges = [visible_blocks(chunk, group, visibility, timeline) for chunk in run]
    # Blocks between those that one chunk sees and those of the next are read, but not seen.
    blocks_start = ranges[0].start
    block_ids: list[int] = []
    chunks = []
    for chunk, exact_start, blocks in zip(run, exact_starts, ranges, strict=True):
        first = (blocks.start - blocks_start) // BLOCK_SIZE
        if blocks.ids:
            block_ids += blocks.ids[:1] * (first - len(block_ids))
            block_ids[first:] = blocks.ids
        rows = slice(chunk.start - start, chunk.end - start)
        chunks.append(PlannedChunk(rows, exact_start, slice(first, first + len(blocks.ids))))

    held = [*range(min(start, timeline.num_sinks)), *range(exact_starts[0], start)]
    # Of tokens that would overwrite each other in the ring only the last ones stay.
    kept = range(max(start, end - timeline.ring_size), end)
    kept_positions = [*range(start, min(kept.start, timeline.num_sinks)), *kept]
    whole = Chunk(cache, start, end, run[0].num_prompt_tokens)
    first_new, new_ids = new_blocks(whole, group, timeline)
    new_start = timeline.num_sinks + BLOCK_SIZE * first_new
    in_slot = new_start < start  # made of generated tokens: the oldest in the ring
    new_place = timeline.exact_index(new_start) if in_slot else new_start - start
    return {
        "chunks": chunks,
        "slot": cache.slot,
        "start": start,
        "blocks_start": blocks_start,
        "num_sinks": min(start or end, timeline.num_sinks),
        "are_new_in_slot": in_slot,
    }, {
        "exact_starts": [
            exact_start
            for chunk, exact_start in zip(run, exact_starts, strict=True)
            for _ in range(chunk.num_tokens)
        ],
        "first_visible": [visibility.first_visible(position) for position in range(start, end)],
        "block_ids": block_ids,
        "held_places": [timeline.exact_index(position) for position in held],
        "kept_rows": [position - start for position in kept_positions],
        "kept_places": [timeline.exact_index(position) for position in kept_positions],
        "new_block_ids": new_ids,
        "new_starts": [new_place + BLOCK_SIZE * index for index in range(len(new_ids))],
    }


def _exact_start(chunk: Chunk, timeline: Timeline) -> int:
    num_visible = timeline.num_visible_blocks(chunk.start, chunk.num_prompt_tokens)
    return min(chunk.start, timeline.num_sinks + BLOCK_SIZE * num_visible)
