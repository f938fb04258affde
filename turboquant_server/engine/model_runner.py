"""Runs the model on a scheduled batch; all that happens on the device happens here. Knows no text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from turboquant_core import (
    Chunk,
    DecodeAttention,
    DecodeBuffers,
    DenseCache,
    HostStore,
    PagedStore,
    PassThroughCache,
    PrefillAttention,
    StatePool,
    forward_context,
    upload,
)
from turboquant_server.engine.decode_graphs import DecodeGraphs, capture_graphs
from turboquant_server.engine.model_forward import ModelForward
from turboquant_server.engine.pending_step import PendingStep, StepResult
from turboquant_server.engine.prompt_scorer import PromptScorer
from turboquant_server.engine.ranks import ALONE, Ranks
from turboquant_server.engine.request import RequestFailedError
from turboquant_server.engine.request_failure import request_failure
from turboquant_server.engine.scheduler import ScheduledBatch, ScheduledRequest
from turboquant_server.engine.token_drawer import Drawn, TokenDrawer

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from turboquant_server.engine.compiled_forward import CompiledForward
    from turboquant_server.engine.request import Request

# Requests and what was drawn for their choices; or why one failed.
_Drawn: TypeAlias = tuple[Sequence[ScheduledRequest], Drawn | RequestFailedError]

logger = logging.getLogger(__name__)


class ModelRunner:
    """Compute scheduled tokens into the requests' caches and choose the tokens that follow.

    Args:
        model: A causal language model of transformers, in evaluation mode, on its device.
        store: Holds the keys and values.
        states: Holds what recurrent layers remember, if the model has any.
        is_paged: The model attends on the store; otherwise it gets the past as it gets it in transformers.
        compiled: Takes the place of the model's own forward.
        host_store: Where blocks go whose room in the store is needed, if they go anywhere.
        ranks: Those that compute the same steps, each with its part of the model.

    Attributes:
        graphs: Run decode steps of this many requests or less, if there are any: see `capture_graphs`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: PagedStore,
        states: StatePool | None,
        *,
        is_paged: bool,
        compiled: CompiledForward | None = None,
        host_store: HostStore | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.graphs: DecodeGraphs | None = None
        self._model = model
        self._store = store
        self._states = states
        self._is_paged = is_paged
        self._model_forward = ModelForward(model)
        self._compiled = compiled
        self._host_store = host_store
        self._ranks = ranks
        self._buffers = DecodeBuffers(
            store.visibilities, store.timeline, store.num_slots, store.device, num_extra=2
        )
        self._tokens = torch.empty(0, dtype=torch.int64, device=store.device)  # of the newest step
        self._token_drawer = TokenDrawer(store.device, store.num_slots)
        self._prompt_scorer = PromptScorer(model)
        self._newest_step: PendingStep | None = None

    @property
    def can_capture(self) -> bool:
        """Tell whether decode steps may run as CUDA graphs."""
        return self._is_paged and self._store.device.type == "cuda"

    @torch.inference_mode()
    def capture_graphs(self, max_batch: int, max_model_len: int) -> None:
        """Let decode steps run as CUDA graphs; if that fails on a rank, they do not, and the log says why."""
        self._store.warm_up()
        sizes = max_batch, max_model_len
        self.graphs = capture_graphs(
            self._decode, self._store, self._states, self._buffers, *sizes, self._ranks
        )

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """Start to compute one step; on a GPU, without waiting for it or for any step before.

        Of the tokens that requests have, the newest may be some that only the step before knows.

        Returns:
            What becomes of each request. The failure of one leaves the others alone.
        """
        if self._host_store is not None:
            self._host_store.move(batch.moves)
        drawn = self._compute(batch.prefills, is_decode=False)
        drawn += self._compute(batch.decodes, is_decode=True)
        results: list[tuple[ScheduledRequest, StepResult]] = []
        parts = [self._tokens.new_empty(0)]
        logprobs: list[Tensor] = []
        logprob_places: list[int] = []
        num_tokens = 0
        for items, outcome in drawn:
            if isinstance(outcome, RequestFailedError):
                results += [(item, outcome) for item in items]
                continue
            parts.append(outcome.token_ids)
            if outcome.logprobs is not None:
                logprobs.append(outcome.logprobs)
                logprob_places += [num_tokens + place for place in outcome.asking]
            for item in items:
                first, num_tokens = num_tokens, num_tokens + len(item.choices)
                results.append((item, range(first, num_tokens)))
        all_tokens = self._ranks.take_first(torch.cat(parts))
        # Where logits had no token, the next step may compute with any.
        self._tokens = all_tokens.clamp(min=0)
        rows, prompt_rows = torch.cat(logprobs) if logprobs else None, self._prompt_scorer.take()
        self._newest_step = PendingStep(results, all_tokens, rows, logprob_places, prompt_rows)
        return self._newest_step

    def copy_slot(self, source: int, target: int) -> None:
        """Give one slot what another holds."""
        self._store.copy_slot(source, target)
        if self._states is not None:
            self._states.copy_slot(source, target)

    @torch.inference_mode()
    def forward(self, scheduled: Sequence[ScheduledRequest], *, is_decode: bool) -> Tensor:
        """Compute tokens into the caches.

        Args:
            scheduled: At least one request.
            is_decode: Each has one chunk of one token.

        Returns:
            Logits ``[num_requests, vocab_size]`` of each one's last token, which the next call may overwrite.
        """
        if len(scheduled) > 1 and not self._is_batched(is_decode):
            return torch.cat([self.forward([item], is_decode=is_decode) for item in scheduled])
        if not self._is_paged:
            return self._forward_dense(scheduled[0])
        return self._forward_decode(scheduled) if is_decode else self._forward_prefill(scheduled)

    def _is_batched(self, is_decode: bool) -> bool:
        """Tell whether several requests go through the model at once."""
        # Layers that remember would take one prompt's tokens for the continuation of another's.
        return self._is_paged and (is_decode or self._states is None)

    def _forward_prefill(self, scheduled: Sequence[ScheduledRequest]) -> Tensor:
        """Run the model on all chunks in one row."""
        prompts = [(item.request, chunk) for item in scheduled for chunk in item.chunks]
        chunks = [chunk for _, chunk in prompts]
        token_ids = [item.request.token_ids[c.start : c.end] for item in scheduled for c in item.chunks]
        positions = [range(chunk.start, chunk.end) for chunk in chunks]
        ends = accumulate(sum(chunk.num_tokens for chunk in item.chunks) for item in scheduled)
        inputs = self._upload([[*chain(*token_ids)], [*chain(*positions)]])[:, None]
        wanted = self._upload([end - 1 for end in ends])
        slots = self._upload([item.chunks[0].cache.slot for item in scheduled])
        cache = PassThroughCache(self._model.config)
        with forward_context(PrefillAttention(self._store, self._store.plan_prefill(chunks))):
            has_past = chunks[0].start > 0
            logits = self._run_model(inputs, wanted, cache, slots, has_past=has_past, prompts=prompts)
        return logits[0]

    def _forward_decode(self, scheduled: Sequence[ScheduledRequest]) -> Tensor:
        """Run the model on the newest token of each request, each in its own row."""
        chunks = [item.chunks[0] for item in scheduled]
        newest = [item.request.token_ids[item.chunks[0].start] for item in scheduled]
        num_rows = len(chunks) if self.graphs is None else self.graphs.num_rows(len(chunks))
        self._buffers.fill(chunks, num_rows, self._places(newest))
        input_ids = self._take(self._buffers.extra(num_rows))
        if self.graphs is not None:
            logits = self.graphs.run(input_ids)[: len(chunks)]
            self._store.make_due_blocks(chunks)
            return logits
        rows = input_ids, self._buffers.positions(num_rows), self._buffers.slots(num_rows)
        with forward_context(DecodeAttention(self._store, self._buffers.plans(num_rows))):
            return self._decode(*rows, *chunks)

    def _decode(self, input_ids: Tensor, positions: Tensor, slots: Tensor, *chunks: Chunk) -> Tensor:
        """Run the model on one token in each row; return logits ``[num_rows, vocab_size]``."""
        inputs = input_ids[:, None], positions.long()[:, None]
        wanted = input_ids.new_zeros(1)
        cache = PassThroughCache(self._model.config)
        return self._run_model(inputs, wanted, cache, slots.long(), has_past=True, decodes=chunks)[:, 0]

    def _forward_dense(self, scheduled: ScheduledRequest) -> Tensor:
        """Run the model chunk by chunk, each with its past as one tensor."""
        for chunk in scheduled.chunks:
            token_ids = scheduled.request.token_ids[chunk.start : chunk.end]
            known, places, positions = self._upload(
                [*self._places(token_ids), [*range(chunk.start, chunk.end)]]
            )
            inputs = torch.stack([self._take((known, places)), positions])[:, None]
            wanted, slots = self._upload([[chunk.num_tokens - 1], [chunk.cache.slot]])
            cache = DenseCache(self._model.config, self._store, chunk)
            prompts = [(scheduled.request, chunk)]
            logits = self._run_model(inputs, wanted, cache, slots, has_past=chunk.start > 0, prompts=prompts)
        return logits[0]

    def _run_model(
        self,
        inputs: Tensor | tuple[Tensor, Tensor],
        wanted: Tensor,
        cache: Cache,
        slots: Tensor,
        *,
        has_past: bool,
        decodes: Sequence[Chunk] = (),
        prompts: Sequence[tuple[Request, Chunk]] = (),
    ) -> Tensor:
        """Run the model on tokens and their positions, ``[2, num_rows, num_tokens]``; see `ModelForward`."""
        if self._states is not None and has_past:
            self._states.load(cache, slots)
        if any(request.scores_prompt for request, _ in prompts):
            logits = self._prompt_scorer.forward(inputs[0], inputs[1], wanted, cache, prompts)
        else:
            logits = self._call_model(inputs[0], inputs[1], wanted, cache)
        self._store.make_due_blocks(decodes)  # before states move on, as what fails is tried again
        if self._states is not None:
            self._states.store(cache, slots)
        return logits

    def _places(self, token_ids: Sequence[int]) -> list[list[int]]:
        """Return tokens, and where each is among those of the step before, followed by these."""
        first = len(self._tokens)
        places = [first + i if token_id >= 0 else -1 - token_id for i, token_id in enumerate(token_ids)]
        return [[max(0, token_id) for token_id in token_ids], places]

    def _take(self, known_and_places: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Return the tokens that `_places` shows, int64 ``[num_tokens]``."""
        known, places = known_and_places
        return torch.cat([self._tokens, known]).index_select(0, places)

    def _upload(self, numbers: Sequence[object]) -> Tensor:
        return upload(numbers, torch.int64, self._store.device)

    def _call_model(self, input_ids: Tensor, position_ids: Tensor, wanted: Tensor, cache: Cache) -> Tensor:
        if self._compiled is not None:
            return self._compiled(input_ids, position_ids, wanted)
        return self._model_forward(input_ids, position_ids, wanted, cache)

    def _compute(self, scheduled: Sequence[ScheduledRequest], *, is_decode: bool) -> list[_Drawn]:
        """Compute and draw; if requests fail together, each alone, so that only the culprit does."""
        if not scheduled:
            return []
        logits = None
        # With states, prompts are forwards of their own, and states that have moved on cannot be tried again.
        if len(scheduled) == 1 or self._states is None or self._is_batched(is_decode):
            try:
                logits = self.forward(scheduled, is_decode=is_decode)
            except Exception as error:
                self._ranks.check_shared(error)
                # A graph moves states on before anything can fail.
                if len(scheduled) == 1 or (self._states is not None and self.graphs is not None):
                    return [([item], request_failure(item.request.request_id, error)) for item in scheduled]
                logger.warning("a step of %d failed; each is tried alone", len(scheduled), exc_info=True)
        if logits is not None:
            return self._sample(scheduled, logits)
        # Computing the same tokens again leaves the same in the caches.
        return [drawn for item in scheduled for drawn in self._compute([item], is_decode=is_decode)]

    def _sample(self, scheduled: Sequence[ScheduledRequest], logits: Tensor) -> list[_Drawn]:
        """Draw the tokens of each request's choices from its logits; like `_compute` in what fails."""
        try:
            drawn = self._token_drawer.draw(scheduled, logits, self._tokens, self._newest_step)
            return [(scheduled, drawn)]
        except Exception as error:
            self._ranks.check_shared(error)
            if len(scheduled) == 1:
                return [(scheduled, request_failure(scheduled[0].request.request_id, error))]
            logger.warning("sampling for %d failed; each is tried alone", len(scheduled), exc_info=True)
        rows = zip(scheduled, logits, strict=True)
        return [drawn for item, row in rows for drawn in self._sample([item], row[None])]
