"""DecodeGraphs: the forward of one token per request as CUDA graphs, one for each of some batch sizes.

A graph is a step's thousand launches as one. It reads its inputs where it was captured with them; rows that a
batch leaves free hold no request. Knows no sampling, and of requests no more than how many there are.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from turboquant_core import DecodeAttention, DecodeBuffers, PagedStore, forward_context

# Takes input_ids and position_ids, [num_rows, 1], and returns logits, [num_rows, vocab_size].
Forward = Callable[[Tensor, Tensor], Tensor]


class DecodeGraphs:
    """Run decode steps as graphs.

    Args:
        forward: Runs the model.
        store: Holds the keys and values.
        buffers: What steps read; they stay where they are from now on.
        max_batch: Most requests of a step.
        max_model_len: Most tokens of a request.

    Raises:
        RuntimeError: The forward cannot be captured.
    """

    def __init__(
        self,
        forward: Forward,
        store: PagedStore,
        buffers: DecodeBuffers,
        max_batch: int,
        max_model_len: int,
    ) -> None:
        self._forward = forward
        self._store = store
        self._buffers = buffers
        self._sizes = batch_sizes(max_batch)
        buffers.reserve(max_batch, store.timeline.num_blocks(max_model_len, max_model_len))
        # All graphs read the first rows.
        self._input_ids = torch.zeros(max_batch, 1, dtype=torch.int64, device=store.device)
        # One pool, and one stream, for each of which libraries keep memory.
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(store.device)
        self._logits: Tensor | None = None
        # The largest first: the others fit into its memory.
        self._graphs = {size: self._capture(size, pool, stream) for size in self._sizes[::-1]}

    def num_rows(self, num_requests: int) -> int:
        """Return the rows of the graph for so many requests."""
        return next(size for size in self._sizes if size >= num_requests)

    def run(self, input_ids: Tensor) -> Tensor:
        """Compute the step that the buffers have been filled for.

        Args:
            input_ids: ``[num_rows]``.

        Returns:
            Logits ``[num_rows, vocab_size]``, which the next step overwrites.
        """
        size = len(input_ids)
        self._input_ids[:size, 0].copy_(input_ids)
        self._graphs[size].replay()
        assert self._logits is not None
        return self._logits[:size]

    def _capture(self, num_rows: int, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        # Without requests, whatever the buffers' rows are for another size.
        self._buffers.fill([], num_rows)
        plans = self._buffers.plans(num_rows, has_free_rows=True)
        position_ids = self._buffers.positions(num_rows)

        def forward() -> Tensor:
            with forward_context(DecodeAttention(self._store, plans)):
                return self._forward(self._input_ids[:num_rows], position_ids.long()[:, None])

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
