"""Requests on a poisoned store, and what they must get, computed in float64 by brute force."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from turboquant_core.block_codec import BlockCodec
from turboquant_core.block_quantizer import KEY_SCALE, VALUE_SCALE, BlockQuantizer
from turboquant_core.decode_buffers import DecodeBuffers
from turboquant_core.exact_codec import ExactCodec
from turboquant_core.paged_store import PagedStore, StoreLayer
from turboquant_core.reference import AttentionOptions, Codec
from turboquant_core.request_cache import CacheManager, RequestCache, Visibility
from turboquant_core.step_plan import Chunk, DecodePlan
from turboquant_core.timeline import Timeline
from turboquant_core.transform import Transform

CPU = torch.device("cpu")
FULL = Visibility()
SMALL = Timeline(residual_length=64, segment_size=64)


class Shape(NamedTuple):
    """Heads of keys and values, query heads of each, and the numbers of a key and of a value."""

    num_kv_heads: int
    group_size: int
    key_dim: int
    value_dim: int


class Layer(NamedTuple):
    """One layer of a store: how it keeps blocks, what its queries see and how they weigh it."""

    codec: Codec
    visibility: Visibility
    options: AttentionOptions


class Tokens(NamedTuple):
    """Queries, keys and values of a request, each ``[num_tokens, heads, dim]``."""

    queries: Tensor
    keys: Tensor
    values: Tensor

    def part(self, start: int, end: int) -> Tokens:
        return Tokens(*(states[start:end] for states in self))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tokens(shape: Shape, num_tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> Tokens:
    """Return tokens whose keys and values have means, and whose queries prefer some keys by far."""
    numbers = generator(seed)

    def states(num_heads: int, dim: int) -> Tensor:
        return torch.randn(num_tokens, num_heads, dim, generator=numbers)

    heads, queries_per_head, key_dim, value_dim = shape
    keys, values = (
        states(heads, dim) + torch.randn(heads, dim, generator=numbers) for dim in (key_dim, value_dim)
    )
    queries = 2 * states(heads * queries_per_head, key_dim)
    return Tokens(queries.to(dtype), keys.to(dtype), values.to(dtype))


def joined(first: Tokens, second: Tokens) -> Tokens:
    return Tokens(*(torch.cat(pair) for pair in zip(first, second, strict=True)))


def make_codec(bits: tuple[int, int] | None, shape: Shape, dtype: torch.dtype = torch.float32) -> Codec:
    """Return a codec of so many bits for keys and values, or one that loses nothing."""
    if bits is None:
        return ExactCodec(shape.key_dim, shape.value_dim, dtype)
    keys, values = (
        BlockQuantizer(dim, num_bits, scale=scale, transform=_without_rounding(shape.num_kv_heads, dim, seed))
        for dim, num_bits, scale, seed in (
            (shape.key_dim, bits[0], KEY_SCALE, 1),
            (shape.value_dim, bits[1], VALUE_SCALE, 2),
        )
    )
    return BlockCodec(keys, values)


def _without_rounding(num_heads: int, dim: int, seed: int) -> Transform:
    """Return a transform of its own for each head that only moves numbers and multiplies by powers of 2.

    So it gives the same however many blocks are transformed at a time, and no code hangs on rounding.
    """
    numbers = generator(seed)
    matrix, inverse = torch.zeros(2, num_heads, dim, dim)
    for head in range(num_heads):
        rows, columns = torch.arange(dim), torch.randperm(dim, generator=numbers)
        signs = 1.0 - 2 * torch.randint(2, (dim,), generator=numbers)
        factors = signs * 2.0 ** torch.randint(-1, 2, (dim,), generator=numbers)
        matrix[head, rows, columns] = factors
        inverse[head, columns, rows] = 1 / factors
    return Transform(matrix, inverse)


def plan_of(
    chunks: list[Chunk], visibility: Visibility, timeline: Timeline, device: torch.device = CPU
) -> DecodePlan:
    """Return the plan of a step by itself."""
    num_slots = 1 + max(chunk.cache.slot for chunk in chunks)
    buffers = DecodeBuffers([visibility], timeline, num_slots, device)
    buffers.fill(chunks)
    [plan] = buffers.plans(len(chunks))
    return plan


@dataclass
class Request:
    """One request and what it got.

    Attributes:
        outputs: ``[num_layers, num_tokens, num_heads, value_dim]``, NaN until computed.
    """

    tokens: Tokens
    token_ids: list[int]
    num_prompt_tokens: int
    cache: RequestCache
    outputs: Tensor
    num_computed: int = 0


class Engine:
    """A store whose layers all get the same tokens; nothing that was not written may be read."""

    def __init__(
        self,
        shape: Shape,
        layers: list[Layer],
        timeline: Timeline = SMALL,
        *,
        num_slots: int = 2,
        dtype: torch.dtype = torch.float32,
        caches_prefixes: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.layers = layers
        self.timeline = timeline
        visibilities = list(dict.fromkeys(layer.visibility for layer in layers))
        num_blocks = [20 * num_slots] * len(visibilities)
        self.manager = CacheManager(timeline, visibilities, num_blocks, num_slots, caches_prefixes)
        self.store = PagedStore(
            {
                index: StoreLayer(
                    layer.codec,
                    shape.num_kv_heads,
                    shape.key_dim,
                    shape.value_dim,
                    visibilities.index(layer.visibility),
                )
                for index, layer in enumerate(layers)
            },
            visibilities,
            timeline,
            num_blocks=num_blocks,
            num_slots=num_slots,
            dtype=dtype,
            device=device,
        )
        self.buffers = DecodeBuffers(visibilities, timeline, num_slots, device)
        for records in self.store.records.values():
            records.fill_(255)
        for tensor in itertools.chain(*self.store.exact.values()):
            tensor.fill_(torch.nan)

    def open(
        self, tokens: Tokens, num_prompt_tokens: int, num_tokens: int = 0, token_ids: list[int] | None = None
    ) -> Request:
        """Admit a request of which `num_tokens` tokens are known."""
        token_ids = token_ids or list(range(len(tokens.keys)))
        cache = self.manager.open(token_ids[: max(num_tokens, num_prompt_tokens)], num_prompt_tokens)
        assert cache is not None
        shape = (len(self.layers), *tokens.queries.shape[:2], tokens.values.shape[2])
        outputs = torch.full(shape, torch.nan, dtype=tokens.queries.dtype)
        return Request(tokens, token_ids, num_prompt_tokens, cache, outputs, cache.num_hit_tokens)

    def fork(self, request: Request, tokens: Tokens) -> Request:
        """Return a request that goes on from what another has computed."""
        cache = request.cache.fork()
        assert cache is not None
        self.store.copy_slot(request.cache.slot, cache.slot)
        outputs = torch.full_like(request.outputs, torch.nan)
        return Request(
            tokens, request.token_ids, request.num_prompt_tokens, cache, outputs, request.num_computed
        )

    def chunks(self, request: Request, end: int) -> list[Chunk]:
        """Return the chunks from what is computed up to `end`."""
        start, chunks = request.num_computed, []
        if 0 < start == request.cache.num_hit_tokens:
            chunks.append(self._chunk(request, 0, self.timeline.num_sinks))
        while start < end:
            chunks.append(
                self._chunk(
                    request, start, min(end, self.timeline.chunk_end(start, request.num_prompt_tokens))
                )
            )
            start = chunks[-1].end
        return chunks

    def prefill(self, *parts: tuple[Request, int]) -> None:
        """Compute requests up to some position each, all in one call."""
        pairs = [(request, chunk) for request, end in parts for chunk in self.chunks(request, end)]
        for request, end in parts:
            assert request.cache.extend(request.num_computed, end)
            request.num_computed = end
        new = [request.tokens.part(chunk.start, chunk.end) for request, chunk in pairs]
        states = [
            torch.cat(parts_of_states).to(self.store.device) for parts_of_states in zip(*new, strict=True)
        ]
        plans = self.store.plan_prefill([chunk for _, chunk in pairs])
        for index, layer in enumerate(self.layers):
            plan = plans[self.store.layers[index].group]
            outputs = self.store.prefill(index, *states, plan, layer.options)
            sizes = [chunk.num_tokens for _, chunk in pairs]
            for (request, chunk), output in zip(pairs, outputs.split(sizes), strict=True):
                request.outputs[index, chunk.start : chunk.end] = output
        for request, end in parts:
            request.cache.publish(end)

    def decode(self, *requests: Request) -> None:
        """Compute one token of each request."""
        for request in requests:
            assert request.cache.extend(request.num_computed, request.num_computed + 1)
        chunks = [self._chunk(r, r.num_computed, r.num_computed + 1) for r in requests]
        new = [request.tokens.part(request.num_computed, request.num_computed + 1) for request in requests]
        states = [torch.cat(rows).to(self.store.device) for rows in zip(*new, strict=True)]
        self.buffers.fill(chunks)
        plans = self.buffers.plans(len(chunks))
        for index, layer in enumerate(self.layers):
            plan = plans[self.store.layers[index].group]
            outputs = self.store.decode(index, *states, plan, layer.options)
            for request, output in zip(requests, outputs, strict=True):
                request.outputs[index, request.num_computed] = output
        self.store.make_due_blocks(chunks)
        for request in requests:
            request.num_computed += 1

    def decode_all(self, *requests: Request) -> None:
        """Compute all tokens of requests side by side, each as long as it has some."""
        while running := [r for r in requests if r.num_computed < len(r.tokens.keys)]:
            self.decode(*running)

    def serve(self, tokens: Tokens, num_prompt_tokens: int) -> Request:
        """Open a request and compute it: its prompt in one call, then token by token."""
        request = self.open(tokens, num_prompt_tokens)
        self.prefill((request, num_prompt_tokens))
        self.decode_all(request)
        return request

    def records_of(self, request: Request) -> list[Tensor]:
        """Return the records that a request holds, by layer."""
        tables = request.cache.block_tables
        return [
            records[[block_id for block_id in tables[self.store.layers[index].group] if block_id is not None]]
            for index, records in self.store.records.items()
        ]

    def _chunk(self, request: Request, start: int, end: int) -> Chunk:
        return Chunk(request.cache, start, end, request.num_prompt_tokens)
