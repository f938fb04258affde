"""DecodeGraphs: the forward of one token per request as CUDA graphs, one for each of some batch sizes.

A graph is a step's thousand launches as one. It reads its inputs where it was captured with them, so a step
copies its own there first; rows that a batch leaves free hold no request. Knows no sampling.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from turboquant_core import (
    Chunk,
    DecodeAttention,
    DecodePlan,
    DecodeTables,
    PagedStore,
    due_blocks,
    forward_context,
    make_decode_tables,
)

# Takes input_ids and position_ids, [num_rows, 1], and returns logits, [num_rows, vocab_size].
Forward = Callable[[Tensor, Tensor], Tensor]


class DecodeGraphs:
    """Run decode steps as graphs.

    Args:
        forward: Runs the model.
        store: Holds the keys and values.
        max_batch: Most requests of a step.
        max_model_len: Most tokens of a request.

    Raises:
        RuntimeError: The forward cannot be captured.
    """

    def __init__(self, forward: Forward, store: PagedStore, max_batch: int, max_model_len: int) -> None:
        self._forward = forward
        self._store = store
        self._sizes = batch_sizes(max_batch)
        # All graphs read the first rows of these.
        self._input_ids, self._position_ids = torch.zeros(
            2, max_batch, 1, dtype=torch.int64, device=store.device
        )
        max_blocks = store.timeline.num_blocks(max_model_len, max_model_len)
        self._tables = [
            _own_memory(self._make_tables([], group, max_batch), max_blocks)
            for group in range(len(store.visibilities))
        ]
        # One pool, and one stream, for each of which libraries keep memory.
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(store.device)
        self._logits: Tensor | None = None
        # The largest first: the others fit into its memory.
        self._graphs = {size: self._capture(size, pool, stream) for size in self._sizes[::-1]}

    def run(self, token_ids: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
        """Compute a step.

        Args:
            token_ids: The newest token of each request.
            chunks: Of that token.

        Returns:
            Logits ``[batch, vocab_size]``, which the next step overwrites.
        """
        size = next(size for size in self._sizes if size >= len(chunks))
        rest = [0] * (size - len(chunks))
        inputs = torch.tensor([[*token_ids, *rest], [*(chunk.start for chunk in chunks), *rest]])
        input_ids, position_ids = inputs.pin_memory().to(self._store.device, non_blocking=True)
        self._input_ids[:size].copy_(input_ids[:, None])
        self._position_ids[:size].copy_(position_ids[:, None])
        for group, held in enumerate(self._tables):
            for name, new in _tensors(self._make_tables(chunks, group, size)):
                old: Tensor = getattr(held, name)[: len(new)]
                (old[:, : new.shape[1]] if new.dim() == 2 else old).copy_(new)
        self._graphs[size].replay()
        for group in range(len(self._tables)):
            due = due_blocks(chunks, group, self._store.timeline)
            if due:
                self._store.make_due_blocks(group, due)
        assert self._logits is not None
        return self._logits[: len(chunks)]

    def _make_tables(self, chunks: Sequence[Chunk], group: int, num_rows: int) -> DecodeTables:
        store = self._store
        return make_decode_tables(
            chunks, group, store.visibilities[group], store.timeline, store.device, num_rows=num_rows
        )

    def _capture(self, num_rows: int, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        plans = [DecodePlan.of_tables(_first_rows(tables, num_rows)) for tables in self._tables]

        def forward() -> Tensor:
            with forward_context(DecodeAttention(self._store, plans)):
                return self._forward(self._input_ids[:num_rows], self._position_ids[:num_rows])

        # Kernels are compiled, and libraries take their memory, before anything is captured.
        current = torch.cuda.current_stream(self._store.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                forward()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            logits = forward()
            if self._logits is None:
                self._logits = logits
            else:
                self._logits[:num_rows].copy_(logits)
        return graph


def batch_sizes(max_batch: int) -> list[int]:
    """Return the sizes that graphs are made for: powers of two and what is halfway, up to the largest."""
    sizes = {size for power in range(16) for size in (2**power, 3 * 2**power // 2)}
    return [*sorted(size for size in sizes if size < max_batch), max_batch]


def _tensors(tables: DecodeTables) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in vars(tables).items() if isinstance(value, Tensor)]


def _own_memory(tables: DecodeTables, max_blocks: int) -> DecodeTables:
    """Return tables in memory that stays where it is, of so many blocks of each request."""
    copies: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(tables)}
    block_tables = tables.slots.new_zeros(len(tables.slots), max_blocks)
    return dataclasses.replace(tables, **copies | {"block_tables": block_tables})


def _first_rows(tables: DecodeTables, num_rows: int) -> DecodeTables:
    first: dict[str, Any] = {name: tensor[:num_rows] for name, tensor in _tensors(tables)}
    return dataclasses.replace(tables, **first | {"item_starts": tables.item_starts[: num_rows + 1]})
