"""Blocks of keys and values to records in Triton: what `encode` of their codec does, straight into the store.

A program has the keys, or the values, of one block and kv head, a row per token. Rows, and columns of keys,
have the order of `triton_store.spread`.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from turboquant_core.block_codec import BlockCodec
from turboquant_core.block_quantizer import TRIAL_LENGTHS, BlockQuantizer
from turboquant_core.exact_codec import ExactCodec
from turboquant_core.kernels.triton_launch import quick_launch
from turboquant_core.kernels.triton_places import parts_of, starts_of, tokens_and_record
from turboquant_core.kernels.triton_plain import make_plain_blocks
from turboquant_core.kernels.triton_quantize import constants, magnitudes_of, scale_factor, search
from turboquant_core.kernels.triton_store import (
    byte_bits,
    code_bits,
    spread,
    store_codes,
    store_means,
    store_norms,
)
from turboquant_core.kernels.triton_transform import matrix_parts, sizes, transformed
from turboquant_core.record import KEYS, VALUES
from turboquant_core.reference import Codec

# An int8 is the lowest byte of a number, rounded to even, plus this.
_ROUNDER = tl.constexpr(1.5 * 2**23)
_INT8_MAX = tl.constexpr(127.0)
_MAX_NORM = tl.constexpr(65504.0)
_SHORTEST = tl.constexpr(1e-15)  # float16 has no shorter norms by far


def encode_blocks(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    starts: Tensor,
    records: Tensor,
    block_ids: Tensor,
    codecs: Sequence[Codec],
) -> None:
    """Make records of blocks of 64 tokens each, the same in all layers, in one launch without a wait.

    Args:
        keys: ``[num_layers, num_rows, num_kv_heads, num_places, key_dim]``, float32, float16 or bfloat16,
            any strides: slots of exact tokens, or new tokens as a single row.
        values: ``[num_layers, num_rows, num_kv_heads, num_places, value_dim]``.
        rows: Integers ``[num_blocks]``, where each block's tokens lie.
        starts: Integers ``[num_blocks]``, the place of its first token there; the others follow.
        records: uint8 ``[num_layers, num_records, num_kv_heads, record_bytes]``, contiguous.
        block_ids: Integers ``[num_blocks]``, which records become those of the blocks, all different. Where
            one is negative, nothing is read or written.
        codecs: What records of each layer are made by; they differ in nothing but transforms.
    """
    num_layers, _, num_kv_heads = keys.shape[:3]
    num_blocks = block_ids.shape[0]
    if not num_blocks:
        return
    if isinstance(codecs[0], ExactCodec):
        make_plain_blocks(keys, values, rows, starts, records, block_ids, codecs[0])
        return
    block_codecs = tuple(codec for codec in codecs if isinstance(codec, BlockCodec))
    parts_and_units, options = _options(block_codecs, keys.device)
    _encode[(num_blocks, num_kv_heads * num_layers, 2)](
        keys,
        values,
        rows,
        starts,
        block_ids,
        *parts_and_units,
        records,
        num_kv_heads,
        records.shape[1],
        *keys.stride(),
        *values.stride(),
        **options,
    )


@functools.lru_cache(maxsize=256)
def _options(
    codecs: tuple[BlockCodec, ...], device: torch.device
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Return the matrices' parts of keys and of values, their units, and what the kernel is compiled for."""
    quantizers = codecs[0].key_quantizer, codecs[0].value_quantizer
    key_quantizer, value_quantizer = quantizers
    key_transforms = tuple(codec.key_quantizer.transform for codec in codecs)
    value_transforms = tuple(codec.value_quantizer.transform for codec in codecs)
    key_parts, key_units = matrix_parts(key_transforms, KEYS, device)
    value_parts, value_units = matrix_parts(value_transforms, VALUES, device)
    key_constants, value_constants = (constants(q.dim, q.bits) for q in quantizers)
    return (key_parts, value_parts, key_units, value_units), {
        "KEYS_PER_HEAD": key_units.shape[1] > 1,
        "VALUES_PER_HEAD": value_units.shape[1] > 1,
        "KEY_SETTINGS": _settings(key_quantizer),
        "KEY_BOUNDARIES": key_constants.boundaries,
        "KEY_DIGITS": key_constants.digits,
        "VALUE_SETTINGS": _settings(value_quantizer),
        "VALUE_BOUNDARIES": value_constants.boundaries,
        "VALUE_DIGITS": value_constants.digits,
        "LENGTHS": TRIAL_LENGTHS,
        "STARTS": starts_of(key_quantizer.dim, key_quantizer.bits, value_quantizer.dim, value_quantizer.bits),
        # With 8 warps, numbers of a small head come out wrong on a GPU (3 bits of 64 values, triton 3.6).
        "num_warps": 8 if min(key_quantizer.dim, value_quantizer.dim) > 128 else 4,
        "num_stages": 2,
    }


def _settings(quantizer: BlockQuantizer) -> tuple[Any, ...]:
    length, *_, zeros_energy = constants(quantizer.dim, quantizer.bits)
    return *sizes(quantizer.dim), quantizer.bits, quantizer.scale, length, zeros_energy


@triton.jit
def _encode_tokens(
    tokens,
    token_stride,
    dim_stride,
    parts,
    unit,
    words,
    halves,
    integers,
    KIND: tl.constexpr,
    SETTINGS: tl.constexpr,
    BOUNDARIES: tl.constexpr,
    DIGITS: tl.constexpr,
    LENGTHS: tl.constexpr,
    STARTS: tl.constexpr,
):
    """Write what a record has of the keys, or the values, of a block and kv head."""
    DIM: tl.constexpr = SETTINGS[0]
    COLS: tl.constexpr = SETTINGS[1]
    BITS: tl.constexpr = SETTINGS[4]
    SCALE: tl.constexpr = SETTINGS[5]
    LENGTH: tl.constexpr = SETTINGS[6]
    TILE_COLS: tl.constexpr = (DIM + 15) // 16
    numbers, is_finite = transformed(tokens, token_stride, dim_stride, parts, unit, SETTINGS)

    mean = tl.sum(numbers, 0) / tl.maximum(tl.sum(is_finite.to(tl.float32), 0), 1)
    stored_step = tl.minimum(tl.max(tl.abs(mean), 0) / _INT8_MAX, _MAX_NORM).to(tl.float16)
    step = stored_step.to(tl.float32)
    mean *= 1 / tl.where(step > 0, step, 1)  # a division of each would take stack
    mean = tl.minimum(tl.maximum(mean, -_INT8_MAX), _INT8_MAX) + _ROUNDER
    tl.store(halves + (STARTS[5] // 2 + KIND), stored_step)
    mean_codes = mean.to(tl.int32, bitcast=True).to(tl.int8)
    store_means(mean_codes, integers + STARTS[3 + KIND], KIND, TILE_COLS)
    numbers -= ((mean - _ROUNDER) * step)[None, :]

    if BITS == 8:
        peak = tl.max(tl.abs(numbers), 1)
        factor = tl.where(peak > _SHORTEST, _INT8_MAX / peak, 0)
        norms = peak / _INT8_MAX
        codes = (numbers * factor[:, None] + _ROUNDER).to(tl.int32, bitcast=True)
        bits = byte_bits(codes if KIND == 0 else tl.trans(codes))
    else:
        length = tl.sqrt(tl.sum(numbers * numbers, 1))
        length = tl.where(length > _SHORTEST, length, 0)
        factor = tl.where(length > 0, LENGTH / length, 0)
        numbers *= factor[:, None]
        chosen, projection, energy = search(tl.abs(numbers), LENGTHS, BOUNDARIES, DIGITS, SETTINGS[7])
        norms = length * scale_factor(projection, energy, LENGTH, SCALE)
        numbers *= chosen[:, None]
        if DIM % 16:  # beyond the last dimension codes are 0
            col = tl.arange(0, COLS)
            dim = spread(col) if KIND == 0 else col
            numbers = tl.where((dim < DIM)[None, :], numbers, -float("inf"))
        if KIND == 1:
            numbers = tl.trans(numbers)
        bits = code_bits(magnitudes_of(numbers, BOUNDARIES), numbers <= 0, BITS)
    store_codes(bits, words + STARTS[KIND] // 4, KIND, BITS, TILE_COLS, STARTS[7] // 4)
    norms = tl.where(is_finite, tl.minimum(norms, _MAX_NORM), float("nan")).to(tl.float16)
    store_norms(norms, halves + STARTS[2] // 2, KIND, STARTS[7] // 2)
    if KIND == 1:
        padding = tl.arange(0, 4)
        is_padding = padding < (STARTS[7] - STARTS[6]) // 4
        tl.store(words + STARTS[6] // 4 + padding, tl.zeros([4], tl.int32), is_padding)


@quick_launch
@triton.jit(do_not_specialize_on_alignment=["rows", "starts", "block_ids"])
def _encode(
    keys,
    values,
    rows,
    starts,
    block_ids,
    key_parts,
    value_parts,
    key_units,
    value_units,
    records,
    num_kv_heads,
    num_records,
    key_layer_stride,
    key_row_stride,
    key_head_stride,
    key_token_stride,
    key_dim_stride,
    value_layer_stride,
    value_row_stride,
    value_head_stride,
    value_token_stride,
    value_dim_stride,
    KEYS_PER_HEAD: tl.constexpr,
    VALUES_PER_HEAD: tl.constexpr,
    KEY_SETTINGS: tl.constexpr,
    KEY_BOUNDARIES: tl.constexpr,
    KEY_DIGITS: tl.constexpr,
    VALUE_SETTINGS: tl.constexpr,
    VALUE_BOUNDARIES: tl.constexpr,
    VALUE_DIGITS: tl.constexpr,
    LENGTHS: tl.constexpr,
    STARTS: tl.constexpr,
):
    block_id = tl.load(block_ids + tl.program_id(0)).to(tl.int64)
    if block_id < 0:
        return
    layer, row, head, start, number = tokens_and_record(rows, starts, block_id, num_kv_heads, num_records)
    record = number * STARTS[8]
    words, halves, integers = parts_of(records)
    if tl.program_id(2) == 0:
        matrix = layer * num_kv_heads + head if KEYS_PER_HEAD else layer
        _encode_tokens(
            keys
            + layer * key_layer_stride
            + row * key_row_stride
            + head * key_head_stride
            + start * key_token_stride,
            key_token_stride,
            key_dim_stride,
            key_parts + matrix * (2 * KEY_SETTINGS[1] * KEY_SETTINGS[2]),
            tl.load(key_units + matrix),
            words + record // 4,
            halves + record // 2,
            integers + record,
            0,
            KEY_SETTINGS,
            KEY_BOUNDARIES,
            KEY_DIGITS,
            LENGTHS,
            STARTS,
        )
    else:
        matrix = layer * num_kv_heads + head if VALUES_PER_HEAD else layer
        _encode_tokens(
            values
            + layer * value_layer_stride
            + row * value_row_stride
            + head * value_head_stride
            + start * value_token_stride,
            value_token_stride,
            value_dim_stride,
            value_parts + matrix * (2 * VALUE_SETTINGS[1] * VALUE_SETTINGS[2]),
            tl.load(value_units + matrix),
            words + record // 4,
            halves + record // 2,
            integers + record,
            1,
            VALUE_SETTINGS,
            VALUE_BOUNDARIES,
            VALUE_DIGITS,
            LENGTHS,
            STARTS,
        )
