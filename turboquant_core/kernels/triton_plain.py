"""Blocks of `ExactCodec` in Triton: a number lies in its tile where a code would."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

from turboquant_core.exact_codec import ExactCodec
from turboquant_core.kernels.triton_launch import next_power_of_2, quick_launch
from turboquant_core.kernels.triton_places import tokens_and_record


def read_plain_blocks(
    records: Tensor, block_ids: Tensor, codec: ExactCodec, keys: Tensor, values: Tensor
) -> None:
    """Do what `triton_read.read_blocks` does."""
    _read_plain[(block_ids.shape[0], records.shape[1])](
        records.view(codec.dtype),
        block_ids,
        keys,
        values,
        *keys.stride()[:2],
        *values.stride()[:2],
        **_dims(keys, values),
    )


def make_plain_blocks(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    starts: Tensor,
    records: Tensor,
    block_ids: Tensor,
    codec: ExactCodec,
) -> None:
    """Do what `triton_encode.encode_blocks` does, for at least one block."""
    num_layers, _, num_kv_heads = keys.shape[:3]
    _make_plain[(block_ids.shape[0], num_kv_heads * num_layers)](
        keys,
        values,
        rows,
        starts,
        block_ids,
        records.view(codec.dtype),
        num_kv_heads,
        records.shape[1],
        *keys.stride(),
        *values.stride(),
        **_dims(keys, values),
    )


def _dims(keys: Tensor, values: Tensor) -> dict[str, int]:
    dims = keys.shape[-1], values.shape[-1]
    return {"KEY_DIM": dims[0], "VALUE_DIM": dims[1], "COLS": next_power_of_2(max(dims))}


@triton.jit
def _half(token, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Return where in its record the half of a token starts; behind the second one the record ends."""
    return token // 32 * (512 * ((KEY_DIM + 15) // 16 + (VALUE_DIM + 15) // 16))


@triton.jit
def _key_place(token, dim, KEY_DIM: tl.constexpr):
    """Return where a key's number is in its half."""
    # Tile row, then in a tile g // 2, r, g % 2 of the token, t and j of the dimension.
    in_tile = token % 16
    lane = (in_tile // 4 * 2 + in_tile % 2) * 4 + dim // 4 % 4
    tile = token // 16 % 2 * ((KEY_DIM + 15) // 16) + dim // 16
    return tile * 256 + lane * 8 + in_tile // 2 % 2 * 4 + dim % 4


@triton.jit
def _value_place(token, dim, KEY_DIM: tl.constexpr):
    """Return where a value's number is in its half."""
    # Behind the keys: tile row, r and g of the dimension, t and j of the token.
    lane = dim % 8 * 4 + token // 4 % 4
    tile = (KEY_DIM + 15) // 16 * 2 + dim // 16 * 2 + token // 16 % 2
    return tile * 256 + lane * 8 + dim // 8 % 2 * 4 + token % 4


@quick_launch
@triton.jit(do_not_specialize_on_alignment=["block_ids"])
def _read_plain(
    numbers,
    block_ids,
    keys,
    values,
    key_head_stride,
    key_stride,
    value_head_stride,
    value_stride,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COLS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    record = tl.load(block_ids + block).to(tl.int64) * tl.num_programs(1) + head
    token = tl.arange(0, 64)[:, None]
    dim = tl.arange(0, COLS)[None, :]
    half = numbers + record * _half(64, KEY_DIM, VALUE_DIM) + _half(token, KEY_DIM, VALUE_DIM)
    target = block * 64 + token
    number = tl.load(half + _key_place(token, dim, KEY_DIM), dim < KEY_DIM, 0)
    tl.store(keys + head * key_head_stride + target * key_stride + dim, number, dim < KEY_DIM)
    number = tl.load(half + _value_place(token, dim, KEY_DIM), dim < VALUE_DIM, 0)
    tl.store(values + head * value_head_stride + target * value_stride + dim, number, dim < VALUE_DIM)


@quick_launch
@triton.jit(do_not_specialize_on_alignment=["rows", "starts", "block_ids"])
def _make_plain(
    keys,
    values,
    rows,
    starts,
    block_ids,
    numbers,
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
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COLS: tl.constexpr,
):
    block_id = tl.load(block_ids + tl.program_id(0)).to(tl.int64)
    if block_id < 0:
        return
    layer, row, head, start, record = tokens_and_record(rows, starts, block_id, num_kv_heads, num_records)
    token = tl.arange(0, 64)[:, None]
    dim = tl.arange(0, COLS)[None, :]
    half = numbers + record * _half(64, KEY_DIM, VALUE_DIM) + _half(token, KEY_DIM, VALUE_DIM)
    keys += layer * key_layer_stride + row * key_row_stride + head * key_head_stride
    keys += (start + token) * key_token_stride + dim * key_dim_stride
    number = tl.load(keys, dim < KEY_DIM, 0)
    is_place = dim < (KEY_DIM + 15) // 16 * 16  # tiles are filled up with zeros
    tl.store(half + _key_place(token, dim, KEY_DIM), number.to(numbers.dtype.element_ty), is_place)
    values += layer * value_layer_stride + row * value_row_stride + head * value_head_stride
    values += (start + token) * value_token_stride + dim * value_dim_stride
    number = tl.load(values, dim < VALUE_DIM, 0)
    is_place = dim < (VALUE_DIM + 15) // 16 * 16
    tl.store(half + _value_place(token, dim, KEY_DIM), number.to(numbers.dtype.element_ty), is_place)
