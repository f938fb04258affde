"""The loop: schedule, run, process. One thread owns an Engine; it knows neither asyncio nor HTTP."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, TypeAlias

from turboquant_server.engine.detokenizer import Detokenizer
from turboquant_server.engine.request import (
    FinishReason,
    Request,
    RequestFailedError,
    RequestOutput,
    RequestStatus,
)
from turboquant_server.engine.sampler import INVALID_TOKEN_ID
from turboquant_server.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from turboquant_server.engine.model_runner import ModelRunner
    from turboquant_server.engine.scheduler import ScheduledRequest, Scheduler

logger = logging.getLogger(__name__)

StepOutput: TypeAlias = RequestOutput | RequestFailedError


class Engine:
    """Generate tokens for queued requests, one step at a time.

    Args:
        scheduler: Decides what the next step computes.
        model_runner: Computes it.
        tokenizer: Used by this engine only; fast tokenizers must not be shared between threads.
        eos_token_ids: Tokens that end an answer.
        vocab_size: Token ids that the model takes are below this.
        max_model_len: Most tokens of prompt and answer together.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        model_runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Collection[int],
        vocab_size: int,
        max_model_len: int,
    ) -> None:
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._model_runner = model_runner
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)

    @property
    def has_unfinished_requests(self) -> bool:
        """Tell whether a step has something to do."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        cache_salt: str = "",
    ) -> None:
        """Queue a request; its outputs come from the steps that follow.

        Args:
            request_id: One that no earlier request had.
            prompt_token_ids: 1 to max_model_len - 1 tokens of the model's vocabulary.
            sampling_params: What is asked of the sampler and of the stop conditions.
            cache_salt: Only requests with the same one share parts of their prompts' caches.

        Raises:
            ValueError: The prompt is empty, leaves no room for a token, or has a token that the model lacks.
        """
        self.check_prompt(prompt_token_ids)
        seed = secrets.randbits(63) if sampling_params.seed is None else sampling_params.seed
        choices = [
            Request(
                request_id,
                prompt_token_ids,
                sampling_params,
                Detokenizer(self._tokenizer, prompt_token_ids, sampling_params.stop),
                seed=seed,
                choice_index=index,
                cache_salt=cache_salt.encode(),
            )
            for index in range(sampling_params.n)
        ]
        first, *first.forks = choices
        self.scheduler.add(first)

    def check_prompt(self, prompt_token_ids: list[int]) -> None:
        """Raise the ValueError of add_request; safe on any thread."""
        longest = self.max_model_len - 1
        if not 1 <= len(prompt_token_ids) <= longest:
            raise ValueError(f"a prompt must have 1 to {longest} tokens, got {len(prompt_token_ids)}")
        if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < self.vocab_size:
            raise ValueError(f"the model's token ids are 0 to {self.vocab_size - 1}")

    def abort_request(self, request_id: str) -> None:
        """End a request, wherever it is, without another output. An unknown or finished one is no error."""
        for choice in self.scheduler.find(request_id):
            self.scheduler.finish(choice, FinishReason.ABORT)

    def step(self) -> list[StepOutput]:
        """Compute one step of all running requests and return their outputs and failures."""
        batch = self.scheduler.schedule()
        results = self._model_runner.run(batch)
        return [output for scheduled, result in results for output in self._process(scheduled, result)]

    def _process(
        self, scheduled: ScheduledRequest, result: list[int] | RequestFailedError
    ) -> Iterator[StepOutput]:
        """Take in what a step has computed of a request: a token for it and each of its forks, or none."""
        request = scheduled.request
        if request.status is not RequestStatus.RUNNING:
            return  # another choice of the same request has just failed
        if isinstance(result, RequestFailedError):
            self.abort_request(request.request_id)
            yield result
            return
        self.scheduler.advance(scheduled)
        if not result:
            return
        for choice in (request, *self._fork(request)):
            # A choice that has no slot yet will draw the same token again.
            output = self._append(choice, result[choice.choice_index - request.choice_index])
            yield output
            if isinstance(output, RequestFailedError):
                return

    def _fork(self, request: Request) -> list[Request]:
        assert request.cache is not None
        started = self.scheduler.fork(request)
        for _, slot in started:
            self._model_runner.copy_slot(request.cache.slot, slot)
        return [fork for fork, _ in started]

    def _append(self, request: Request, token_id: int) -> StepOutput:
        if token_id == INVALID_TOKEN_ID:
            logger.error("request %s got logits that are not finite", request.request_id)
            self.abort_request(request.request_id)
            message = (
                "The model's output is not a number; a wider dtype, such as bfloat16 or float32, may help."
            )
            return RequestFailedError(request.request_id, message)
        request.token_ids.append(token_id)
        try:
            text, finish_reason = self._extend_text(request, token_id)
        except Exception:
            # A model may generate ids that its tokenizer cannot decode; only this request suffers.
            logger.exception("request %s generated token %d, which has no text", request.request_id, token_id)
            self.abort_request(request.request_id)
            return RequestFailedError(request.request_id, f"The tokenizer cannot decode token {token_id}.")
        if finish_reason is not None:
            self.scheduler.finish(request, finish_reason)
        return RequestOutput(
            request_id=request.request_id,
            text=text,
            token_ids=[token_id],
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=request.num_output_tokens,
            finish_reason=finish_reason,
            num_cached_tokens=request.num_cached_tokens or 0,
            choice_index=request.choice_index,
        )

    def _extend_text(self, request: Request, token_id: int) -> tuple[str, FinishReason | None]:
        """Return the text that a new token makes certain and, if it ends the answer, why."""
        params, detokenizer = request.sampling_params, request.detokenizer
        if token_id in self._eos_token_ids and not params.ignore_eos:
            return detokenizer.flush(), FinishReason.STOP
        text = detokenizer.append(token_id)
        if request.num_output_tokens >= params.max_tokens or request.num_tokens >= self.max_model_len:
            text += detokenizer.flush()
            return text, FinishReason.STOP if detokenizer.stopped else FinishReason.LENGTH
        return text, FinishReason.STOP if detokenizer.stopped else None
