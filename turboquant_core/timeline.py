"""Timeline: which tokens of a request a query sees compressed, and where its computation may be cut.

Knows positions and counts only: no tensor, no block id, no other request.

    position    0 ..  sinks  ..  4 + 512     ..    4 + 1024     ..   prompt's end   .. generated tokens
    cut at                       |                 |                 |              | every 64

A prompt is computed in chunks that end at fixed segment boundaries, and a query reads what lies before its
chunk from blocks, but for the sinks. So what a prompt's token sees does not depend on how many requests run
beside it, or on how much of the prompt was found in the cache. A generated token sees the newest
`residual_length` to ``residual_length + 63`` tokens before it uncompressed, whether it is being generated or,
after a preemption, computed again; there the cuts are where that number changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from turboquant_core.config import BLOCK_SIZE


@dataclass(frozen=True)
class Timeline:
    """Hold the three lengths that cut a request.

    Attributes:
        num_sinks: First tokens that are never compressed; block i holds the 64 tokens after
            ``num_sinks + 64 * i``.
        residual_length: Newest tokens that a generated token sees uncompressed, at least.
        segment_size: Tokens between a prompt's cuts.

    Raises:
        ValueError: A length is no multiple of the block size.
    """

    num_sinks: int = 4
    residual_length: int = 128
    segment_size: int = 512

    def __post_init__(self) -> None:
        for name in ("residual_length", "segment_size"):
            length = getattr(self, name)
            if length < 0 or length % BLOCK_SIZE or not self.segment_size:
                raise ValueError(f"{name} must be a multiple of {BLOCK_SIZE}, got {length}")

    @property
    def ring_size(self) -> int:
        """Uncompressed tokens that a request has room for: those that a block has yet to be made of."""
        return self.residual_length + BLOCK_SIZE

    @property
    def num_exact(self) -> int:
        """Tokens that a slot has room for: the sinks and the ring."""
        return self.num_sinks + self.ring_size

    def exact_index(self, position: int) -> int:
        """Return where in its request's slot a token lies: first the sinks, then the ring."""
        if position < self.num_sinks:
            return position
        return self.num_sinks + (position - self.num_sinks) % self.ring_size

    def num_visible_blocks(self, position: int, num_prompt_tokens: int) -> int:
        """Return how many of the first blocks a query at `position` reads, windows aside."""
        if position < num_prompt_tokens:
            return self._last_cut(position, num_prompt_tokens) // BLOCK_SIZE
        return self._num_settled(position) // BLOCK_SIZE

    def chunk_end(self, position: int, num_prompt_tokens: int) -> int:
        """Return where a chunk that starts at `position` ends at the latest."""
        if position >= num_prompt_tokens:
            return position + BLOCK_SIZE - (position - self.num_sinks) % BLOCK_SIZE
        next_cut = self._last_cut(position, num_prompt_tokens) + self.segment_size
        if next_cut > self._last_cut(num_prompt_tokens, num_prompt_tokens):
            return num_prompt_tokens
        return self.num_sinks + next_cut

    def cut(self, num_tokens: int, num_prompt_tokens: int) -> Iterator[tuple[int, int]]:
        """Yield where each chunk of a request's first `num_tokens` tokens starts and ends."""
        start = 0
        while start < num_tokens:
            end = min(self.chunk_end(start, num_prompt_tokens), num_tokens)
            yield start, end
            start = end

    def num_blocks(self, num_tokens: int, num_prompt_tokens: int) -> int:
        """Return how many blocks are made of the first `num_tokens` tokens once they are computed."""
        last_cut = self._last_cut(num_tokens, num_prompt_tokens)
        return max(last_cut, self._num_settled(num_tokens)) // BLOCK_SIZE

    def num_reusable_blocks(self, num_prompt_tokens: int) -> int:
        """Return how many blocks of a prompt may come from the cache: those before its last chunk."""
        return self._last_cut(num_prompt_tokens, num_prompt_tokens) // BLOCK_SIZE

    def _last_cut(self, position: int, num_prompt_tokens: int) -> int:
        """Return the last cut of a prompt up to `position`, counted from the end of the sinks."""
        limit = min(position, num_prompt_tokens - max(1, self.residual_length))
        return max(0, limit - self.num_sinks) // self.segment_size * self.segment_size

    def _num_settled(self, num_tokens: int) -> int:
        """Return how many tokens lie between the sinks and the residual of the newest."""
        return max(0, num_tokens - self.num_sinks - self.residual_length)
