"""How fast an answer comes and how far its prompt has been read, as llama.cpp tells it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from turboquant_server.api.response_models import PromptProgress, Timings

if TYPE_CHECKING:
    from turboquant_server.api.generation import Answer
    from turboquant_server.engine.request import RequestOutput


def measure_timings(answers: Sequence[Answer], num_choices: int) -> Timings | None:
    """Return what has become of all answers together so far; None before the first token.

    A prompt's time goes from the first step on it, after the queue, to the first token.

    Args:
        answers: To each prompt, one prompt after another.
        num_choices: Of each prompt.
    """
    started = [answer for answer in answers if answer.first_time is not None]
    if not started:
        return None
    prompts = [answer for answer in answers[::num_choices] if answer.first_time is not None]
    first_times = [answer.first_time or 0.0 for answer in prompts]
    cache_n = sum(answer.num_cached_tokens for answer in prompts)
    prompt_n = sum(answer.num_prompt_tokens for answer in prompts) - cache_n
    prompt_ms = 1000 * (max(first_times) - min(answer.start_time for answer in prompts))
    predicted_n = sum(answer.num_output_tokens for answer in started)
    predicted_ms = 1000 * (max(answer.last_time for answer in started) - min(first_times))
    return Timings(
        cache_n=cache_n,
        prompt_n=prompt_n,
        prompt_ms=prompt_ms,
        prompt_per_token_ms=_divide(prompt_ms, prompt_n),
        prompt_per_second=_divide(1000 * prompt_n, prompt_ms),
        predicted_n=predicted_n,
        predicted_ms=predicted_ms,
        predicted_per_token_ms=_divide(predicted_ms, predicted_n),
        predicted_per_second=_divide(1000 * predicted_n, predicted_ms),
    )


def prompt_progress(output: RequestOutput) -> PromptProgress | None:
    """Return how far the prompt has been read; None if the output is of the answer."""
    if not output.num_computed_tokens:
        return None
    return PromptProgress(
        total=output.num_prompt_tokens,
        cache=output.num_cached_tokens,
        processed=output.num_computed_tokens,
        time_ms=round(1000 * (output.time - output.start_time)),
    )


def _divide(dividend: float, divisor: float) -> float:
    return dividend / divisor if divisor else 0.0
