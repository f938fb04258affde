"""ExactReader: what a model predicts when its cache loses nothing, read a slice at a time. Serves nobody.

It has a cache of its own, for one sequence, in which keys and values stay as they are. The model attends to
it as it attends to the served one, by the same code, with another store.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboquant_core import (
    CacheManager,
    Chunk,
    DenseCache,
    PagedStore,
    PassThroughCache,
    PrefillAttention,
    StatePool,
    forward_context,
    upload,
)
from turboquant_server.engine.split_forward import SplitForward

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

# Logits that exist at a time; in float32 so many are 32 MiB.
MAX_ELEMENTS = 1 << 23


class ExactReader:
    """Predict the last tokens of sequences.

    Args:
        model: A causal language model of transformers.
        store: With one slot, and codecs that keep blocks as they are.
        states: Holds what recurrent layers remember, if the model has any.
        manager: Of the store.
        is_paged: The model attends on the store; otherwise it gets the past as it gets it in transformers.
        one_shot: It cannot go on from the middle of a sequence: there is one slice.

    Attributes:
        max_tokens: Most tokens of a sequence.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: PagedStore,
        states: StatePool | None,
        manager: CacheManager,
        *,
        is_paged: bool,
        one_shot: bool,
    ) -> None:
        self.max_tokens = manager.max_tokens
        self._config = model.config
        self._store = store
        self._states = states
        self._manager = manager
        self._is_paged = is_paged
        self._one_shot = one_shot
        self._split = SplitForward(model)

    @torch.inference_mode()
    def read(self, token_ids: Sequence[int], wanted: Tensor) -> Iterator[Tensor]:
        """Read tokens, at most 64 a slice, and look up how likely others were to follow.

        When a slice is yielded the device has done it, and nothing of it is in the way of other forwards.

        Args:
            token_ids: 1 to `max_tokens` tokens.
            wanted: What to look up after each of the last ones, int64 ``[num_predictions, num_wanted]``.

        Yields:
            For the predictions of a slice, float64 ``[num_predictions, num_wanted + 1]`` on the host: the
            log-probabilities of what is wanted, and that of the likeliest token.
        """
        timeline = self._store.timeline
        num_prompt_tokens = len(token_ids)
        if not self._one_shot:
            # What follows a prompt is cut into smaller pieces than the prompt.
            num_prompt_tokens = min(num_prompt_tokens, max(1, timeline.num_sinks))
        cache = self._manager.open(token_ids, num_prompt_tokens)
        assert cache is not None, "one sequence is read at a time"
        try:
            cuts = timeline.cut(len(token_ids), num_prompt_tokens)
            chunks = [Chunk(cache, start, end, num_prompt_tokens) for start, end in cuts]
            for part in [chunks] if self._one_shot else [[chunk] for chunk in chunks]:
                has_room = cache.extend(part[0].start, part[-1].end)
                assert has_room, "the store has room for one sequence"
                states, vocab_size = self._forward(token_ids, part)
                skipped = len(token_ids) - len(wanted)  # tokens after which nothing is looked up
                begin, end = (max(skipped, place) - skipped for place in (part[0].start, part[-1].end))
                yield self._look_up(states[len(states) - (end - begin) :], vocab_size, wanted[begin:end])
        finally:
            cache.release()

    def _forward(self, token_ids: Sequence[int], chunks: Sequence[Chunk]) -> tuple[Tensor, int]:
        """Run the model on chunks; return the hidden states of their tokens, and the vocabulary's size."""
        start, end = chunks[0].start, chunks[-1].end
        inputs = self._upload([token_ids[start:end], range(start, end)])[:, None]
        wanted, slots = self._upload([[end - start - 1], [chunks[0].cache.slot]])
        context: AbstractContextManager[None] = nullcontext()
        if self._is_paged:
            cache: Cache = PassThroughCache(self._config)
            context = forward_context(PrefillAttention(self._store, self._store.plan_prefill(chunks)))
        else:
            cache = DenseCache(self._config, self._store, chunks[0])
        if self._states is not None and start:
            self._states.load(cache, slots)
        with context:
            logits, states = self._split(inputs[0], inputs[1], wanted, cache)
        if self._states is not None:
            self._states.store(cache, slots)
        if not logits.isfinite().all():  # which waits for the device
            raise FloatingPointError("the model's output is not a number")
        return states[0], logits.shape[-1]

    def _look_up(self, states: Tensor, vocab_size: int, wanted: Tensor) -> Tensor:
        """Return a row of log-probabilities for each hidden state and what is wanted after it."""
        rows = [torch.empty(0, wanted.shape[1] + 1, dtype=torch.float64)]
        num_rows = max(1, MAX_ELEMENTS // vocab_size)
        for part, places in zip(states.split(num_rows), wanted.split(num_rows), strict=True):
            if len(part):
                logprobs = self._split.logits(part).log_softmax(-1, dtype=torch.float32)
                found = logprobs.gather(1, places.to(logprobs.device))
                rows.append(torch.cat([found, logprobs.amax(-1, keepdim=True)], dim=1).double().cpu())
        return torch.cat(rows)

    def _upload(self, numbers: Sequence[object]) -> Tensor:
        return upload(numbers, torch.int64, self._store.device)
