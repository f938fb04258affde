"""Attention that adds nothing, so that only states carry over from token to token."""

from __future__ import annotations

from torch import Tensor

from turboquant_core import AttentionOptions


class NoAttention:
    """Stands for attention in the layers that attend."""

    def attend(
        self,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        options: AttentionOptions,
        writes: bool,
    ) -> Tensor:
        return queries.new_zeros(*queries.shape[:2], values.shape[2])
