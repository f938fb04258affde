"""DecodeGraphs: the forward of one token per request as CUDA graphs, one for each of some batch sizes.

A graph is a step's thousand launches as one. It reads its inputs where it was captured with them; rows that a
batch leaves free hold no request. What a model does on the host a graph does not do again, so each is tried
out: for two tokens of a request it has to compute what the model does. Knows no sampling, and of requests no
more than how many there are.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from turboquant_core import (
    CacheManager,
    Chunk,
    DecodeAttention,
    DecodeBuffers,
    PagedStore,
    StatePool,
    forward_context,
)
from turboquant_server.engine.ranks import Ranks

# Takes tokens, positions and slots, [num_rows], and returns logits, [num_rows, vocab_size].
Forward: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
Step: TypeAlias = Callable[[], Tensor]

# Of each tensor's norm. The same kernels compute it, so that only the order of sums could differ.
MAX_ERROR = 0.05

logger = logging.getLogger(__name__)


class DecodeGraphs:
    """Run decode steps as graphs, once they have been captured and compared.

    Making it runs the forward for each size, so that kernels are compiled and libraries and states take their
    memory before anything is captured. Ranks wait for each other there; while they capture, none computes.

    Args:
        forward: Runs the model.
        store: Holds the keys and values. No request has any yet.
        states: Holds what recurrent layers remember, if the model has any.
        buffers: What steps read; they stay where they are from now on.
        max_batch: Most requests of a step.
        max_model_len: Most tokens of a request.
    """

    def __init__(
        self,
        forward: Forward,
        store: PagedStore,
        states: StatePool | None,
        buffers: DecodeBuffers,
        max_batch: int,
        max_model_len: int,
    ) -> None:
        self._forward = forward
        self._store = store
        self._states = states
        self._buffers = buffers
        self._sizes = batch_sizes(max_batch)
        buffers.reserve(max_batch, store.timeline.num_blocks(max_model_len, max_model_len))
        # All graphs read the first rows.
        self._input_ids = torch.zeros(max_batch, dtype=torch.int64, device=store.device)
        self._logits: Tensor | None = None
        self._recorder = _Recorder(store.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._steps = {size: self._step(size) for size in self._sizes}
        self._compute(self._sizes[0])  # from here on all states are there
        self._expected = {size: self._compute(size) for size in self._sizes}

    def capture(self) -> None:
        """Capture the forward for all sizes.

        Raises:
            RuntimeError: It cannot be captured.
        """
        # The largest first: the others fit into its memory.
        for size in self._sizes[::-1]:
            self._graphs[size] = self._recorder.record(partial(self._keep, self._steps[size]))

    def difference(self) -> str:
        """Run all graphs; return how what they compute differs from what the forward does, if so."""
        computed = {size: self._try(size, partial(self._replay, size)) for size in self._sizes}
        wrong = [size for size in self._sizes if not _are_alike(computed[size], self._expected[size])]
        self._expected.clear()
        return f"the graph of {wrong[0]} rows computes something else than the model" if wrong else ""

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
        self._input_ids[: len(input_ids)].copy_(input_ids)
        return self._replay(len(input_ids))

    def _replay(self, num_rows: int) -> Tensor:
        self._graphs[num_rows].replay()
        assert self._logits is not None
        return self._logits[:num_rows]

    def _step(self, num_rows: int) -> Step:
        """Return what computes a step of so many rows with what is in the buffers then."""
        # Without requests, whatever the buffers' rows are for another size.
        self._buffers.fill([], num_rows)
        plans = self._buffers.plans(num_rows, has_free_rows=True)
        inputs = self._input_ids[:num_rows], self._buffers.positions(num_rows), self._buffers.slots(num_rows)

        def step() -> Tensor:
            with forward_context(DecodeAttention(self._store, plans)):
                return self._forward(*inputs)

        return step

    def _compute(self, num_rows: int) -> list[Tensor]:
        return self._try(num_rows, partial(self._recorder.run, self._steps[num_rows]))

    def _keep(self, step: Step) -> None:
        """Leave a step's logits where the first one had them."""
        logits = step()
        if self._logits is None:
            self._logits = logits
        else:
            self._logits[: len(logits)].copy_(logits)

    def _try(self, num_rows: int, run: Step) -> list[Tensor]:
        """Compute two tokens of a request in the first row; return its logits and what its slot holds then.

        Of exact tokens, those are the two, and the norm of the other places.
        """
        store = self._store
        num_blocks = [1] * len(store.visibilities)
        manager = CacheManager(store.timeline, store.visibilities, num_blocks, store.num_slots, False)
        cache = manager.open([0], 1)
        assert cache is not None, "there are no other requests"
        exact = [tensor[cache.slot] for pair in store.exact.values() for tensor in pair]
        states = self._states.of_slot(cache.slot) if self._states is not None else []
        for tensor in exact + states:
            tensor.zero_()
        for position in range(2):
            self._buffers.fill([Chunk(cache, position, position + 1, 1)], num_rows)
            self._input_ids.fill_(position + 1)
            logits = run()
        # A request's first tokens lie first; of the others' places, where nothing is, the norm is enough.
        held = [part for tensor in exact for part in (tensor[:, :2], tensor[:, 2:].norm())]
        # For all sizes, that would be too much for the device.
        return [tensor.to("cpu", copy=True) for tensor in (logits[0], *held, *states)]


class _Recorder:
    """Run and capture steps, all on one stream, for each of which libraries keep memory, and in one pool."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def run(self, step: Step) -> Tensor:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = step()
        current.wait_stream(self._stream)
        return result

    def record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            step()
        return graph


def _are_alike(computed: list[Tensor], expected: list[Tensor]) -> bool:
    for result, reference in zip(computed, expected, strict=True):
        # Infinite logits are alike, too.
        error = torch.where(result == reference, 0, result.float() - reference.float())
        if not error.norm() <= MAX_ERROR * reference.float().norm():
            return False
    return True


def capture_graphs(
    forward: Forward,
    store: PagedStore,
    states: StatePool | None,
    buffers: DecodeBuffers,
    max_batch: int,
    max_model_len: int,
    ranks: Ranks,
) -> DecodeGraphs | None:
    """Return `DecodeGraphs`, captured and compared; None if a rank has none, and the log says why."""
    graphs, failure = None, ""
    try:
        graphs = DecodeGraphs(forward, store, states, buffers, max_batch, max_model_len)
        graphs.capture()
    except Exception as error:  # whatever a model does that a graph cannot
        if graphs is None:
            ranks.check_shared(error)
        reason = str(error).partition("\n")[0]
        failure = f"{reason} ({type(error).__name__})"
    failure = ranks.any_failure(failure)
    if graphs is not None and not failure:
        failure = ranks.any_failure(graphs.difference())
        if not failure:
            return graphs
    logger.warning("decode steps run without CUDA graphs: %s", failure)
    return None


def batch_sizes(max_batch: int) -> list[int]:
    """Return the sizes that graphs are made for: powers of two and what is halfway, up to the largest."""
    sizes = {size for power in range(16) for size in (2**power, 3 * 2**power // 2)}
    return [*sorted(size for size in sizes if size < max_batch), max_batch]
