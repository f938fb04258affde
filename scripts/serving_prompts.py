"""Prompts of a wished number of tokens for a server whose tokenizer is not at hand. Knows no times."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from serving_client import Ask

# Short and common: a token each in most vocabularies, behind a space.
SOME_TEXT = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work number night point home water room mother area
money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car
"""
WORDS = SOME_TEXT.split()


@dataclass(frozen=True)
class PromptMaker:
    """Make prompts with about a wished number of tokens.

    Attributes:
        tokens_per_word: Mean over `WORDS`.
        extra_tokens: What the server puts around the words: a start, a chat's template.
    """

    tokens_per_word: float = 1.0
    extra_tokens: float = 0.0

    @classmethod
    async def calibrate(cls, ask: Ask) -> PromptMaker | None:
        """Ask the server how many tokens all the words have; None if it does not tell.

        Raises:
            ServerError: The server does not answer.
        """
        # In another order the second time: some servers count only what they do not find in their cache.
        once = (await ask(" ".join(WORDS), 1)).prompt_tokens
        twice = (await ask(" ".join(2 * WORDS[::-1]), 1)).prompt_tokens
        if once is None or twice is None or twice <= once:
            return None
        return cls((twice - once) / len(WORDS), 2 * once - twice)

    def prompts(self, generator: random.Random, lengths: Sequence[int], shared_tokens: int) -> list[str]:
        """Return a prompt for each number of tokens; so many tokens at their start are the same."""
        shared = generator.choices(WORDS, k=round(shared_tokens / self.tokens_per_word))
        counts = [round((length - self.extra_tokens) / self.tokens_per_word) for length in lengths]
        return [
            " ".join(shared + generator.choices(WORDS, k=max(1, count - len(shared)))) for count in counts
        ]
