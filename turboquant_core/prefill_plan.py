"""PrefillPlan: what one step's chunks of new tokens ask of the store, as one group of layers sees it.

Made once a step from the requests' caches and read by every layer. Knows no keys and values. What is on the
device has all requests' numbers one after another, so that each thing is done for all of them at once.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from turboquant_core.config import BLOCK_SIZE
from turboquant_core.request_cache import Visibility
from turboquant_core.step_plan import Chunk, new_blocks, visible_blocks
from turboquant_core.timeline import Timeline
from turboquant_core.upload import upload

# Tokens of a request that a kernel attends for together, at most.
TILE_SIZE = 64


@dataclass(frozen=True)
class PlannedChunk:
    """One chunk of a run.

    Attributes:
        rows: Which of the run's tokens it has.
        exact_start: Position of the first token after the blocks that it sees; of those before it only the
            sinks are seen as they came.
        blocks: Which of the run's blocks it sees.
    """

    rows: slice
    exact_start: int
    blocks: slice


@dataclass(frozen=True)
class PrefillRun:
    """Chunks of one request that follow each other.

    Attributes:
        chunks: At least one.
        rows: Which of the step's tokens it has.
        slot: Of the request.
        start: Position of the first token.
        first_visible: ``[num_tokens]``, first position that each token sees; None where all see everything.
        block_ids: ``[num_blocks]``, blocks that chunks see, and what lies between.
        blocks_start: Position of the first token of the first of them.
        num_sinks: Sinks before the chunks, or where these start at 0, among them.
        held_places: ``[num_held]``, where in the slot these lie, and exact tokens right before the chunks.
            What the slot keeps of the chunks takes the place of none.
    """

    chunks: list[PlannedChunk]
    rows: slice
    slot: int
    start: int
    first_visible: Tensor | None
    block_ids: Tensor
    blocks_start: int
    num_sinks: int
    held_places: Tensor

    @property
    def num_tokens(self) -> int:
        """Count the tokens of all chunks."""
        num_tokens: int = self.rows.stop - self.rows.start
        return num_tokens


@dataclass(frozen=True)
class PrefillPlan:
    """All runs of a step. Tensors are int64, on the device.

    Attributes:
        table: ``[num_runs, 10]``, of each run: its first row and number of tokens among the step's, the
            position of the first of these, its slot, its first and its number of `held_places`, how many of
            those are sinks, its first and its number of `block_ids`, the position of the first of these.
        tiles: ``[num_tiles, 2]``, a run and which of its tokens is the first of up to `TILE_SIZE`; those that
            see most first.
        exact_starts: ``[num_tokens]``, see `PlannedChunk`.
        first_visible: ``[num_tokens]``, see `PrefillRun`.
        held_places: See `PrefillRun`.
        block_ids: Likewise.
        kept_rows: ``[num_kept]``, tokens that slots keep; -1 for what becomes zero.
        kept_slots: ``[num_kept]``, in which slot.
        kept_places: ``[num_kept]``, and where.
        new_block_ids: ``[num_new]``, blocks that are made of the step's tokens.
        new_rows: ``[num_new]``, the first token of each.
        ring_block_ids: ``[num_of_ring]``, blocks that are made of what slots have once they have kept those.
        ring_slots: ``[num_of_ring]``, in which slot.
        ring_places: ``[num_of_ring]``, and the first token's place.
        num_seen_by_all: Tokens of the first of `block_ids`, all of which each of the step's tokens sees; 0 if
            there are several runs.
        shared: What a layer makes and those after it use again, by what it is made for.
    """

    table: Tensor
    tiles: Tensor
    exact_starts: Tensor
    first_visible: Tensor | None
    held_places: Tensor
    block_ids: Tensor
    kept_rows: Tensor
    kept_slots: Tensor
    kept_places: Tensor
    new_block_ids: Tensor
    new_rows: Tensor
    ring_block_ids: Tensor
    ring_slots: Tensor
    ring_places: Tensor
    num_seen_by_all: int
    _drafts: Sequence[_Draft]
    shared: dict[Hashable, Any] = field(default_factory=dict)

    @cached_property
    def new_slots(self) -> Tensor:
        """Where the tokens of `new_rows` lie, as if they were a single slot: zeros, which all layers read."""
        return torch.zeros_like(self.new_rows)

    @cached_property
    def runs(self) -> list[PrefillRun]:
        """The runs, each with its part of the tensors."""
        runs, visible = [], self.first_visible
        for draft in self._drafts:
            runs.append(
                PrefillRun(
                    draft.chunks,
                    draft.rows,
                    draft.slot,
                    draft.start,
                    None if visible is None else visible[draft.rows],
                    self.block_ids[draft.blocks],
                    draft.blocks_start,
                    draft.num_sinks,
                    self.held_places[draft.held],
                )
            )
        return runs


@dataclass(frozen=True)
class _Draft:
    """A run before there are tensors; where its numbers lie among those of all."""

    chunks: list[PlannedChunk]
    rows: slice
    slot: int
    start: int
    blocks: slice
    blocks_start: int
    num_sinks: int
    held: slice


def plan_prefill(
    chunks: Sequence[Chunk], group: int, visibility: Visibility, timeline: Timeline, device: torch.device
) -> PrefillPlan:
    """Return the plan of chunks, whose tokens come in this order; those that follow each other are a run."""
    runs: list[list[Chunk]] = []
    for chunk in chunks:
        if runs and runs[-1][-1].cache is chunk.cache and runs[-1][-1].end == chunk.start:
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    columns = _Columns(group, visibility, timeline)
    for run in runs:
        columns.add(run)
    return columns.plan(device)


class _Columns:
    """The numbers of a plan while runs are added."""

    def __init__(self, group: int, visibility: Visibility, timeline: Timeline) -> None:
        self._group = group
        self._visibility = visibility
        self._timeline = timeline
        self._drafts: list[_Draft] = []
        self._num_tokens = 0
        self._exact_starts: list[int] = []
        self._first_visible: list[int] = []
        self._held_places: list[int] = []
        self._block_ids: list[int] = []
        self._kept: dict[tuple[int, int], int] = {}  # what of each place, as all are written at once
        self._new: list[tuple[int, int]] = []
        self._ring: list[tuple[int, int, int]] = []

    def add(self, run: Sequence[Chunk]) -> None:
        timeline = self._timeline
        start, end, cache = run[0].start, run[-1].end, run[0].cache
        exact_starts = [_exact_start(chunk, timeline) for chunk in run]
        ranges = [visible_blocks(chunk, self._group, self._visibility, timeline) for chunk in run]
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
            self._exact_starts += [exact_start] * chunk.num_tokens
        if self._visibility != Visibility():
            self._first_visible += map(self._visibility.first_visible, range(start, end))
        num_sinks = min(start or end, timeline.num_sinks)
        held = [*range(num_sinks), *range(exact_starts[0], start)]
        first_row = self._num_tokens
        self._num_tokens += end - start
        self._drafts.append(
            _Draft(
                chunks,
                slice(first_row, self._num_tokens),
                cache.slot,
                start,
                slice(len(self._block_ids), len(self._block_ids) + len(block_ids)),
                blocks_start,
                num_sinks,
                slice(len(self._held_places), len(self._held_places) + len(held)),
            )
        )
        self._held_places += map(timeline.exact_index, held)
        self._block_ids += block_ids
        self._keep(first_row - start, cache.slot, start, end)
        self._make(first_row - start, Chunk(cache, start, end, run[0].num_prompt_tokens))

    def _keep(self, offset: int, slot: int, start: int, end: int) -> None:
        """Add which tokens the slot keeps; a token's row is its position and an offset."""
        timeline = self._timeline
        # Of tokens that would overwrite each other in the ring only the last ones stay.
        kept = range(max(start, end - timeline.ring_size), end)
        positions = [*range(start, min(kept.start, timeline.num_sinks)), *kept]
        if start == 0:  # what another request has left is multiplied by zero, and may be NaN
            self._kept |= {(slot, place): -1 for place in range(end, timeline.num_exact)}
        self._kept |= {(slot, timeline.exact_index(position)): offset + position for position in positions}

    def _make(self, offset: int, whole: Chunk) -> None:
        """Add which blocks are made."""
        timeline = self._timeline
        first, block_ids = new_blocks(whole, self._group, timeline)
        position = timeline.num_sinks + BLOCK_SIZE * first
        if position >= whole.start:
            rows = itertools.count(offset + position, BLOCK_SIZE)
            self._new += zip(block_ids, rows, strict=False)
        else:  # of generated tokens: the oldest in the ring
            places = itertools.count(timeline.exact_index(position), BLOCK_SIZE)
            self._ring += ((block_id, whole.cache.slot, next(places)) for block_id in block_ids)

    def plan(self, device: torch.device) -> PrefillPlan:
        table, tiles = [], []
        for index, draft in enumerate(self._drafts):
            num_tokens = draft.rows.stop - draft.rows.start
            table += [draft.rows.start, num_tokens, draft.start, draft.slot]
            table += [draft.held.start, draft.held.stop - draft.held.start, draft.num_sinks]
            table += [draft.blocks.start, draft.blocks.stop - draft.blocks.start, draft.blocks_start]
            tiles += [(draft.start + first, index, first) for first in range(0, num_tokens, TILE_SIZE)]
        tiles.sort(reverse=True)
        kept_rows = [(row, slot, place) for (slot, place), row in self._kept.items()]
        kept, new, ring = ([*zip(*rows, strict=True)] for rows in (kept_rows, self._new, self._ring))
        columns: dict[str, Sequence[int]] = {
            "table": table,
            "tiles": [number for tile in tiles for number in tile[1:]],
            "exact_starts": self._exact_starts,
            "first_visible": self._first_visible,
            "held_places": self._held_places,
            "block_ids": self._block_ids,
            **dict(zip(("kept_rows", "kept_slots", "kept_places"), kept, strict=True)),
            **dict(zip(("new_block_ids", "new_rows"), new or [(), ()], strict=True)),
            **dict(zip(("ring_block_ids", "ring_slots", "ring_places"), ring or [(), (), ()], strict=True)),
        }
        # One copy for all tensors.
        numbers = upload([*itertools.chain.from_iterable(columns.values())], torch.int64, device)
        tensors: dict[str, Any] = dict(
            zip(columns, numbers.split([*map(len, columns.values())]), strict=True)
        )
        tensors["table"] = tensors["table"].view(len(self._drafts), -1)
        tensors["tiles"] = tensors["tiles"].view(-1, 2)
        num_seen_by_all = 0
        if self._visibility == Visibility():
            tensors["first_visible"] = None
            if len(self._drafts) == 1:
                first = self._drafts[0].chunks[0].blocks
                num_seen_by_all = BLOCK_SIZE * (first.stop - first.start)
        return PrefillPlan(**tensors, num_seen_by_all=num_seen_by_all, _drafts=self._drafts)


def _exact_start(chunk: Chunk, timeline: Timeline) -> int:
    num_visible = timeline.num_visible_blocks(chunk.start, chunk.num_prompt_tokens)
    return min(chunk.start, timeline.num_sinks + BLOCK_SIZE * num_visible)
