"""How one request wants its tokens chosen and when it wants to stop. Knows nothing about HTTP or models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Hold what one request asks of the sampler and of the stop conditions.

    Attributes:
        max_tokens: Most tokens to generate, at least 1.
        n: Number of answers, at least 1.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Keep the smallest set of most likely tokens whose probability reaches this, in (0, 1].
        top_k: Keep this many most likely tokens; 0 keeps all.
        seed: Makes the tokens reproducible, whatever runs beside the request; None draws a fresh seed.
        stop: Texts that end the generation; they are not part of the output.
        ignore_eos: Go on after the model's end-of-sequence tokens.
    """

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: A value is out of its range.
        """
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be a finite number that is not negative, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be greater than 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if any(not text for text in self.stop):
            raise ValueError("a stop string must not be empty")
