"""How one request wants its tokens chosen and when it wants to stop. Knows nothing about HTTP or models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turboquant_server.engine.grammar import Grammar

# Log-probabilities of so many of the likeliest tokens can be asked for.
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """Hold what one request asks of the sampler and of the stop conditions.

    Attributes:
        max_tokens: Most tokens to generate, at least 1.
        n: Number of answers, at least 1.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Keep the smallest set of most likely tokens whose probability reaches this, in (0, 1].
        top_k: Keep this many most likely tokens; 0 keeps all.
        min_p: Keep the tokens whose probability is at least this share of the likeliest one's, in [0, 1].
        seed: Makes the tokens reproducible, whatever runs beside the request; None draws a fresh seed.
        frequency_penalty: Taken from the logit of a token as often as the answer has it.
        presence_penalty: Taken from the logits of the tokens that the answer has.
        repetition_penalty: Divides positive and multiplies negative logits of the tokens that the prompt or
            the answer has; above 0, and 1 changes nothing.
        logit_bias: Tokens and what is added to their logits.
        min_tokens: So many tokens are generated before any that would end the answer.
        stop: Texts that end the generation; they are not part of the output.
        stop_token_ids: Tokens that end the generation, besides the model's end-of-sequence tokens.
        include_stop: Let the text that ends the answer be part of it.
        ignore_eos: Go on after the model's end-of-sequence tokens.
        skipped_token_ids: Tokens that have no text; None stands for all special tokens.
        grammar: What the answer must look like; it ends where the grammar does, whatever ignore_eos says.
        logprobs: Report the log-probability of each token and so many of the likeliest ones'; None reports
            nothing.
        prompt_logprobs: The same for the prompt's tokens, all of which are computed then.
        reports_progress: Report how much of the prompt each step has read.
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    skipped_token_ids: frozenset[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    reports_progress: bool = False
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: A value is out of its range.
        """
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be greater than 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be a finite number that is not negative, got {self.temperature}"
            )
        for name in ("frequency_penalty", "presence_penalty"):
            if not abs(getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be a finite number above 0, got {self.repetition_penalty}"
            )
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens must be from 0 to max_tokens, got {self.min_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise ValueError(f"{name} must be from 0 to {MAX_LOGPROBS}, got {count}")
        if any(not text for text in self.stop):
            raise ValueError("a stop string must not be empty")

    @cached_property
    def is_plain(self) -> bool:
        """Tell whether tokens are drawn from the model's own logits, and nothing but they is wanted."""
        return not self.adjusts_logits and self.grammar is None and self.logprobs is None

    @cached_property
    def has_penalties(self) -> bool:
        """Tell whether logits depend on how often tokens have been used."""
        return (self.frequency_penalty, self.presence_penalty, self.repetition_penalty) != (0, 0, 1)

    @cached_property
    def adjusts_logits(self) -> bool:
        """Tell whether the logits are changed before a token is chosen."""
        return self.has_penalties or bool(self.logit_bias) or self.min_tokens > 0
