"""What a request asks to be told of the tokens of its prompt, in vLLM's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turboquant_server.api.generation_request import CompletionsRequest
    from turboquant_server.api.prompts import PromptTokenizer
    from turboquant_server.api.response_models import PromptLogprob, PromptLogprobs
    from turboquant_server.engine.logprobs import TokenLogprobs


async def report_prompt(
    body: CompletionsRequest,
    prompt_tokenizer: PromptTokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
) -> PromptLogprobs | None:
    """Return how likely the tokens of a prompt were, if that was asked for.

    Args:
        body: The request.
        prompt_tokenizer: Knows what tokens stand for.
        token_ids: The prompt.
        logprobs: Of each of its tokens, with at least as many of the likeliest as are asked for.
    """
    num_top = body.prompt_logprobs
    if num_top is None:
        return None
    top = [token_id for token in logprobs if token for token_id, _ in token.top[:num_top]]
    spellings = await prompt_tokenizer.spell([*token_ids, *top])

    def tell(token_id: int, token: TokenLogprobs) -> dict[int, PromptLogprob]:
        likeliest = ((*item, rank) for rank, item in enumerate(token.top[:num_top], 1))
        return {
            other: {"logprob": logprob, "rank": rank, "decoded_token": spellings[other].text}
            for other, logprob, rank in (*likeliest, (token_id, token.logprob, token.rank))
        }

    return [
        None if token is None else tell(token_id, token)
        for token_id, token in zip(token_ids, logprobs, strict=True)
    ]
