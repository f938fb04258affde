"""What a request asks to be told of each token, in the shapes of the two endpoints. Knows no text."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from turboquant_server.api.generation_request import GenerationRequest
from turboquant_server.api.response_models import ChoiceLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from turboquant_server.api.generation import Answer
    from turboquant_server.api.prompts import PromptTokenizer
    from turboquant_server.api.spelling import Spelling
    from turboquant_server.engine.logprobs import TokenLogprobs


class TokenReport:
    """Tell of the tokens of one answer: their ids, their log-probabilities, or nothing.

    Args:
        body: Says what is wanted.
        prompt_tokenizer: Knows what tokens stand for.
    """

    def __init__(self, body: GenerationRequest, prompt_tokenizer: PromptTokenizer) -> None:
        self._has_logprobs = body.num_logprobs is not None
        self._has_token_ids = bool(body.return_token_ids)
        self._prompt_tokenizer = prompt_tokenizer

    async def take(self, answer: Answer) -> dict[str, Any]:
        """Return what is to be told of the tokens that are new, as fields of a choice."""
        if not (self._has_logprobs or self._has_token_ids):
            return {}
        token_ids, logprobs = answer.take_tokens()
        if not token_ids:
            return {}
        fields: dict[str, Any] = {}
        if self._has_token_ids:
            fields["token_ids"] = token_ids
        if self._has_logprobs:
            top = [token_id for token in logprobs for token_id, _ in token.top]
            spellings = await self._prompt_tokenizer.spell([*token_ids, *top])
            fields["logprobs"] = self._shape(token_ids, logprobs, spellings)
        return fields

    def _shape(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        spellings: Mapping[int, Spelling],
    ) -> ChoiceLogprobs | CompletionLogprobs:
        raise NotImplementedError


class ChatTokenReport(TokenReport):
    """Tell it as chat completions do."""

    def _shape(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        spellings: Mapping[int, Spelling],
    ) -> ChoiceLogprobs:
        def fields(token_id: int, logprob: float) -> dict[str, Any]:
            spelling = spellings[token_id]
            return {"token": spelling.text, "logprob": logprob, "bytes": list(spelling.bytes)}

        return ChoiceLogprobs(
            content=[
                TokenLogprob(
                    **fields(token_id, token.logprob),
                    top_logprobs=[TopLogprob(**fields(*top)) for top in token.top],
                )
                for token_id, token in zip(token_ids, logprobs, strict=True)
            ]
        )


class CompletionTokenReport(TokenReport):
    """Tell it as plain completions do.

    Args:
        body: Says what is wanted.
        prompt_tokenizer: Knows what tokens stand for.
    """

    def __init__(self, body: GenerationRequest, prompt_tokenizer: PromptTokenizer) -> None:
        super().__init__(body, prompt_tokenizer)
        self._decoder = getincrementaldecoder("utf-8")(errors="replace")
        self._text_offset = 0

    async def take_prompt(
        self, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], num_top: int
    ) -> CompletionLogprobs:
        """Return what is told of a prompt that the answer's text begins with; to be called before `take`.

        Args:
            text: The prompt, as it comes back.
            token_ids: Its tokens.
            logprobs: Of each token; None for the first.
            num_top: How many of the likeliest tokens to report beside each.
        """
        top = [token_id for token in logprobs if token for token_id, _ in token.top[:num_top]]
        spellings = await self._prompt_tokenizer.spell([*token_ids, *top])
        told = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        decoder = getincrementaldecoder("utf-8")(errors="replace")
        offset = 0
        for token_id, token in zip(token_ids, logprobs, strict=True):
            spelling = spellings[token_id]
            told.tokens.append(spelling.unique_text)
            told.token_logprobs.append(None if token is None else token.logprob)
            told.top_logprobs.append(
                None if token is None else _name_top(token_id, token, num_top, spellings)
            )
            told.text_offset.append(offset)
            piece = decoder.decode(spelling.bytes)
            # Tokens that the tokenizer has added are not in the text, nor is a space before its first word.
            if not text.startswith(piece, offset):
                piece = "" if spelling.is_special else piece.removeprefix(" ")
            offset = min(offset + len(piece), len(text))
        self._text_offset = len(text)
        return told

    def _shape(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        spellings: Mapping[int, Spelling],
    ) -> CompletionLogprobs:
        report = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token_id, token in zip(token_ids, logprobs, strict=True):
            spelling = spellings[token_id]
            report.tokens.append(spelling.unique_text)
            report.token_logprobs.append(token.logprob)
            report.top_logprobs.append(_name_top(token_id, token, len(token.top), spellings))
            report.text_offset.append(self._text_offset)
            if not spelling.is_special:
                self._text_offset += len(self._decoder.decode(spelling.bytes))
        return report


def _name_top(
    token_id: int, token: TokenLogprobs, num_top: int, spellings: Mapping[int, Spelling]
) -> dict[str, float]:
    """Return the likeliest tokens at a place, and the one that came, by their texts."""
    top = {spellings[top_id].unique_text: logprob for top_id, logprob in reversed(token.top[:num_top])}
    # Of several tokens of one text the likeliest counts, but for the one that came.
    return dict(reversed(top.items())) | {spellings[token_id].unique_text: token.logprob}
