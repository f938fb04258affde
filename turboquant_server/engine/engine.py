"""The loop: schedule, run, process. One thread owns an Engine; it knows neither asyncio nor HTTP."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, TypeAlias

from turboquant_server.engine.detokenizer import Detokenizer
from turboquant_server.engine.request import FinishReason, Request, RequestFailedError, RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from turboquant_server.engine.model_runner import ModelRunner
    from turboquant_server.engine.scheduler import Scheduler

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
        self, request_id: str, prompt_token_ids: list[int], sampling_params: SamplingParams
    ) -> None:
        """Queue a request; its outputs come from the steps that follow.

        Raises:
            ValueError: The prompt is empty, leaves no room for a token, or has a token that the model lacks.
        """
        self.check_prompt(prompt_token_ids)
        detokenizer = Detokenizer(self._tokenizer, prompt_token_ids, sampling_params.stop)
        self.scheduler.add(Request(request_id, prompt_token_ids, sampling_params, detokenizer))

    def check_prompt(self, prompt_token_ids: list[int]) -> None:
        """Raise the ValueError of add_request; safe on any thread."""
        longest = self.max_model_len - 1
        if not 1 <= len(prompt_token_ids) <= longest:
            raise ValueError(f"a prompt must have 1 to {longest} tokens, got {len(prompt_token_ids)}")
        if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < self.vocab_size:
            raise ValueError(f"the model's token ids are 0 to {self.vocab_size - 1}")

    def abort_request(self, request_id: str) -> None:
        """End a request, wherever it is, without another output. An unknown or finished one is no error."""
        request = self.scheduler.find(request_id)
        if request is not None:
            self.scheduler.finish(request, FinishReason.ABORT)

    def step(self) -> list[StepOutput]:
        """Compute one step of all running requests and return their outputs and failures."""
        batch = self.scheduler.schedule()
        results = self._model_runner.run(batch)
        return [
            self._process(request, result)
            for request, result in zip(batch.requests, results, strict=True)
            if result is not None
        ]

    def _process(self, request: Request, result: int | RequestFailedError) -> StepOutput:
        if isinstance(result, RequestFailedError):
            self.scheduler.finish(request, FinishReason.ABORT)
            return result
        request.token_ids.append(result)
        try:
            text, finish_reason = self._extend_text(request, result)
        except Exception:
            # A model may generate ids that its tokenizer cannot decode; only this request suffers.
            logger.exception("request %s generated token %d, which has no text", request.request_id, result)
            self.scheduler.finish(request, FinishReason.ABORT)
            return RequestFailedError(request.request_id, f"The tokenizer cannot decode token {result}.")
        if finish_reason is not None:
            self.scheduler.finish(request, finish_reason)
        return RequestOutput(
            request_id=request.request_id,
            text=text,
            token_ids=[result],
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=request.num_output_tokens,
            finish_reason=finish_reason,
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
