"""Tokens to text, one token at a time: whole characters, nothing of a stop string. Knows no model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from turboquant_server.partial_match import count_begun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT_CHARACTER = "\ufffd"
# Some decoders strip the space before a text's first word; a few tokens of context keep it.
NUM_CONTEXT_TOKENS = 5
# An unfinished character takes a few tokens; a longer run is no text, and waiting for its end would take
# quadratic time.
MAX_HELD_TOKENS = 64


class Detokenizer:
    """Turn one request's tokens into pieces of text; all pieces together are the text of the answer.

    A piece is held back while it ends in an unfinished UTF-8 sequence, or in what may become a stop string.
    Special tokens have no text, or other tokens do not. Of several stop strings the one that is complete
    first ends the text, the longest of those that are complete at the same character; so the text does not
    depend on how it is cut into tokens.

    Args:
        tokenizer: The model's tokenizer.
        prompt_token_ids: What the answer continues.
        stop: Texts that end the answer and are no part of it.
        skipped_token_ids: Tokens that have no text; None stands for all special tokens.
        include_stop: The one that ends it is part of it after all.
        min_tokens: No stop string is looked for in the text of so many tokens.

    Attributes:
        stop_string: The stop string that was found; no text comes after it. None before.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_token_ids: Sequence[int],
        stop: tuple[str, ...] = (),
        skipped_token_ids: frozenset[int] | None = None,
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.stop_string: str | None = None
        self._decode_tokens = _decoder(tokenizer)
        self._stop = stop
        self._include_stop = include_stop
        self._num_unwatched_tokens = min_tokens
        self._skipped_token_ids = skipped_token_ids
        # Decoded and given out; kept because the tokens after them may decode differently without them.
        self._context = list(prompt_token_ids[-NUM_CONTEXT_TOKENS:])
        self._context_text: str | None = None  # decoded with the first token: decoding may fail
        self._held_tokens: list[int] = []
        self._held_text = ""

    @property
    def stopped(self) -> bool:
        """Tell whether a stop string was found."""
        return self.stop_string is not None

    def append(self, token_id: int) -> str:
        """Take one token and return the text that is certain now, often none."""
        self._held_tokens.append(token_id)
        if self._num_unwatched_tokens >= 0:
            self._num_unwatched_tokens -= 1
        text = self._decode(self._context + self._held_tokens)
        if text.endswith(REPLACEMENT_CHARACTER) and len(self._held_tokens) < MAX_HELD_TOKENS:
            return ""
        return self._release(text)

    def flush(self) -> str:
        """Return what was held back; what is left of an unfinished character is left out."""
        text = self._decode(self._context + self._held_tokens).rstrip(REPLACEMENT_CHARACTER)
        piece = self._release(text) + self._held_text
        self._held_text = ""
        return piece

    def _release(self, text: str) -> str:
        """Return the part of ``text`` that is new and cannot belong to a stop string."""
        if self._context_text is None:
            self._context_text = self._decode(self._context)
        new_text = text[len(self._context_text) :]
        if new_text:
            self._context, self._held_tokens = self._held_tokens, []
            self._context_text = self._decode(self._context)
        elif len(self._held_tokens) >= MAX_HELD_TOKENS:
            self._held_tokens = []
        if self.stopped:
            return ""
        if self._num_unwatched_tokens >= 0 or not self._stop:
            return new_text
        piece = self._held_text + new_text
        matches = [(start + len(stop), start) for stop in self._stop if (start := piece.find(stop)) >= 0]
        if matches:
            self._held_text = ""
            end, start = min(matches)
            self.stop_string = piece[start:end]
            return piece[: end if self._include_stop else start]
        num_certain = len(piece) - count_begun(piece, self._stop)
        self._held_text = piece[num_certain:]
        return piece[:num_certain]

    def _decode(self, token_ids: list[int]) -> str:
        skipped = self._skipped_token_ids
        if skipped is not None:
            token_ids = [token_id for token_id in token_ids if token_id not in skipped]
        return str(self._decode_tokens(token_ids, skip_special_tokens=skipped is None))


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[..., object]:
    """Return what turns tokens into text as they are, spaces included.

    What transformers wraps around the tokenizers library's own function takes three times as long as that.
    """
    kind = type(tokenizer)
    if (kind.decode, getattr(kind, "_decode", None)) == (
        PreTrainedTokenizerFast.decode,
        PreTrainedTokenizerFast._decode,
    ):
        decode: Callable[..., str] = tokenizer.backend_tokenizer.decode
        return decode
    return functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
