"""DecodeBuffers: what decode steps read on the device, one step after another in the same memory.

So a CUDA graph finds there what the next step has. Small numbers of all requests and groups go to the device
in one copy. Block tables go there when they have changed, and a request's row is made when it has: a request
that sees everything gets a block every 64 tokens. Knows no keys and values.

On the host it computes with NumPy: torch's operations let other threads have the interpreter's lock.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from turboquant_core.config import BLOCK_SIZE
from turboquant_core.request_cache import RequestCache, Visibility
from turboquant_core.step_plan import Chunk, DecodePlan, DecodeTables, visible_blocks
from turboquant_core.timeline import Timeline

Integers: TypeAlias = npt.NDArray[np.int64]

# Rows of numbers: slots, positions and exact_starts, then first_visible, block_starts, num_blocks and two of
# counts_before of each group, then those of the caller. See `DecodeTables`.
_NUM_COMMON = 3
_NUM_OF_GROUP = 5


class DecodeBuffers:
    """Keep the tables of the newest decode step.

    Args:
        visibilities: What queries of each group of layers see.
        timeline: When tokens become blocks.
        num_slots: Most requests that run at once.
        device: Where the tables lie.
        num_extra: Rows of numbers of the caller's that are copied along.
    """

    def __init__(
        self,
        visibilities: Sequence[Visibility],
        timeline: Timeline,
        num_slots: int,
        device: torch.device,
        *,
        num_extra: int = 0,
    ) -> None:
        self._timeline = timeline
        self._device = device
        self._caches: list[RequestCache | None] = [None] * num_slots
        self._groups = [
            _BlockTables(group, visibility, timeline, num_slots, device)
            for group, visibility in enumerate(visibilities)
        ]
        self._first_extra = _NUM_COMMON + _NUM_OF_GROUP * len(visibilities)
        self._num_columns = self._first_extra + num_extra
        self._numbers = torch.empty(0, dtype=torch.int32, device=device)

    def reserve(self, num_rows: int, num_blocks: int) -> None:
        """Have room for so many requests that see so many blocks each; no more than these moves anything."""
        num_numbers = self._num_columns * (num_rows + 1)
        if num_numbers > len(self._numbers):
            self._numbers = self._numbers.new_zeros(num_numbers)
        for group in self._groups:
            group.reserve(num_rows, num_blocks)

    def fill(
        self, chunks: Sequence[Chunk], num_rows: int | None = None, extra: Sequence[Sequence[int]] = ()
    ) -> None:
        """Put a step's numbers and tables there, in stream order and without waiting.

        Args:
            chunks: Of one generated token each.
            num_rows: More than the chunks, if rows without a request are to follow.
            extra: Rows of the caller's numbers, one for each chunk.
        """
        num_chunks, num_rows = len(chunks), num_rows or len(chunks)
        slots = _integers([chunk.cache.slot for chunk in chunks])
        are_new = np.array([self._caches[chunk.cache.slot] is not chunk.cache for chunk in chunks], bool)
        num_visible = _integers(
            [self._timeline.num_visible_blocks(chunk.start, chunk.num_prompt_tokens) for chunk in chunks]
        )
        self.reserve(num_rows, 0)
        # From pinned memory, which is not used for anything else before the copy has been made.
        uploaded = torch.zeros(
            self._num_columns, num_rows + 1, dtype=torch.int32, pin_memory=self._device.type == "cuda"
        )
        columns = uploaded.numpy()
        columns[0, num_chunks:] = -1
        rows = columns[:, :num_chunks]
        rows[0], rows[1] = slots, [chunk.start for chunk in chunks]
        rows[2] = self._timeline.num_sinks + BLOCK_SIZE * num_visible
        requests_before = np.minimum(np.arange(num_rows + 1), num_chunks)
        for index, group in enumerate(self._groups):
            first = _NUM_COMMON + _NUM_OF_GROUP * index
            first_visible, block_starts, num_blocks = group.fill(chunks, slots, are_new, num_visible)
            rows[first], rows[first + 1], rows[first + 2] = first_visible, block_starts, num_blocks
            columns[first + 3] = requests_before
            columns[first + 4, 1 : num_chunks + 1] = num_blocks.cumsum()
            columns[first + 4, num_chunks + 1 :] = num_blocks.sum()
        for index, numbers in enumerate(extra, start=self._first_extra):
            rows[index] = numbers
        self._columns(num_rows).copy_(uploaded, non_blocking=True)
        for chunk in chunks:
            self._caches[chunk.cache.slot] = chunk.cache

    def plans(self, num_rows: int, *, has_free_rows: bool = False) -> list[DecodePlan]:
        """Return the plan of a step of so many rows for each group; they change with what is there.

        Args:
            num_rows: Of the step.
            has_free_rows: For steps with as many rows or fewer requests, of any length that was reserved.
        """
        columns = self._columns(num_rows)
        slots, positions, exact_starts = columns[:_NUM_COMMON, :num_rows]
        plans = []
        for index, group in enumerate(self._groups):
            of_group = columns[_NUM_COMMON + _NUM_OF_GROUP * index :][:_NUM_OF_GROUP]
            first_visible, block_starts, num_blocks = of_group[:3, :num_rows]
            tables = DecodeTables(
                slots=slots,
                positions=positions,
                exact_starts=exact_starts,
                first_visible=first_visible,
                block_tables=group.tables(num_rows, is_whole=has_free_rows),
                block_starts=block_starts,
                num_blocks=num_blocks,
                counts_before=of_group[3:],
                has_free_rows=has_free_rows,
            )
            plans.append(DecodePlan(tables, self._timeline))
        return plans

    def slots(self, num_rows: int) -> Tensor:
        """Return the slots of the newest step's requests, int32 ``[num_rows]``."""
        return self._columns(num_rows)[0, :num_rows]

    def positions(self, num_rows: int) -> Tensor:
        """Return the positions of its tokens, likewise."""
        return self._columns(num_rows)[1, :num_rows]

    def extra(self, num_rows: int) -> Tensor:
        """Return the caller's numbers, int32 ``[num_extra, num_rows]``, 0 where there is no request."""
        return self._columns(num_rows)[self._first_extra :, :num_rows]

    def _columns(self, num_rows: int) -> Tensor:
        return self._numbers[: self._num_columns * (num_rows + 1)].view(self._num_columns, num_rows + 1)


class _BlockTables:
    """The block tables of one group of layers: on the host by slot, on the device by row of the step."""

    def __init__(
        self,
        group: int,
        visibility: Visibility,
        timeline: Timeline,
        num_slots: int,
        device: torch.device,
    ) -> None:
        self._group = group
        self._visibility = visibility
        self._timeline = timeline
        self._by_slot = np.zeros((num_slots, 0), dtype=np.int32)
        # Which blocks of its request each row has: from this one, up to that one.
        self._bounds = np.zeros((num_slots, 2), dtype=np.int64)
        self._by_row = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self._width = 0
        self._slots = np.zeros(0, dtype=np.int64)  # of the rows on the device

    def reserve(self, num_rows: int, num_blocks: int) -> None:
        """Have room for so many rows of so many blocks."""
        old_rows, old_blocks = self._by_row.shape
        if num_rows > old_rows or num_blocks > old_blocks:
            shape = max(num_rows, old_rows), max(num_blocks, old_blocks)
            self._by_row = self._by_row.new_zeros(shape)
            self._slots = self._slots[:0]
        num_more = num_blocks - self._by_slot.shape[1]
        if num_more > 0:
            self._by_slot = np.pad(self._by_slot, ((0, 0), (0, num_more)))

    def fill(
        self,
        chunks: Sequence[Chunk],
        slots: Integers,
        are_new: npt.NDArray[np.bool_],
        num_visible: Integers,
    ) -> tuple[Integers, Integers, Integers]:
        """Bring the tables up to date; return first_visible, block_starts and num_blocks of each chunk."""
        num_sinks = self._timeline.num_sinks
        first_visible = np.zeros_like(num_visible)
        if self._visibility != Visibility():
            first_visible = _integers([self._visibility.first_visible(chunk.start) for chunk in chunks])
        first = np.minimum(np.maximum(first_visible - num_sinks, 0) // BLOCK_SIZE, num_visible)
        bounds = np.stack([first, num_visible], axis=1)
        changed = np.flatnonzero((self._bounds[slots] != bounds).any(axis=1) | are_new).tolist()
        num_blocks = num_visible - first
        self._width = int(num_blocks.max(initial=0))
        if self._width > self._by_row.shape[1]:
            self.reserve(0, max(self._width, 2 * self._by_row.shape[1]))
        for row in changed:
            ids = visible_blocks(chunks[row], self._group, self._visibility, self._timeline).ids
            self._by_slot[slots[row], : len(ids)] = ids
        if changed or not np.array_equal(slots, self._slots):
            self._copy(slots)
            self._bounds[slots], self._slots = bounds, slots
        return first_visible, num_sinks + BLOCK_SIZE * first, num_blocks

    def _copy(self, slots: Integers) -> None:
        """Copy the rows of slots to the device."""
        is_cuda = self._by_row.device.type == "cuda"
        rows = torch.empty(len(slots), self._width, dtype=torch.int32, pin_memory=is_cuda)
        np.take(self._by_slot[:, : self._width], slots, axis=0, out=rows.numpy(), mode="clip")
        self._by_row[: len(slots), : self._width].copy_(rows, non_blocking=True)

    def tables(self, num_rows: int, *, is_whole: bool) -> Tensor:
        """Return ``[num_rows, num_blocks]``: as many as the newest step sees, or as there is room for."""
        return self._by_row[:num_rows] if is_whole else self._by_row[:num_rows, : self._width]


def _integers(numbers: Sequence[int]) -> Integers:
    return np.array(numbers, dtype=np.int64)
