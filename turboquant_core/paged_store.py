"""PagedStore: the device memory of all layers' caches, and attention over it.

Knows tensors, not requests: who owns which block and slot is decided elsewhere (`request_cache.py`).

For each layer

    records   uint8 [num_blocks, num_kv_heads, record_bytes]          blocks of 64 tokens, see the codec
    exact     dtype [num_slots, num_kv_heads, num_sinks + ring_size, head_dim], for keys and for values

A running request has one slot. Its first tokens and its newest ones lie there as they came, the one at
position p at `Timeline.exact_index(p)`. When a token is computed it goes to the slot, and whenever the
timeline says so, the 64 oldest tokens become a block.
"""
# mypy: disable-error-code="no-untyped-call"
# (torch's own methods)

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turboquant_core import reference
from turboquant_core.block_codec import BlockCodec
from turboquant_core.layer_stack import LayerStack, make_blocks
from turboquant_core.prefill_plan import PrefillPlan, PrefillRun, plan_prefill
from turboquant_core.reference import AttentionOptions, Codec, decode_attention
from turboquant_core.request_cache import Visibility
from turboquant_core.step_plan import Chunk, DecodePlan, due_blocks
from turboquant_core.timeline import Timeline
from turboquant_core.upload import upload


@dataclass(frozen=True)
class StoreLayer:
    """What one layer of keys and values needs.

    Attributes:
        codec: Makes blocks of tokens and reads them.
        num_kv_heads: Heads of keys and values.
        key_dim: Numbers of a key.
        value_dim: Numbers of a value.
        group: Index of the layers' group that has the same block ids.
    """

    codec: Codec
    num_kv_heads: int
    key_dim: int
    value_dim: int
    group: int


class PagedStore:
    """Hold the compressed and the exact tokens of all layers, and attend to them.

    Args:
        layers: By the index of the cache layer.
        visibilities: What queries of each group of layers see.
        timeline: When tokens become blocks.
        num_blocks: Of each group.
        num_slots: Most requests that run at once.
        dtype: Of the model's keys and values.
        device: Where everything lies.

    Attributes:
        uses_kernels: Whether kernels compute what they can, not their references: so on a GPU.
    """

    def __init__(
        self,
        layers: dict[int, StoreLayer],
        visibilities: Sequence[Visibility],
        timeline: Timeline,
        *,
        num_blocks: Sequence[int],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = layers
        self.visibilities = tuple(visibilities)
        self.timeline = timeline
        self.num_slots = num_slots
        self.device = device
        self.uses_kernels = device.type == "cuda"
        self.records: dict[int, Tensor] = {}
        self.exact: dict[int, tuple[Tensor, Tensor]] = {}
        # What of layers is alike has one tensor, so that one launch makes the blocks of all.
        self._stacks: list[LayerStack] = []
        for _, indices in itertools.groupby(sorted(layers, key=self._kind), key=self._kind):
            self._stacks.append(self._allocate(list(indices), num_blocks, num_slots, dtype))

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held."""
        exact = sum(tensor.nbytes for pair in self.exact.values() for tensor in pair)
        return exact + sum(records.nbytes for records in self.records.values())

    def stacked_records(self) -> list[tuple[int, Tensor]]:
        """Return all blocks, in each tensor those of layers of one group, and the index of the group.

        Returns:
            uint8 ``[num_layers, num_blocks, num_kv_heads, record_bytes]``.
        """
        return [(self.layers[stack.indices[0]].group, stack.records) for stack in self._stacks]

    def _kind(self, index: int) -> tuple[Any, ...]:
        layer = self.layers[index]
        bits: tuple[int, ...] = ()
        if isinstance(layer.codec, BlockCodec):
            bits = layer.codec.key_quantizer.bits, layer.codec.value_quantizer.bits
        return layer.group, layer.num_kv_heads, layer.key_dim, layer.value_dim, layer.codec.record_bytes, bits

    def _allocate(
        self, indices: list[int], num_blocks: Sequence[int], num_slots: int, dtype: torch.dtype
    ) -> LayerStack:
        layer = self.layers[indices[0]]
        sizes = (len(indices), num_blocks[layer.group], layer.num_kv_heads, layer.codec.record_bytes)
        records = torch.empty(sizes, dtype=torch.uint8, device=self.device)
        sizes = (len(indices), num_slots, layer.num_kv_heads, self.timeline.num_exact)
        keys, values = (
            torch.empty(*sizes, dim, dtype=dtype, device=self.device)
            for dim in (layer.key_dim, layer.value_dim)
        )
        for place, index in enumerate(indices):
            self.records[index] = records[place]
            self.exact[index] = keys[place], values[place]
        return LayerStack(indices, records, keys, values)

    def plan_prefill(self, chunks: Sequence[Chunk]) -> list[PrefillPlan]:
        """Return the plan of chunks for each group of layers."""
        return [
            plan_prefill(chunks, group, visibility, self.timeline, self.device)
            for group, visibility in enumerate(self.visibilities)
        ]

    def copy_slot(self, source: int, target: int) -> None:
        """Make the exact tokens of a slot those of another."""
        for pair in self.exact.values():
            for tensor in pair:
                tensor[target] = tensor[source]

    def prefill(
        self,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        plan: PrefillPlan,
        options: AttentionOptions,
        *,
        writes: bool = True,
    ) -> Tensor:
        """Attend for chunks of new tokens and keep their keys and values.

        Args:
            layer_idx: Of the layer whose cache is meant.
            queries: ``[num_tokens, num_heads, key_dim]``, the tokens of one chunk after another.
            keys: ``[num_tokens, num_kv_heads, key_dim]``.
            values: ``[num_tokens, num_kv_heads, value_dim]``.
            plan: Of the layer's group. Of one request, at most the last chunk may be of generated tokens.
            options: How scores are made.
            writes: False where another layer has already kept these keys and values.

        Returns:
            ``[num_tokens, num_heads, value_dim]`` in the dtype of the queries.
        """
        if writes:
            self.write(layer_idx, keys, values, plan)
        codec, records = self.layers[layer_idx].codec, self.records[layer_idx]
        if self.uses_kernels:
            from turboquant_core.kernels.triton_prefill import prefill

            return prefill(queries, (keys, values), self.exact[layer_idx], records, plan, codec, options)
        outputs = []
        for run in plan.runs:
            new = keys[run.rows].transpose(0, 1), values[run.rows].transpose(0, 1)
            held = self._held(layer_idx, run)
            outputs.append(
                reference.prefill_attention(queries[run.rows], held, new, records, run, codec, options)
            )
        return torch.cat(outputs)

    def decode(
        self,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        plan: DecodePlan,
        options: AttentionOptions,
        *,
        writes: bool = True,
    ) -> Tensor:
        """Attend for one new token of each request and keep its key and value; see also `make_due_blocks`.

        Args:
            layer_idx: Of the layer whose cache is meant.
            queries: ``[batch, num_heads, key_dim]``.
            keys: ``[batch, num_kv_heads, key_dim]``.
            values: ``[batch, num_kv_heads, value_dim]``.
            plan: Of the layer's group.
            options: How scores are made.
            writes: False where another layer has already kept these keys and values.

        Returns:
            ``[batch, num_heads, value_dim]`` in the dtype of the queries.
        """
        codec, records = self.layers[layer_idx].codec, self.records[layer_idx]
        exact_keys, exact_values = exact = self.exact[layer_idx]
        if self.uses_kernels:
            from turboquant_core.kernels.decode import decode

            new = (keys, values) if writes else None
            outputs = decode(queries, new, exact, records, plan.tables, self.timeline, codec, options)
            if outputs is not None:
                return outputs
        if writes:
            exact_keys[plan.slots, :, plan.exact_indices] = keys
            exact_values[plan.slots, :, plan.exact_indices] = values
        held = exact_keys[plan.slot_rows], exact_values[plan.slot_rows]
        return decode_attention(queries, held, records, plan, codec, options)

    def make_due_blocks(self, chunks: Sequence[Chunk]) -> None:
        """Make the blocks that become due with generated tokens, once `decode` has kept these in all layers.

        Args:
            chunks: Of one token each.
        """
        due = [due_blocks(chunks, group, self.timeline) for group in range(len(self.visibilities))]
        if not any(due):
            return
        # One copy for all groups.
        rows = upload(list(itertools.chain.from_iterable(due)), torch.int64, self.device)
        of_groups = rows.split([len(of_group) for of_group in due])
        for stack in self._stacks:
            slots, block_ids, starts = of_groups[self.layers[stack.indices[0]].group].mT.contiguous()
            if len(slots):
                self._make_blocks(stack, slots, starts, block_ids)

    def warm_up(self) -> None:
        """Compile the kernels of `make_due_blocks`, for which a request would wait otherwise."""
        if not self.uses_kernels:
            return
        none, zero = (torch.full((1,), number, device=self.device) for number in (-1, 0))
        for stack in self._stacks:
            self._make_blocks(stack, zero, zero, none)

    def read(self, layer_idx: int, run: PrefillRun) -> tuple[Tensor, Tensor]:
        """Return all keys and values before a single chunk as its queries see them, in order of the tokens.

        Returns:
            Keys ``[num_kv_heads, start, key_dim]`` and values ``[num_kv_heads, start, value_dim]`` in the
            model's dtype; of a layer whose queries see everything.
        """
        codec = self.layers[layer_idx].codec
        records = self.records[layer_idx].index_select(0, run.block_ids)
        decoded = codec.decode(records.transpose(0, 1))
        parts = []
        for held, stored in zip(self._held(layer_idx, run), decoded, strict=True):
            sinks, ring = held[:, : min(run.start, run.num_sinks)], held[:, run.num_sinks :]
            parts.append(torch.cat([sinks, stored.flatten(1, 2).to(held.dtype), ring], dim=1))
        return parts[0], parts[1]

    def write(self, layer_idx: int, keys: Tensor, values: Tensor, plan: PrefillPlan) -> None:
        """Keep the keys and values of a plan's tokens, ``[num_tokens, num_kv_heads, head_dim]``."""
        exact = self.exact[layer_idx]
        if self.uses_kernels:
            from turboquant_core.kernels.triton_keep import keep_tokens

            keep_tokens(keys, values, exact, plan)
        else:
            is_token = (plan.kept_rows >= 0)[:, None, None]
            for places, new in zip(exact, (keys, values), strict=True):
                kept = torch.where(is_token, new[plan.kept_rows], 0).to(places.dtype)
                places[plan.kept_slots, :, plan.kept_places] = kept
        if plan.new_block_ids.numel():
            records = self.records[layer_idx][None]
            new_keys, new_values = (
                states.view(1, 1, *states.shape).transpose(2, 3) for states in (keys, values)
            )
            stack = LayerStack([layer_idx], records, new_keys, new_values)
            self._make_blocks(stack, plan.new_slots, plan.new_rows, plan.new_block_ids)
        if plan.ring_block_ids.numel():
            records = self.records[layer_idx][None]
            stack = LayerStack([layer_idx], records, exact[0][None], exact[1][None])
            self._make_blocks(stack, plan.ring_slots, plan.ring_places, plan.ring_block_ids)

    def _held(self, layer_idx: int, run: PrefillRun) -> tuple[Tensor, Tensor]:
        """Return the exact keys and values before a run's chunks, ``[num_kv_heads, num_held, dim]``."""
        keys, values = self.exact[layer_idx]
        return keys[run.slot][:, run.held_places], values[run.slot][:, run.held_places]

    def _make_blocks(self, stack: LayerStack, rows: Tensor, starts: Tensor, block_ids: Tensor) -> None:
        codecs = [self.layers[index].codec for index in stack.indices]
        make_blocks(stack, codecs, rows, starts, block_ids, uses_kernels=self.uses_kernels)
