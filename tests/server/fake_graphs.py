"""What stands for CUDA graphs where there is no GPU: a captured step is computed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from turboquant_core import AttentionOptions, DecodeAttention, DecodePlan


@dataclasses.dataclass
class FakeGraph:
    """Stands for a CUDA graph: computes its step again."""

    step: Callable[[], None]

    def replay(self) -> None:
        self.step()


class FakeRecorder:
    """Stands for what runs and captures steps."""

    def __init__(self, device: torch.device) -> None:
        pass

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        return step()

    def record(self, step: Callable[[], None]) -> Any:
        step()
        return FakeGraph(step)


class RowAttention(DecodeAttention):
    """Attend as the CUDA kernel does, which passes over rows without a request."""

    def attend(
        self,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        options: AttentionOptions,
        writes: bool,
    ) -> Tensor:
        plan = self.plans[self.store.layers[layer_idx].group]
        count = int((plan.tables.slots >= 0).sum())
        output = torch.full((*queries.shape[:2], values.shape[-1]), torch.nan)
        if count:
            tables = vars(plan.tables).items()
            rows: Any = {name: value[:count] for name, value in tables if isinstance(value, Tensor)}
            taken = DecodePlan(dataclasses.replace(plan.tables, **rows), plan.timeline)
            output[:count] = self.store.decode(
                layer_idx, queries[:count], keys[:count], values[:count], taken, options, writes=writes
            )
        return output
