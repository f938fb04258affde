"""The loop: schedule, launch, collect. One thread owns an Engine; it knows neither asyncio nor HTTP.

Where steps overlap, a step is launched before the tokens of the one before it are known, which it finds on
the device; the host takes these in while it runs. What was launched for a request that turns out to have
ended is thrown away: device memory that the request gave back is written by later steps only, after it.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from turboquant_server.engine.detokenizer import Detokenizer
from turboquant_server.engine.logprobs import read_logprobs
from turboquant_server.engine.request import (
    FinishReason,
    Request,
    RequestFailedError,
    RequestOutput,
    RequestStatus,
    output_of,
)
from turboquant_server.engine.sampler import INVALID_TOKEN_ID
from turboquant_server.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from turboquant_server.engine.fidelity import Fidelity
    from turboquant_server.engine.model_runner import ModelRunner
    from turboquant_server.engine.pending_step import PendingStep
    from turboquant_server.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

StepOutput: TypeAlias = RequestOutput | RequestFailedError


@dataclass(frozen=True)
class _LaunchedStep:
    """A step whose tokens have not been taken in.

    Attributes:
        pending: What the device does.
        choices: Those that get a token; its index in the request and its place in the step, or why it failed.
        progress: Those whose parts of a prompt are to be reported, and how much of it has been read.
    """

    pending: PendingStep
    choices: list[tuple[Request, int, int | RequestFailedError]]
    progress: list[tuple[Request, int]]


class Engine:
    """Generate tokens for queued requests, one step at a time.

    Args:
        scheduler: Decides what the next step computes.
        model_runner: Computes it.
        tokenizer: Used by this engine only; fast tokenizers must not be shared between threads.
        eos_token_ids: Tokens that end an answer.
        vocab_size: Token ids that the model takes are below this.
        max_model_len: Most tokens of prompt and answer together.
        overlaps_steps: Launch a step before the one before it has ended; a request that ends by what its
            tokens are costs a token more then.
        fidelity: Compares a sample of the answers with what the model predicts without compression.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        model_runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Collection[int],
        vocab_size: int,
        max_model_len: int,
        *,
        overlaps_steps: bool = False,
        fidelity: Fidelity | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.fidelity = fidelity
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self._model_runner = model_runner
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._overlaps_steps = overlaps_steps
        self._launched: list[_LaunchedStep] = []

    @property
    def has_unfinished_requests(self) -> bool:
        """Tell whether a request waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    @property
    def has_work(self) -> bool:
        """Tell whether a step has something to do, be it only to compare answers that were given."""
        return self.has_unfinished_requests or (self.fidelity is not None and self.fidelity.has_work)

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
        end_token_ids = frozenset(sampling_params.stop_token_ids)
        grammar = sampling_params.grammar
        if grammar is not None or not sampling_params.ignore_eos:
            end_token_ids |= self._eos_token_ids
        salt = cache_salt.encode()
        if sampling_params.prompt_logprobs is not None:
            # It is not told of what others have computed; of what it has itself, before it waits, it is.
            salt += secrets.token_bytes(16)
        choices = [
            Request(
                request_id,
                prompt_token_ids,
                sampling_params,
                self._detokenizer(prompt_token_ids, sampling_params),
                seed=seed,
                choice_index=index,
                cache_salt=salt,
                max_model_len=self.max_model_len,
                end_token_ids=end_token_ids,
                matcher=None if grammar is None else grammar.open(),
            )
            for index in range(sampling_params.n)
        ]
        first, *first.forks = choices
        if self.fidelity is not None:
            first.predictions = self.fidelity.begin(len(prompt_token_ids))
        self.scheduler.add(first)

    def _detokenizer(self, prompt_token_ids: list[int], sampling_params: SamplingParams) -> Detokenizer:
        return Detokenizer(
            self._tokenizer,
            prompt_token_ids,
            sampling_params.stop,
            sampling_params.skipped_token_ids,
            include_stop=sampling_params.include_stop,
            min_tokens=sampling_params.min_tokens,
        )

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
            self._finish(choice, FinishReason.ABORT)

    def step(self) -> list[StepOutput]:
        """Launch one step of all running requests; return the outputs and failures of steps before it.

        Unless it is to overlap with the next one, those of this step too. Without requests it is a slice of a
        comparison.
        """
        if self.fidelity is not None and not self.has_unfinished_requests:
            self.fidelity.work()
            return []
        step = self._launch()
        steps, self._launched = [*self._launched, step], []
        # A request that failed must not be in the next step.
        if self._overlaps_steps and not step.pending.has_failures:
            self._launched = [steps.pop()]
        return [output for step in steps for output in self._collect(step)]

    def _launch(self) -> _LaunchedStep:
        began = time.monotonic()
        pending = self._model_runner.launch(self.scheduler.schedule())
        choices: list[tuple[Request, int, int | RequestFailedError]] = []
        progress: list[tuple[Request, int]] = []
        for scheduled, result in pending.results:
            request = scheduled.request
            if isinstance(result, RequestFailedError):
                choices.append((request, request.num_tokens, result))
                continue
            self.scheduler.advance(scheduled)
            request.start_time = request.start_time or began
            if request.is_new and request.sampling_params.reports_progress and request.choice_index == 0:
                progress.append((request, request.num_computed_tokens))
            if not result:
                continue
            for choice in (request, *self._fork(request)):
                # A choice that has no slot yet will draw the same token again.
                place = result[choice.choice_index - request.choice_index]
                choice.start_time = request.start_time
                choices.append((choice, choice.num_tokens, place))
                choice.token_ids.append(-1 - place)
        return _LaunchedStep(pending, choices, progress)

    def _collect(self, step: _LaunchedStep) -> Iterator[StepOutput]:
        """Wait for a step and take in what it has computed."""
        token_ids = step.pending.token_ids()
        logprobs = step.pending.logprobs()
        for request, num_computed_tokens in step.progress:
            if request.status is not RequestStatus.FINISHED:
                yield output_of(request, num_output_tokens=0, num_computed_tokens=num_computed_tokens)
        for request, start, rows in step.pending.prompt_logprobs():
            if any(math.isnan(row[0]) for row in rows) and request.status is not RequestStatus.FINISHED:
                yield self._fail_without_numbers(request)
            elif request.prompt_logprobs is not None:
                num_top = request.sampling_params.prompt_logprobs or 0
                told = [read_logprobs(row, num_top) for row in rows]
                request.prompt_logprobs[start : start + len(told)] = told
        for choice, index, result in step.choices:
            if choice.status is RequestStatus.FINISHED:
                continue  # by the token before, by an abort, or as another choice of the request has failed
            if isinstance(result, RequestFailedError):
                self.abort_request(choice.request_id)
                yield result
            else:
                yield self._take_in(choice, index, token_ids[result], logprobs.get(result))

    def _fork(self, request: Request) -> list[Request]:
        assert request.cache is not None
        started = self.scheduler.fork(request)
        for _, slot in started:
            self._model_runner.copy_slot(request.cache.slot, slot)
        return [fork for fork, _ in started]

    def _take_in(
        self, request: Request, index: int, token_id: int, row: Sequence[float] | None
    ) -> StepOutput:
        """Return what the token with this index adds to a request."""
        if token_id == INVALID_TOKEN_ID:
            return self._fail_without_numbers(request)
        request.token_ids[index] = token_id
        if request.predictions is not None and row is not None:
            request.predictions.append(index, row)
        try:
            text, finish_reason = self._extend_text(request, index)
        except Exception:
            # A model may generate ids that its tokenizer cannot decode; only this request suffers.
            logger.exception("request %s generated token %d, which has no text", request.request_id, token_id)
            self.abort_request(request.request_id)
            return RequestFailedError(request.request_id, f"The tokenizer cannot decode token {token_id}.")
        if finish_reason is not None:
            del request.token_ids[index + 1 :]
            self._finish(request, finish_reason)
        prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        num_top = request.sampling_params.logprobs
        return output_of(
            request,
            text=text,
            token_ids=[token_id],
            num_output_tokens=index + 1 - request.num_prompt_tokens,
            finish_reason=finish_reason,
            logprobs=() if row is None or num_top is None else (read_logprobs(row, num_top),),
            stop_string=request.detokenizer.stop_string,
            prompt_logprobs=tuple(prompt_logprobs or ()),
        )

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if self.fidelity is not None and request.predictions is not None:
            self.fidelity.end(request.predictions, request.token_ids)
        self.scheduler.finish(request, reason)

    def _fail_without_numbers(self, request: Request) -> RequestFailedError:
        logger.error("request %s got logits that are not finite", request.request_id)
        self.abort_request(request.request_id)
        message = "The model's output is not a number; a wider dtype, such as bfloat16 or float32, may help."
        return RequestFailedError(request.request_id, message)

    def _extend_text(self, request: Request, index: int) -> tuple[str, FinishReason | None]:
        """Return the text that a new token makes certain and, if it ends the answer, why."""
        detokenizer, token_id = request.detokenizer, request.token_ids[index]
        if token_id in request.end_token_ids:
            text = detokenizer.append(token_id) if request.sampling_params.include_stop else ""
            return text + detokenizer.flush(), FinishReason.STOP
        text = detokenizer.append(token_id)
        if index + 1 >= request.max_num_tokens:
            text += detokenizer.flush()
            return text, FinishReason.STOP if detokenizer.stopped else FinishReason.LENGTH
        return text, FinishReason.STOP if detokenizer.stopped else None
