"""Where a record has what belongs to which token and dimension, in Triton: `record.py` says so; and where a
program that makes a record finds the tokens, and puts it.

`STARTS` are those of the fields of its first half and of its means, then where the means end, where the
second half starts, which has the first one's fields, and the record's size: bytes.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

import functools

import triton
from triton import language as tl

from turboquant_core.record import RecordLayout


@functools.lru_cache(maxsize=64)
def starts_of(key_dim: int, key_bits: int, value_dim: int, value_bits: int) -> tuple[int, ...]:
    """Return what `STARTS` are of a layout."""
    layout = RecordLayout(key_dim, key_bits, value_dim, value_bits)
    return (*layout.starts, layout.record_bytes)


@triton.jit
def tokens_and_record(rows, starts, block_id, num_kv_heads, num_records):
    """Return the layer, row, kv head and place of a block's first token, and the number of its record.

    Args:
        rows: See `triton_encode.encode_blocks`; programs are of a block, and of a layer and kv head.
        starts: See there.
        block_id: Of this program's block, int64.
        num_kv_heads: Of a layer.
        num_records: Of a layer.
    """
    block = tl.program_id(0)
    layer = (tl.program_id(1) // num_kv_heads).to(tl.int64)
    head = (tl.program_id(1) % num_kv_heads).to(tl.int64)
    row = tl.load(rows + block).to(tl.int64)
    start = tl.load(starts + block).to(tl.int64)
    return layer, row, head, start, (layer * num_records + block_id) * num_kv_heads + head


@triton.jit
def parts_of(records):
    """Return where records begin as 32-bit words, as float16 numbers and as int8 numbers."""
    words = records.to(tl.pointer_type(tl.int32))
    return words, records.to(tl.pointer_type(tl.float16)), records.to(tl.pointer_type(tl.int8))


@triton.jit
def key_words(DIM: tl.constexpr, COLS: tl.constexpr, STARTS: tl.constexpr):
    """Return tiles, lanes and offsets of words of keys, and which there are.

    A row for half, tile row and g, a column for tile column and t.
    """
    TILES: tl.constexpr = (DIM + 15) // 16
    row = tl.arange(0, 32)[:, None]
    word = tl.arange(0, COLS // 4)[None, :]
    tile = row // 8 % 2 * TILES + word // 4
    lane = row % 8 * 4 + word % 4
    offsets = row // 16 * (STARTS[7] // 4) + STARTS[0] // 4
    return tile, lane, offsets, (word // 4 < TILES) & (row >= 0)


@triton.jit
def value_words(DIM: tl.constexpr, COLS: tl.constexpr, STARTS: tl.constexpr):
    """Return the same of values: a row for tile row and g, a column for half, tile column and t."""
    TILES: tl.constexpr = (DIM + 15) // 16
    row = tl.arange(0, COLS // 2)[:, None]
    word = tl.arange(0, 16)[None, :]
    tile = row // 8 * 2 + word // 4 % 2
    lane = row % 8 * 4 + word % 4
    offsets = word // 8 * (STARTS[7] // 4) + STARTS[1] // 4
    return tile, lane, offsets, (row // 8 < TILES) & (word >= 0)


@triton.jit
def norm_places_of(token, STARTS: tl.constexpr):
    """Return the halfwords of norms of keys; those of values are two further on."""
    in_tile = token % 16
    places = (in_tile // 4 * 4 + in_tile % 2 * 2 + token // 16 % 2) * 4 + in_tile // 2 % 2
    return places + token // 32 * (STARTS[7] // 2) + STARTS[2] // 2


@triton.jit
def mean_places_of(key_col, value_col, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STARTS: tl.constexpr):
    """Return the bytes of the means of keys and of values."""
    KEY_TILES: tl.constexpr = (KEY_DIM + 15) // 16
    VALUE_TILES: tl.constexpr = (VALUE_DIM + 15) // 16
    keys = STARTS[3] + key_col // 4 % 4 * (4 * KEY_TILES) + key_col // 16 * 4 + key_col % 4
    values = STARTS[4] + value_col % 8 * (2 * VALUE_TILES) + value_col // 16 * 2 + value_col // 8 % 2
    return keys, values
