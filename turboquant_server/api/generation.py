"""What chat and plain completions share between the request's fields and the response's shape."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request

from turboquant_server.api.errors import ApiError, invalid_request, queue_full
from turboquant_server.api.generation_request import CompletionsRequest, GenerationRequest
from turboquant_server.api.prompts import check_token_ids
from turboquant_server.api.response_models import CompletionUsage, PromptTokensDetails
from turboquant_server.api.streaming import format_chunk
from turboquant_server.api.timings import measure_timings
from turboquant_server.engine.request import FinishReason, RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from turboquant_server.engine.grammar import Grammar
    from turboquant_server.engine.logprobs import TokenLogprobs
    from turboquant_server.model_manager import ModelManager

# The index of an answer and what a step adds to it. Each prompt has `n` answers, one after another.
Outputs: TypeAlias = AsyncGenerator[tuple[int, RequestOutput], None]

# As JSON, in which these characters cannot be a part of a string.
NO_CHOICES = '"choices":[]'


@dataclass(frozen=True)
class Prompt:
    """What one prompt of a request asks of the engine."""

    token_ids: list[int]
    sampling_params: SamplingParams
    cache_salt: str


@dataclass
class Answer:
    """What the engine has generated for one choice so far."""

    pieces: list[str] = field(default_factory=list)  # of its text
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()
    # In seconds of time.monotonic: when the first step began, and the first and the newest token came.
    start_time: float = 0.0
    first_time: float | None = None
    last_time: float = 0.0

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.pieces)

    def add(self, output: RequestOutput) -> None:
        """Append what one step has added."""
        self.pieces.append(output.text)
        self.num_prompt_tokens = output.num_prompt_tokens
        self.num_cached_tokens = output.num_cached_tokens
        self.num_output_tokens = output.num_output_tokens
        self.finish_reason = output.finish_reason
        self.stop_string = output.stop_string
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        self.start_time, self.last_time = output.start_time, output.time
        if self.first_time is None:
            self.first_time = output.time

    def take_tokens(self) -> tuple[list[int], list[TokenLogprobs]]:
        """Return the tokens that have come since this was called before, and what is known of them."""
        taken = self.token_ids, self.logprobs
        self.token_ids, self.logprobs = [], []
        return taken


def make_prompt(
    body: CompletionsRequest,
    token_ids: list[int],
    max_tokens: int | None,
    max_model_len: int,
    param: str,
    skipped_token_ids: frozenset[int] | None = None,
    grammar: Grammar | None = None,
) -> Prompt:
    """Join a prompt and the request's sampling fields.

    Args:
        body: The request.
        token_ids: The prompt's tokens.
        max_tokens: Most tokens to generate, cut to the room that the prompt leaves; None takes all of it.
        max_model_len: Most tokens of prompt and answer together.
        param: The field that the prompt came from.
        skipped_token_ids: Tokens that have no text; None stands for all special tokens.
        grammar: What the answer must look like.

    Raises:
        ApiError: The prompt has no tokens or leaves no room for an answer (400).
    """
    room = max_model_len - len(token_ids)
    min_tokens = body.min_tokens or 0
    if not token_ids:
        raise invalid_request(f"Invalid '{param}': the prompt has no tokens.", param, "invalid_value")
    if room < 1:
        raise ApiError(
            400,
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt has "
            f"{len(token_ids)} tokens, which leaves no room for an answer. Please shorten the prompt.",
            param=param,
            code="context_length_exceeded",
            lengths=(len(token_ids), max_model_len),
        )
    if max_tokens is not None and min_tokens > max_tokens:
        message = f"Invalid 'min_tokens': {min_tokens} is more than max_tokens, which is {max_tokens}."
        raise invalid_request(message, "min_tokens", "invalid_value")
    sampling_params = SamplingParams(
        max_tokens=room if max_tokens is None else min(max_tokens, room),
        n=body.n or 1,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=body.seed,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=tuple((int(token_id), bias) for token_id, bias in (body.logit_bias or {}).items()),
        min_tokens=min(min_tokens, room),
        stop=body.stop_strings,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        logprobs=body.num_logprobs,
        prompt_logprobs=body.num_prompt_logprobs,
        reports_progress=bool(body.stream and body.return_progress),
        skipped_token_ids=skipped_token_ids,
        grammar=grammar,
    )
    return Prompt(token_ids, sampling_params, body.cache_salt or "")


def check_vocabulary(body: GenerationRequest, vocab_size: int) -> None:
    """Check that the model has the tokens that a request names, but for its prompts.

    Raises:
        ApiError: It lacks one (400).
    """
    check_token_ids(body.stop_token_ids or (), vocab_size, "stop_token_ids")
    check_token_ids([int(token_id) for token_id in body.logit_bias or ()], vocab_size, "logit_bias")


def generate(model_manager: ModelManager, prompts: Sequence[Prompt], request_id: str) -> Outputs:
    """Generate the answers of all prompts at once; closing this generator aborts what is unfinished.

    Yields:
        An answer's index and what a step adds to it.

    Raises:
        ApiError: Too many requests wait already; raised by this call itself (429).
        RequestFailedError: One of the answers could not be finished.
        EngineDeadError: The engine has ended.
    """
    limit = model_manager.config.max_num_queued_requests
    if limit is not None and model_manager.num_queued >= limit:
        model_manager.metrics.refused()
        raise queue_full()
    # From here on they are in the queue, so that all that come at the same moment find the limit.
    requests = [
        model_manager.engine.generate(
            prompt.token_ids,
            prompt.sampling_params,
            request_id if len(prompts) == 1 else f"{request_id}-{index}",
            prompt.cache_salt,
        )
        for index, prompt in enumerate(prompts)
    ]
    return _join(requests, prompts[0].sampling_params.n)


async def _join(requests: list[AsyncGenerator[RequestOutput, None]], num_choices: int) -> Outputs:
    if len(requests) == 1:  # nearly always, and then nothing has to be joined
        async with aclosing(requests[0]) as request:
            async for addition in request:
                yield addition.choice_index, addition
        return
    outputs: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue()

    async def pump(first: int, request: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async with aclosing(request):
                async for output in request:
                    outputs.put_nowait((first + output.choice_index, output))
        except Exception as error:
            outputs.put_nowait((first, error))

    tasks = [
        asyncio.create_task(pump(index * num_choices, request)) for index, request in enumerate(requests)
    ]
    num_unfinished = len(requests) * num_choices
    try:
        while num_unfinished:
            index, output = await outputs.get()
            if isinstance(output, Exception):
                raise output
            if output.finish_reason is not None:
                num_unfinished -= 1
            yield index, output
    finally:
        for task in tasks:
            task.cancel()


async def collect(outputs: Outputs, answers: Sequence[Answer], http_request: Request) -> None:
    """Fill all answers, as long as the client waits.

    Raises:
        ClientDisconnect: The client has left; the requests are aborted.
    """

    async def read() -> None:
        async with aclosing(outputs):
            async for index, output in outputs:
                answers[index].add(output)

    await while_client_waits(read(), http_request)


async def while_client_waits(work: Coroutine[None, None, None], http_request: Request) -> None:
    """Do something as long as the client waits for it.

    Nothing cancels the function that answers a request when its client leaves, so this waits for both.

    Raises:
        ClientDisconnect: The client has left; the work is cancelled.
    """

    async def wait_for_disconnect() -> None:
        while (await http_request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    leaving = asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        working.cancel()
        leaving.cancel()


def count_usage(answers: Sequence[Answer], num_choices: int) -> CompletionUsage:
    """Return the tokens of all answers and their prompts; a prompt counts once, with all its answers."""
    firsts = answers[::num_choices]
    num_prompt_tokens = sum(answer.num_prompt_tokens for answer in firsts)
    num_output_tokens = sum(answer.num_output_tokens for answer in answers)
    return CompletionUsage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_output_tokens,
        total_tokens=num_prompt_tokens + num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(answer.num_cached_tokens for answer in firsts)
        ),
    )


def chunk_writer(
    template: BaseModel, body: CompletionsRequest, answers: Sequence[Answer], num_choices: int
) -> Callable[..., str]:
    """Return what gives a template choices and other fields and makes it JSON.

    With usage and timings so far, if they are wanted. Without, most chunks differ in their choices only, and
    only these have to be written.
    """
    head, tail = format_chunk(template, body.include_usage).split(NO_CHOICES)
    are_told_on_the_way = body.continuous_usage or body.timings_per_token

    def write(choices: Sequence[BaseModel] = (), **fields: object) -> str:
        if not (fields or are_told_on_the_way):
            return f'{head}"choices":[{",".join(choice.model_dump_json() for choice in choices)}]{tail}'
        usage = count_usage(answers, num_choices) if body.continuous_usage else None
        timings = measure_timings(answers, num_choices) if body.timings_per_token else None
        fields = {"choices": [*choices], "usage": usage, "timings": timings, **fields}
        return format_chunk(template, body.include_usage, **fields)

    return write
