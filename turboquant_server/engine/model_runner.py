"""Runs the model on a scheduled batch; all that happens on the device happens here. Knows no text."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turboquant_core import (
    Chunk,
    DecodeAttention,
    DenseCache,
    PagedStore,
    PassThroughCache,
    PrefillAttention,
    StatePool,
    cache_argument,
    forward_context,
    plan_decode,
)
from turboquant_server.engine.decode_graphs import DecodeGraphs
from turboquant_server.engine.request import Request, RequestFailedError
from turboquant_server.engine.sampler import SamplingRow, sample
from turboquant_server.engine.scheduler import ScheduledBatch, ScheduledRequest

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

# Rows of logits that are sampled together; choices of one prompt have a copy of its row each.
MAX_ROWS = 256

logger = logging.getLogger(__name__)


class ModelRunner:
    """Compute scheduled tokens into the requests' caches and choose the tokens that follow.

    Args:
        model: A causal language model of transformers, in evaluation mode, on its device.
        store: Holds the keys and values.
        states: Holds what recurrent layers remember, if the model has any.
        is_paged: The model attends on the store; otherwise it gets the past as it gets it in transformers.

    Attributes:
        graphs: Run decode steps of this many requests or less, if there are any: see `capture_graphs`.
    """

    def __init__(
        self, model: PreTrainedModel, store: PagedStore, states: StatePool | None, *, is_paged: bool
    ) -> None:
        self.graphs: DecodeGraphs | None = None
        self._model = model
        self._store = store
        self._states = states
        self._is_paged = is_paged
        self._cache_argument = cache_argument(model)
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        # Only some positions' logits are needed; a long chunk's would take more memory than its cache.
        self._takes_logits_to_keep = "logits_to_keep" in parameters

    @property
    def can_capture(self) -> bool:
        """Tell whether decode steps may run as CUDA graphs."""
        return self._is_paged and self._states is None and self._store.device.type == "cuda"

    @torch.inference_mode()
    def capture_graphs(self, max_batch: int, max_model_len: int) -> None:
        """Let decode steps run as CUDA graphs; if that fails, they do not, and the log says why."""
        wanted = torch.zeros(1, dtype=torch.int64, device=self._model.device)

        def forward(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            cache = PassThroughCache(self._model.config)
            return self._call_model(input_ids, position_ids, wanted, cache)[:, 0]

        try:
            self.graphs = DecodeGraphs(forward, self._store, max_batch, max_model_len)
        except Exception as error:  # whatever a model does that a graph cannot
            reason = str(error).partition("\n")[0]
            logger.warning("decode steps run without CUDA graphs: %s (%s)", reason, type(error).__name__)

    def run(self, batch: ScheduledBatch) -> list[tuple[ScheduledRequest, list[int] | RequestFailedError]]:
        """Compute one step.

        Returns:
            For each request its new token and one for each of its forks, nothing while its prompt is
            incomplete, or why it failed. The failure of one request leaves the others alone.
        """
        computed = [
            *zip(batch.prefills, self._compute(batch.prefills, is_decode=False), strict=True),
            *zip(batch.decodes, self._compute(batch.decodes, is_decode=True), strict=True),
        ]
        drawn = [(item, logits) for item, logits in computed if isinstance(logits, Tensor)]
        tokens = iter(self._sample(drawn))
        return [(item, next(tokens) if isinstance(logits, Tensor) else logits) for item, logits in computed]

    def copy_slot(self, source: int, target: int) -> None:
        """Give one slot what another holds."""
        self._store.copy_slot(source, target)
        if self._states is not None:
            self._states.copy_slot(source, target)

    @torch.inference_mode()
    def forward(self, scheduled: Sequence[ScheduledRequest], *, is_decode: bool) -> list[Tensor]:
        """Compute tokens into the caches and return the logits ``[vocab_size]`` of each request's last one.

        Args:
            scheduled: At least one request.
            is_decode: Each has one chunk of one token.
        """
        if len(scheduled) > 1 and not self._is_batched(is_decode):
            return [row for item in scheduled for row in self.forward([item], is_decode=is_decode)]
        if not self._is_paged:
            return [self._forward_dense(scheduled[0])]
        if is_decode:
            chunks = [item.chunks[0] for item in scheduled]
            if self.graphs is not None:
                newest = [
                    item.request.token_ids[chunk.start] for item, chunk in zip(scheduled, chunks, strict=True)
                ]
                return list(self.graphs.run(newest, chunks))
            plans = [
                plan_decode(chunks, group, visibility, self._store.timeline, self._store.device)
                for group, visibility in enumerate(self._store.visibilities)
            ]
            with forward_context(DecodeAttention(self._store, plans)):
                return list(self._forward(scheduled, num_rows=len(scheduled)))
        chunks = [chunk for item in scheduled for chunk in item.chunks]
        with forward_context(PrefillAttention(self._store, self._store.plan_prefill(chunks))):
            return list(self._forward(scheduled, num_rows=1))

    def _is_batched(self, is_decode: bool) -> bool:
        """Tell whether several requests go through the model at once."""
        # Layers that remember would take one prompt's tokens for the continuation of another's.
        return self._is_paged and (is_decode or self._states is None)

    def _forward(self, scheduled: Sequence[ScheduledRequest], num_rows: int) -> Tensor:
        """Run the model on all chunks in `num_rows` rows; return the last logits of each request."""
        chunks = [chunk for item in scheduled for chunk in item.chunks]
        counts = torch.tensor([sum(chunk.num_tokens for chunk in item.chunks) for item in scheduled])
        wanted = counts.cumsum(0).sub_(1) if num_rows == 1 else torch.zeros(1, dtype=torch.int64)
        token_ids = [item.request.token_ids[c.start : c.end] for item in scheduled for c in item.chunks]
        slots = [item.chunks[0].cache.slot for item in scheduled]
        cache = PassThroughCache(self._model.config)
        return self._run_model(token_ids, chunks, num_rows, wanted, cache, slots).flatten(0, 1)

    def _forward_dense(self, scheduled: ScheduledRequest) -> Tensor:
        """Run the model chunk by chunk, each with its past as one tensor."""
        for chunk in scheduled.chunks:
            token_ids = scheduled.request.token_ids[chunk.start : chunk.end]
            cache = DenseCache(self._model.config, self._store, chunk)
            wanted = torch.tensor([chunk.num_tokens - 1])
            logits = self._run_model([token_ids], [chunk], 1, wanted, cache, [chunk.cache.slot])
        return logits[0, 0]

    def _run_model(
        self,
        token_ids: Sequence[Sequence[int]],
        chunks: Sequence[Chunk],
        num_rows: int,
        wanted: Tensor,
        cache: Cache,
        slots: list[int],
    ) -> Tensor:
        """Return logits ``[num_rows, num_wanted, vocab_size]`` at the wanted places of each row."""
        device = self._model.device
        positions = [range(chunk.start, chunk.end) for chunk in chunks]
        if self._states is not None and chunks[0].start > 0:
            self._states.load(cache, slots)
        logits = self._call_model(
            _rows(token_ids, num_rows, device), _rows(positions, num_rows, device), wanted.to(device), cache
        )
        if self._states is not None:
            self._states.store(cache, slots)
        return logits

    def _call_model(self, input_ids: Tensor, position_ids: Tensor, wanted: Tensor, cache: Cache) -> Tensor:
        options: dict[str, Any] = {self._cache_argument: cache}
        if self._takes_positions:
            options["position_ids"] = position_ids
        if self._takes_logits_to_keep:
            options["logits_to_keep"] = wanted
        outputs = self._model(input_ids=input_ids, use_cache=True, return_dict=True, **options)
        logits: Tensor = outputs.logits
        return logits if self._takes_logits_to_keep else logits[:, wanted]

    def _compute(
        self, scheduled: Sequence[ScheduledRequest], *, is_decode: bool
    ) -> list[Tensor | RequestFailedError]:
        """Return each request's logits; if all together fail, each alone, so that only the culprit does."""
        if not scheduled:
            return []
        if len(scheduled) > 1 and self._states is not None and not (is_decode and self._is_paged):
            # Each is a forward of its own, and states that have moved on cannot be tried again.
            return [result for item in scheduled for result in self._compute([item], is_decode=is_decode)]
        failures: list[RequestFailedError] = []
        try:
            return list(self.forward(scheduled, is_decode=is_decode))
        except Exception as error:
            if len(scheduled) == 1:
                request_id = scheduled[0].request.request_id
                logger.exception("request %s failed", request_id)
                # The error itself stays here: its traceback holds the activations.
                failures = [_failure(request_id, error)]
            else:
                logger.warning(
                    "a step of %d requests failed and is tried again", len(scheduled), exc_info=True
                )
        if failures:
            return list(failures)
        # Computing the same tokens again leaves the same in the caches.
        return [result for item in scheduled for result in self._compute([item], is_decode=is_decode)]

    def _sample(
        self, computed: Sequence[tuple[ScheduledRequest, Tensor]]
    ) -> list[list[int] | RequestFailedError]:
        """Draw the tokens of each request's choices from its logits; like `_compute` in what fails."""
        try:
            return [*self._draw(computed)]
        except Exception as error:
            if len(computed) == 1:
                request_id = computed[0][0].request.request_id
                logger.exception("request %s failed", request_id)
                return [_failure(request_id, error)]
            logger.warning("sampling for %d requests failed and is tried again", len(computed), exc_info=True)
        return [result for item in computed for result in self._sample([item])]

    @torch.inference_mode()
    def _draw(self, computed: Sequence[tuple[ScheduledRequest, Tensor]]) -> list[list[int]]:
        rows = [
            (
                logits,
                SamplingRow(choice.sampling_params, choice.seed, choice.choice_index, item.chunks[-1].end),
            )
            for item, logits in computed
            for choice in _choices(item)
        ]
        tokens: list[int] = []
        for start in range(0, len(rows), MAX_ROWS):
            logits, parameters = zip(*rows[start : start + MAX_ROWS], strict=True)
            tokens += map(int, sample(torch.stack(logits), parameters).tolist())
        remaining = iter(tokens)
        return [[next(remaining) for _ in _choices(item)] for item, _ in computed]


def _choices(scheduled: ScheduledRequest) -> list[Request]:
    """Return the choices that get a token when these chunks are computed."""
    request = scheduled.request
    return [request, *request.forks] if scheduled.chunks[-1].end == request.num_tokens else []


def _rows(values: Sequence[Sequence[int]], num_rows: int, device: torch.device) -> Tensor:
    flat = [number for part in values for number in part]
    return torch.tensor(flat, device=device).view(num_rows, -1)


def _failure(request_id: str, error: Exception) -> RequestFailedError:
    if isinstance(error, torch.OutOfMemoryError):
        message = "The device ran out of memory on this request."
    else:
        message = f"The model failed on this request ({type(error).__name__}); the log has the details."
    return RequestFailedError(request_id, message)
