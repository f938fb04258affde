"""The keys, or the values, of one layer: quantized blocks of old tokens, then the newest tokens as they came.

Knows how tokens move between the two; knows neither transformers nor how a block is quantized.

    tokens, oldest first:   [ block 0 | block 1 | ... | block n-1 | residual                               ]
    held as:                  codes, norms, mean per 64 tokens      model's dtype, residual_length .. + 63
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from turboquant_core.block_quantizer import BlockQuantizer, QuantizedBlocks
from turboquant_core.codebook import MIN_DIM
from turboquant_core.config import BLOCK_SIZE, KVCacheConfig
from turboquant_core.quantizer import ScaleRule


@lru_cache(maxsize=64)
def block_quantizer(head_dim: int, bits: int, scale: ScaleRule, seed: int) -> BlockQuantizer:
    """Return the quantizer that all layers of a shape share, so that no cache holds or copies its tables."""
    return BlockQuantizer(head_dim, bits, scale=scale, seed=seed)


class CompressedStates:
    """The keys, or the values, of one layer; what it holds carries no gradient.

    Args:
        states: Tokens to come, ``[batch, num_kv_heads, num_tokens, head_dim]``; only shape and dtype count.
        bits: Bits per number of a block.
        scale: How a block's norms are chosen.
        config: Residual length and seed.

    Attributes:
        blocks: The oldest tokens; each tensor is ``[batch, num_kv_heads, num_blocks, ...]``.
        residual: The newest tokens, ``[batch, num_kv_heads, num_tokens, head_dim]`` in the model's dtype.

    Raises:
        ValueError: If head_dim is below 16.
    """

    def __init__(self, states: Tensor, bits: int, scale: ScaleRule, config: KVCacheConfig) -> None:
        head_dim = states.shape[-1]
        if head_dim < MIN_DIM:
            raise ValueError(
                f"TurboQuantCache needs a head_dim of at least {MIN_DIM} and this model has {head_dim}: "
                "use transformers' DynamicCache"
            )
        self._quantizer_key = (head_dim, bits, scale, config.seed)
        self._residual_length = config.residual_length
        self.residual = _own(states[:, :, :0].detach())
        self.blocks = self._quantizer.quantize(states.new_empty(*states.shape[:2], 0, BLOCK_SIZE, head_dim))

    @property
    def _quantizer(self) -> BlockQuantizer:
        return block_quantizer(*self._quantizer_key)

    @property
    def num_blocks(self) -> int:
        """Blocks held."""
        return self.blocks.norms.shape[2]

    @property
    def num_tokens(self) -> int:
        """Tokens held, in blocks and residual."""
        return self.num_blocks * BLOCK_SIZE + self.residual.shape[2]

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
        self._settle(full[:, :, self.num_blocks * BLOCK_SIZE :].detach(), window)
        return full

    def trim(self, window: int) -> None:
        """Forget what is older than the newest `window` tokens; up to 63 more stay, as blocks leave whole."""
        self._settle(self.residual, window)

    def crop(self, num_tokens: int) -> None:
        """Remove the newest `num_tokens`; what is left of a block goes back to the residual, dequantized."""
        num_left = self.num_tokens - num_tokens
        num_blocks, rest = divmod(num_left, BLOCK_SIZE)
        if num_blocks >= self.num_blocks:
            self.residual = _own(self.residual[:, :, : num_left - self.num_blocks * BLOCK_SIZE])
            return
        block = _slice_blocks(self.blocks, num_blocks, num_blocks + 1)
        self.residual = _own(self._quantizer.dequantize(block, self.residual.dtype)[:, :, 0, :rest])
        self.blocks = _map_blocks(_own, _slice_blocks(self.blocks, 0, num_blocks))

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by what `function` makes of it (another device, another order of the batch)."""
        self.residual = function(self.residual)
        self.blocks = _map_blocks(function, self.blocks)

    def _join(self, states: Tensor) -> Tensor:
        """Return ``[blocks, residual, states]`` along the tokens, each written once into one tensor."""
        held = (*self.residual.shape[:2], self.residual.shape[3])
        if (*states.shape[:2], states.shape[3]) != held:
            raise ValueError(
                f"the cache holds [batch, num_kv_heads, head_dim] = {list(held)} and the new tokens have "
                f"{[*states.shape[:2], states.shape[3]]}: use a new cache, or reset() this one"
            )
        if self.num_tokens == 0:
            return states
        end_of_blocks = self.num_blocks * BLOCK_SIZE
        full = states.new_empty(*states.shape[:2], self.num_tokens + states.shape[2], states.shape[3])
        for start, stop in self._pieces(self.num_blocks):
            tokens = self._quantizer.dequantize(_slice_blocks(self.blocks, start, stop), full.dtype)
            full[:, :, start * BLOCK_SIZE : stop * BLOCK_SIZE] = tokens.flatten(2, 3)
        full[:, :, end_of_blocks : self.num_tokens] = self.residual
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
