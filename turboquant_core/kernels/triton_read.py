"""Blocks as keys and values that lie token by token, in Triton: `BlockCodec.stored` of blocks of a store."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

import functools
from typing import Any

import triton
from torch import Tensor
from triton import language as tl

from turboquant_core.exact_codec import ExactCodec
from turboquant_core.kernels.triton_launch import next_power_of_2, quick_launch
from turboquant_core.kernels.triton_levels import level_curve, read_levels
from turboquant_core.kernels.triton_places import (
    key_words,
    mean_places_of,
    norm_places_of,
    parts_of,
    starts_of,
    value_words,
)
from turboquant_core.kernels.triton_plain import read_plain_blocks
from turboquant_core.reference import Codec


def read_blocks(records: Tensor, block_ids: Tensor, codec: Codec, keys: Tensor, values: Tensor) -> None:
    """Write the stored keys and values of blocks, one block after another.

    Args:
        records: uint8 ``[num_records, num_kv_heads, record_bytes]``, contiguous.
        block_ids: Integers ``[num_blocks]``.
        codec: Of the records.
        keys: Written to: ``[num_kv_heads, 64 * num_blocks, key_dim]``, the last dimension contiguous.
        values: Likewise.
    """
    if isinstance(codec, ExactCodec):
        read_plain_blocks(records, block_ids, codec, keys, values)
        return
    key_quantizer, value_quantizer = codec.key_quantizer, codec.value_quantizer
    units, options = _options(
        key_quantizer.dim, key_quantizer.bits, value_quantizer.dim, value_quantizer.bits
    )
    _read[(block_ids.shape[0], records.shape[1])](
        records,
        block_ids,
        keys,
        values,
        *keys.stride()[:2],
        *values.stride()[:2],
        *units,
        **options,
    )


@functools.lru_cache(maxsize=64)
def _options(
    key_dim: int, key_bits: int, value_dim: int, value_bits: int
) -> tuple[tuple[float, float], dict[str, Any]]:
    """Return the units of keys and of values, and what the kernel is compiled for."""
    key_curve, key_unit = level_curve(key_dim, key_bits)
    value_curve, value_unit = level_curve(value_dim, value_bits)
    return (key_unit, value_unit), {
        "KEY_DIM": key_dim,
        "KEY_COLS": next_power_of_2(key_dim),
        "KEY_BITS": key_bits,
        "KEY_CURVE": key_curve,
        "VALUE_DIM": value_dim,
        "VALUE_COLS": next_power_of_2(value_dim),
        "VALUE_BITS": value_bits,
        "VALUE_CURVE": value_curve,
        "STARTS": starts_of(key_dim, key_bits, value_dim, value_bits),
        "num_warps": 4,
    }


@quick_launch
@triton.jit(do_not_specialize_on_alignment=["block_ids"])
def _read(
    records,
    block_ids,
    keys,
    values,
    key_head_stride,
    key_stride,
    value_head_stride,
    value_stride,
    key_unit,
    value_unit,
    KEY_DIM: tl.constexpr,
    KEY_COLS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_CURVE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_CURVE: tl.constexpr,
    STARTS: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    record = (tl.load(block_ids + block).to(tl.int64) * tl.num_programs(1) + head) * STARTS[8]
    words, halves, integers = parts_of(records)
    words += record // 4
    halves += record // 2
    integers += record
    token = tl.arange(0, 64)
    key_col = tl.arange(0, KEY_COLS)
    value_col = tl.arange(0, VALUE_COLS)
    norm_places = norm_places_of(token, STARTS)
    key_mean_places, value_mean_places = mean_places_of(key_col, value_col, KEY_DIM, VALUE_DIM, STARTS)
    steps = halves + STARTS[5] // 2

    tile, lane, offsets, is_tile = key_words(KEY_DIM, KEY_COLS, STARTS)
    NUM_KEY_TILES: tl.constexpr = 2 * ((KEY_DIM + 15) // 16)
    levels = tl.trans(read_levels(words, offsets, tile, lane, is_tile, NUM_KEY_TILES, KEY_BITS, KEY_CURVE, 2))
    norms = tl.load(halves + norm_places).to(tl.float32) * key_unit
    mean = tl.load(integers + key_mean_places, key_col < KEY_DIM, 0).to(tl.float32)
    mean *= tl.load(steps).to(tl.float32)
    numbers = levels * norms[:, None] + mean[None, :]
    is_number = (token >= 0)[:, None] & (key_col < KEY_DIM)[None, :]
    places = (block.to(tl.int64) * 64 + token)[:, None] * key_stride + key_col[None, :]
    tl.store(keys + head * key_head_stride + places, numbers.to(keys.dtype.element_ty), is_number)

    tile, lane, offsets, is_tile = value_words(VALUE_DIM, VALUE_COLS, STARTS)
    NUM_VALUE_TILES: tl.constexpr = 2 * ((VALUE_DIM + 15) // 16)
    levels = read_levels(words, offsets, tile, lane, is_tile, NUM_VALUE_TILES, VALUE_BITS, VALUE_CURVE, 8)
    norms = tl.load(halves + norm_places + 2).to(tl.float32) * value_unit
    mean = tl.load(integers + value_mean_places, value_col < VALUE_DIM, 0).to(tl.float32)
    mean *= tl.load(steps + 1).to(tl.float32)
    numbers = levels * norms[:, None] + mean[None, :]
    is_number = (token >= 0)[:, None] & (value_col < VALUE_DIM)[None, :]
    places = (block.to(tl.int64) * 64 + token)[:, None] * value_stride + value_col[None, :]
    tl.store(values + head * value_head_stride + places, numbers.to(values.dtype.element_ty), is_number)
