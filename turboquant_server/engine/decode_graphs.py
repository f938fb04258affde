"""DecodeGraphs: the forward of one token per request as CUDA graphs, one for each of some batch sizes.

A graph is a step's thousand launches as one. It reads its inputs where it was captured with them, so a step
copies its own there first; rows that a batch leaves free hold no request. Knows no sampling.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

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

logger = logging.getLogger(__name__)

# Takes input_ids and position_ids, [num_rows, 1], and returns logits, [num_rows, vocab_size].
Forward = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class _Graph:
    """A captured forward and the memory that it reads and writes.

    Attributes:
        graph: Replays the forward.
        input_ids: int64 ``[num_rows, 1]``.
        position_ids: Likewise.
        tables: For each group of layers.
        logits: ``[num_rows, vocab_size]``.
    """

    graph: torch.cuda.CUDAGraph
    input_ids: Tensor
    position_ids: Tensor
    tables: list[DecodeTables]
    logits: Tensor


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
        self._max_blocks = store.timeline.num_blocks(max_model_len, max_model_len)
        self._pool = torch.cuda.graph_pool_handle()
        # The largest first: the others fit into its memory.
        self._sizes = batch_sizes(max_batch)
        self._graphs = {size: self._capture(size) for size in self._sizes[::-1]}

    def run(self, token_ids: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
        """Compute a step.

        Args:
            token_ids: The newest token of each request.
            chunks: Of that token.

        Returns:
            Logits ``[batch, vocab_size]``, which the next step overwrites.
        """
        size = next(size for size in self._sizes if size >= len(chunks))
        graph = self._graphs[size]
        rest = [0] * (size - len(chunks))
        inputs = torch.tensor([[*token_ids, *rest], [*(chunk.start for chunk in chunks), *rest]])
        input_ids, position_ids = inputs.pin_memory().to(self._store.device, non_blocking=True)
        graph.input_ids.copy_(input_ids[:, None])
        graph.position_ids.copy_(position_ids[:, None])
        for group, held in enumerate(graph.tables):
            _copy(self._tables(chunks, group, size), held)
        graph.graph.replay()
        for group in range(len(graph.tables)):
            due = due_blocks(chunks, group, self._store.timeline)
            if due:
                self._store.make_due_blocks(group, due)
        return graph.logits[: len(chunks)]

    def _tables(self, chunks: Sequence[Chunk], group: int, num_rows: int) -> DecodeTables:
        store = self._store
        return make_decode_tables(
            chunks, group, store.visibilities[group], store.timeline, store.device, num_rows=num_rows
        )

    def _capture(self, num_rows: int) -> _Graph:
        device = self._store.device
        input_ids, position_ids = torch.zeros(2, num_rows, 1, dtype=torch.int64, device=device)
        tables = []
        for group in range(len(self._store.visibilities)):
            empty = self._tables([], group, num_rows)
            blocks = torch.zeros(num_rows, self._max_blocks, dtype=torch.int32, device=device)
            copies = {field.name: getattr(empty, field.name).clone() for field in dataclasses.fields(empty)}
            tables.append(DecodeTables(**copies | {"block_tables": blocks}))
        plans = [DecodePlan.of_tables(each) for each in tables]
        graph = torch.cuda.CUDAGraph()

        def forward() -> Tensor:
            with forward_context(DecodeAttention(self._store, plans)):
                return self._forward(input_ids, position_ids)

        # Kernels are compiled, and libraries take their memory, before anything is captured.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                forward()
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            logits = forward()
        return _Graph(graph, input_ids, position_ids, tables, logits)


def batch_sizes(max_batch: int) -> list[int]:
    """Return the sizes that graphs are made for: powers of two and what is halfway, up to the largest."""
    sizes = {size for power in range(16) for size in (2**power, 3 * 2**power // 2)}
    return [*sorted(size for size in sizes if size < max_batch), max_batch]


def _copy(tables: DecodeTables, held: DecodeTables) -> None:
    for field in dataclasses.fields(tables):
        new, old = getattr(tables, field.name), getattr(held, field.name)
        if field.name == "block_tables":
            old = old[: len(new), : new.shape[1]]
        old.copy_(new)
