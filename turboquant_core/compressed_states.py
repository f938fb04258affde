"""The keys, or the values, of one layer: the first tokens as they came, quantized blocks, the newest tokens.

Knows how tokens move between the three; knows neither transformers nor how a block is quantized.

    tokens, oldest first:   [ sinks         | block 0 | block 1 | ... | block n-1 | residual                 ]
    held as:                  model's dtype   codes, norms, means                   model's dtype
    tokens:                   num_sinks       64 each                               residual_length .. + 63
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from turboquant_core.block_quantizer import BlockQuantizer, QuantizedBlocks
from turboquant_core.config import BLOCK_SIZE


class CompressedStates:
    """The keys, or the values, of one layer; what it holds carries no gradient.

    Args:
        states: Tokens to come, ``[batch, num_kv_heads, num_tokens, head_dim]``; only shape and dtype count.
        quantizer: Of the blocks.
        residual_length: Number of newest tokens that always stay as they came.
        num_sinks: Number of first tokens that do.

    Attributes:
        sinks: The first tokens, ``[batch, num_kv_heads, num_tokens, head_dim]`` in the model's dtype.
        blocks: Those after them; each tensor is ``[batch, num_kv_heads, num_blocks, ...]``.
        residual: The newest tokens, of the kind of `sinks`.
    """

    def __init__(
        self, states: Tensor, quantizer: BlockQuantizer, *, residual_length: int, num_sinks: int
    ) -> None:
        self._quantizer = quantizer
        self._residual_length = residual_length
        self._num_sinks = num_sinks
        self.sinks = self.residual = _own(states[:, :, :0].detach())
        self.blocks = quantizer.quantize(states.new_empty(*states.shape[:2], 0, BLOCK_SIZE, states.shape[-1]))

    @property
    def num_blocks(self) -> int:
        """Blocks held."""
        return self.blocks.norms.shape[2]

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self._end_of_blocks + self.residual.shape[2]

    @property
    def _end_of_blocks(self) -> int:
        return self.sinks.shape[2] + self.num_blocks * BLOCK_SIZE

    def append(self, states: Tensor, window: int | None = None) -> Tensor:
        """Take new tokens in and return every token held, the new ones exact and last.

        Args:
            states: New tokens, ``[batch, num_kv_heads, num_tokens, head_dim]``.
            window: Afterwards forget what is older than the newest `window` tokens, see `trim`.

        Returns:
            ``[batch, num_kv_heads, num_held_before + num_tokens, head_dim]`` in the dtype of `states`.

        Raises:
            ValueError: If batch, heads or head_dim are not those of the tokens held.
        """
        full = self._join(states)
        if self.sinks.shape[2] < self._num_sinks:  # then no token is elsewhere
            self.sinks = _own(full[:, :, : self._num_sinks].detach())
        self._settle(full[:, :, self._end_of_blocks :].detach(), window)
        return full

    def trim(self, window: int) -> None:
        """Forget what is older than the newest `window` tokens; up to 63 more stay, as blocks leave whole."""
        self._settle(self.residual, window)

    def crop(self, num_tokens: int) -> None:
        """Remove the newest `num_tokens`; what is left of a block goes back to the residual, dequantized."""
        num_left = self.num_tokens - num_tokens
        if num_left >= self._end_of_blocks:
            self.residual = _own(self.residual[:, :, : num_left - self._end_of_blocks])
            return
        self.sinks = _own(self.sinks[:, :, :num_left])
        num_blocks, rest = divmod(num_left - self.sinks.shape[2], BLOCK_SIZE)
        if self.num_blocks == 0:
            self.residual = _own(self.residual[:, :, :0])
            return
        block = _slice_blocks(self.blocks, num_blocks, num_blocks + 1)
        self.residual = _own(self._quantizer.dequantize(block, self.residual.dtype)[:, :, 0, :rest])
        self.blocks = _map_blocks(_own, _slice_blocks(self.blocks, 0, num_blocks))

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by what `function` makes of it (another device, another order of the batch)."""
        self.sinks = function(self.sinks)
        self.residual = function(self.residual)
        self.blocks = _map_blocks(function, self.blocks)

    def _join(self, states: Tensor) -> Tensor:
        """Return ``[sinks, blocks, residual, states]`` along the tokens, each written into one tensor."""
        held = (*self.residual.shape[:2], self.residual.shape[3])
        if (*states.shape[:2], states.shape[3]) != held:
            raise ValueError(
                f"the cache holds [batch, num_kv_heads, head_dim] = {list(held)} and the new tokens have "
                f"{[*states.shape[:2], states.shape[3]]}: use a new cache, or reset() this one"
            )
        if self.num_tokens == 0:
            return states
        num_sinks = self.sinks.shape[2]
        full = states.new_empty(*states.shape[:2], self.num_tokens + states.shape[2], states.shape[3])
        for start, stop in self._pieces(self.num_blocks):
            tokens = self._quantizer.dequantize(_slice_blocks(self.blocks, start, stop), full.dtype)
            full[:, :, num_sinks + start * BLOCK_SIZE : num_sinks + stop * BLOCK_SIZE] = tokens.flatten(2, 3)
        full[:, :, :num_sinks] = self.sinks
        full[:, :, self._end_of_blocks : self.num_tokens] = self.residual
        full[:, :, self.num_tokens :] = states
        return full

    def _settle(self, tail: Tensor, window: int | None) -> None:
        """Make `tail` the residual, after old tokens have been forgotten and whole blocks have left it."""
        excess = 0 if window is None else self.num_blocks * BLOCK_SIZE + tail.shape[2] - window
        if excess > 0:
            num_forgotten = min(excess // BLOCK_SIZE, self.num_blocks)
            if num_forgotten:
                self.blocks = _map_blocks(_own, _slice_blocks(self.blocks, num_forgotten, self.num_blocks))
            if self.num_blocks == 0:
                tail = tail[:, :, excess - num_forgotten * BLOCK_SIZE :]
        num_leaving = max(0, tail.shape[2] - self._residual_length) // BLOCK_SIZE
        if num_leaving:
            leaving, tail = tail.tensor_split([num_leaving * BLOCK_SIZE], dim=2)
            leaving = leaving.view(*leaving.shape[:2], num_leaving, BLOCK_SIZE, -1)
            new = [self._quantizer.quantize(leaving[:, :, a:b]) for a, b in self._pieces(num_leaving)]
            parts = zip(self.blocks, *new, strict=True)
            self.blocks = QuantizedBlocks(*(torch.cat(part, 2) for part in parts))
        if tail is not self.residual:
            self.residual = _own(tail)

    def _pieces(self, num_blocks: int) -> Iterator[tuple[int, int]]:
        """Cut a range of blocks into pieces that bound the memory of the quantizer's temporaries.

        On a CPU they then stay in the L2 cache, which makes a step on 16,000 tokens 15% faster; a GPU wants
        few big launches.
        """
        numel = 2**18 if self.residual.device.type == "cpu" else 2**24
        batch, num_heads, _, head_dim = self.residual.shape
        step = max(1, numel // max(1, batch * num_heads * BLOCK_SIZE * head_dim))
        for start in range(0, num_blocks, step):
            yield start, min(start + step, num_blocks)


def _own(view: Tensor) -> Tensor:
    """Copy a view to a storage of its own: the view would keep alive the whole past that it was cut from."""
    return view.clone(memory_format=torch.contiguous_format)


def _slice_blocks(blocks: QuantizedBlocks, start: int, stop: int) -> QuantizedBlocks:
    return QuantizedBlocks(*(x[:, :, start:stop] for x in blocks))


def _map_blocks(function: Callable[[Tensor], Tensor], blocks: QuantizedBlocks) -> QuantizedBlocks:
    return QuantizedBlocks(*map(function, blocks))
