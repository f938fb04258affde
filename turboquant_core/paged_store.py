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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant_core.block_codec import BlockCodec
from turboquant_core.config import BLOCK_SIZE
from turboquant_core.reference import AttentionOptions, Codec, chunk_attention, decode_attention
from turboquant_core.request_cache import Visibility
from turboquant_core.step_plan import Chunk, DecodePlan, new_blocks, visible_blocks
from turboquant_core.timeline import Timeline


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
        self.device = device
        self.records = {
            index: torch.empty(
                num_blocks[layer.group],
                layer.num_kv_heads,
                layer.codec.record_bytes,
                dtype=torch.uint8,
                device=device,
            )
            for index, layer in layers.items()
        }
        self.exact: dict[int, tuple[Tensor, Tensor]] = {}
        for index, layer in layers.items():
            keys, values = (
                torch.empty(
                    num_slots, layer.num_kv_heads, timeline.num_exact, dim, dtype=dtype, device=device
                )
                for dim in (layer.key_dim, layer.value_dim)
            )
            self.exact[index] = keys, values

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held."""
        exact = sum(tensor.nbytes for pair in self.exact.values() for tensor in pair)
        return exact + sum(records.nbytes for records in self.records.values())

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
        chunks: Sequence[Chunk],
        options: AttentionOptions,
        *,
        writes: bool = True,
    ) -> Tensor:
        """Attend for chunks of new tokens and keep their keys and values.

        Args:
            layer_idx: Of the layer whose cache is meant.
            queries: ``[num_tokens, num_heads, key_dim]``, the chunks' tokens one after another. A request may
                have several chunks, in order of their positions.
            keys: ``[num_tokens, num_kv_heads, key_dim]``.
            values: ``[num_tokens, num_kv_heads, value_dim]``.
            chunks: Of one request, at most the last may be of generated tokens.
            options: How scores are made.
            writes: False where another layer has already kept these keys and values.

        Returns:
            ``[num_tokens, num_heads, value_dim]`` in the dtype of the queries.
        """
        outputs = []
        start = 0
        for chunk in chunks:
            part = slice(start, start + chunk.num_tokens)
            start = part.stop
            outputs.append(self._attend(layer_idx, queries[part], keys[part], values[part], chunk, options))
            if writes:
                self.write(layer_idx, keys[part], values[part], chunk)
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
        """Attend for one new token of each request and keep its key and value.

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
        if plan.tables is not None and isinstance(codec, BlockCodec):
            from turboquant_core.kernels.decode import decode  # Triton is there where a GPU is

            new = (keys, values) if writes else None
            outputs = decode(queries, new, exact, records, plan.tables, self.timeline, codec, options)
        else:
            if writes:
                exact_keys[plan.slots, :, plan.exact_indices] = keys
                exact_values[plan.slots, :, plan.exact_indices] = values
            held = exact_keys[plan.slot_rows], exact_values[plan.slot_rows]
            outputs = decode_attention(queries, held, records, plan, codec, options)
        if writes and plan.new_block_ids.numel():
            self._write_due_blocks(layer_idx, plan)
        return outputs

    def read(self, layer_idx: int, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return all keys and values before a chunk as its queries see them, in the order of the tokens.

        Returns:
            Keys ``[num_kv_heads, start, key_dim]`` and values ``[num_kv_heads, start, value_dim]`` in the
            model's dtype; of a layer whose queries see everything.
        """
        layer = self.layers[layer_idx]
        blocks = visible_blocks(chunk, layer.group, self.visibilities[layer.group], self.timeline)
        ids = torch.tensor(blocks.ids, dtype=torch.int64, device=self.device)
        records = self.records[layer_idx].index_select(0, ids)
        decoded = layer.codec.decode(records.transpose(0, 1))
        parts = []
        for exact, stored in zip(self.exact[layer_idx], decoded, strict=True):
            sinks, ring = self._held(exact, chunk)
            parts.append(torch.cat([sinks, stored.flatten(1, 2).to(exact.dtype), ring], dim=1))
        return parts[0], parts[1]

    def write(self, layer_idx: int, keys: Tensor, values: Tensor, chunk: Chunk) -> None:
        """Keep the keys and values of a chunk, ``[num_tokens, num_kv_heads, head_dim]``."""
        layer = self.layers[layer_idx]
        first, ids = new_blocks(chunk, layer.group, self.timeline)
        states = keys.transpose(0, 1), values.transpose(0, 1)
        # Tokens that would overwrite each other in the ring: only the last one stays.
        num_kept = max(0, min(chunk.num_tokens, self.timeline.ring_size))
        kept = range(chunk.end - num_kept, chunk.end)
        sinks = range(chunk.start, min(kept.start, self.timeline.num_sinks))
        positions = [*sinks, *kept]
        places = torch.tensor([self.timeline.exact_index(p) for p in positions], device=self.device)
        rows = torch.tensor([p - chunk.start for p in positions], device=self.device)
        for exact, new in zip(self.exact[layer_idx], states, strict=True):
            if chunk.start == 0:  # what another request has left is multiplied by zero, and may be NaN
                exact[chunk.cache.slot] = 0
            exact[chunk.cache.slot, :, places] = new[:, rows].to(exact.dtype)
        if not ids:
            return
        block_start = self.timeline.num_sinks + BLOCK_SIZE * first
        if block_start >= chunk.start:
            begin = block_start - chunk.start
            whole = [new[:, begin : begin + BLOCK_SIZE * len(ids)] for new in states]
        else:  # generated tokens: the block's tokens lie in the ring, the oldest there
            index = self.timeline.exact_index(block_start)
            whole = [
                exact[chunk.cache.slot, :, index : index + BLOCK_SIZE * len(ids)]
                for exact in self.exact[layer_idx]
            ]
        encoded = layer.codec.encode(*(states.unflatten(1, (len(ids), BLOCK_SIZE)) for states in whole))
        self._keep(layer_idx, torch.tensor(ids, device=self.device), encoded)

    def _attend(
        self,
        layer_idx: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        chunk: Chunk,
        options: AttentionOptions,
    ) -> Tensor:
        layer = self.layers[layer_idx]
        visibility = self.visibilities[layer.group]
        blocks = visible_blocks(chunk, layer.group, visibility, self.timeline)
        exact_keys, exact_values = (
            torch.cat([*self._held(held, chunk), new.transpose(0, 1)], dim=1)
            for held, new in zip(self.exact[layer_idx], (keys, values), strict=True)
        )
        positions = torch.arange(chunk.start, chunk.end, device=self.device)[:, None]
        first_visible = torch.tensor(
            [[visibility.first_visible(p)] for p in range(chunk.start, chunk.end)], device=self.device
        )
        num_sinks = min(chunk.start, self.timeline.num_sinks)
        held_positions = torch.arange(chunk.end - exact_keys.shape[1], chunk.end, device=self.device)
        held_positions[:num_sinks] = torch.arange(num_sinks, device=self.device)
        block_mask = None
        if visibility.reach is not None:
            end = blocks.start + BLOCK_SIZE * len(blocks.ids)
            block_mask = torch.arange(blocks.start, end, device=self.device) >= first_visible
        return chunk_attention(
            queries,
            (exact_keys, exact_values),
            (held_positions <= positions) & (held_positions >= first_visible),
            self.records[layer_idx],
            blocks.ids,
            block_mask,
            layer.codec,
            options,
        )

    def _held(self, exact: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return the exact tokens before a chunk, ``[heads, tokens, dim]``: sinks, those after its blocks."""
        timeline = self.timeline
        num_sinks = min(chunk.start, timeline.num_sinks)
        first = timeline.num_sinks + BLOCK_SIZE * timeline.num_visible_blocks(
            chunk.start, chunk.num_prompt_tokens
        )
        places = [timeline.exact_index(position) for position in range(first, chunk.start)]
        held = exact[chunk.cache.slot]
        return held[:, :num_sinks], held[:, places]

    def _write_due_blocks(self, layer_idx: int, plan: DecodePlan) -> None:
        places = plan.new_starts[:, None] + torch.arange(BLOCK_SIZE, device=self.device)
        slots = plan.slots[plan.new_owners][:, None]
        # Indices on both sides of the heads put the indexed dimensions first: [blocks, 64, heads, dim].
        tokens = [exact[slots, :, places].permute(2, 0, 1, 3) for exact in self.exact[layer_idx]]
        encoded = self.layers[layer_idx].codec.encode(*tokens)
        self._keep(layer_idx, plan.new_block_ids, encoded)

    def _keep(self, layer_idx: int, ids: Tensor, encoded: Tensor) -> None:
        # Copies whole records, in a fraction of the time that indexing takes.
        self.records[layer_idx].index_copy_(0, ids, encoded.transpose(0, 1))
