"""What chat and plain completions share between the request's fields and the response's shape."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from starlette.requests import ClientDisconnect, Request

from turboquant_server.api.errors import invalid_request, queue_full
from turboquant_server.api.protocol import CompletionUsage, GenerationRequest, PromptTokensDetails
from turboquant_server.engine.request import FinishReason, RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from turboquant_server.model_manager import ModelManager

# The index of an answer and what a step adds to it. Each prompt has `n` answers, one after another.
Outputs: TypeAlias = AsyncGenerator[tuple[int, RequestOutput], None]


@dataclass(frozen=True)
class Prompt:
    """What one prompt of a request asks of the engine."""

    token_ids: list[int]
    sampling_params: SamplingParams
    cache_salt: str


@dataclass
class Answer:
    """What the engine has generated for one choice so far."""

    text: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    finish_reason: FinishReason | None = None

    def add(self, output: RequestOutput) -> None:
        """Append what one step has added."""
        self.text += output.text
        self.num_prompt_tokens = output.num_prompt_tokens
        self.num_cached_tokens = output.num_cached_tokens
        self.num_output_tokens = output.num_output_tokens
        self.finish_reason = output.finish_reason


def make_prompt(
    body: GenerationRequest, token_ids: list[int], max_tokens: int | None, max_model_len: int, param: str
) -> Prompt:
    """Join a prompt and the request's sampling fields.

    Args:
        body: The request.
        token_ids: The prompt's tokens.
        max_tokens: Most tokens to generate, cut to the room that the prompt leaves; None takes all of it.
        max_model_len: Most tokens of prompt and answer together.
        param: The field that the prompt came from.

    Raises:
        ApiError: The prompt has no tokens or leaves no room for an answer (400).
    """
    room = max_model_len - len(token_ids)
    if not token_ids:
        raise invalid_request(f"Invalid '{param}': the prompt has no tokens.", param, "invalid_value")
    if room < 1:
        raise invalid_request(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt has "
            f"{len(token_ids)} tokens, which leaves no room for an answer. Please shorten the prompt.",
            param,
            "context_length_exceeded",
        )
    sampling_params = SamplingParams(
        max_tokens=room if max_tokens is None else min(max_tokens, room),
        n=body.n or 1,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        seed=body.seed,
        stop=body.stop_strings,
        ignore_eos=bool(body.ignore_eos),
    )
    return Prompt(token_ids, sampling_params, body.cache_salt or "")


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


async def collect(outputs: Outputs, num_answers: int, http_request: Request) -> list[Answer]:
    """Wait for all answers, as long as the client does.

    Nothing cancels the function that answers a request when its client leaves, so this waits for both.

    Raises:
        ClientDisconnect: The client has left; the requests are aborted.
    """
    answers = [Answer() for _ in range(num_answers)]

    async def read() -> None:
        async with aclosing(outputs):
            async for index, output in outputs:
                answers[index].add(output)

    async def wait_for_disconnect() -> None:
        while (await http_request.receive())["type"] != "http.disconnect":
            pass

    reading = asyncio.create_task(read())
    leaving = asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ClientDisconnect
        reading.result()
    finally:
        reading.cancel()
        leaving.cancel()
    return answers


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
