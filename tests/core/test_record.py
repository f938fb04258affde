"""Records are, byte by byte, what the layout says, and what is read from them is what was written."""

from __future__ import annotations

import itertools
import struct

import pytest
import torch
from torch import Tensor

from turboquant_core.block_quantizer import EncodedBlocks
from turboquant_core.record import KEYS, VALUES, BlockParts, RecordLayout, quad_table

BITS = (2, 3, 4, 8)
DIMS = (16, 24, 64, 80, 96, 128, 256)
# Every pair of widths, every dimension for keys and for values.
LAYOUTS = [
    (DIMS[i % 7], key_bits, DIMS[(3 * i + 2) % 7], value_bits)
    for i, (key_bits, value_bits) in enumerate(itertools.product(BITS, BITS))
]


def random_blocks(leading: tuple[int, ...], dim: int, bits: int, seed: int) -> EncodedBlocks:
    generator = torch.Generator().manual_seed(seed)
    return EncodedBlocks(
        torch.randint(0, 2**bits, (*leading, 64, dim), generator=generator, dtype=torch.uint8),
        torch.rand(*leading, 64, generator=generator).half(),
        torch.randint(-127, 128, (*leading, dim), generator=generator, dtype=torch.int8),
        torch.rand(leading, generator=generator).half(),
    )


def plane_offset(word: int, lane: int, num_words: int) -> int:
    """Return the byte at which a lane's word starts in a plane."""
    in_group = 4 if word < num_words // 4 * 4 else num_words % 4
    return word // 4 * 512 + lane * in_group * 4 + word % 4 * 4


def code_bytes(codes: list[list[int]], bits: int, is_values: bool) -> bytes:
    """Lay out codes ``[32][dim]`` of half a block; `dim` is a multiple of 16."""
    dim_tiles = len(codes[0]) // 16
    num_tiles = 2 * dim_tiles
    num_words = {2: num_tiles // 2, 3: num_tiles // 2, 4: num_tiles, 8: 2 * num_tiles}[bits]
    num_sign_words = (num_tiles + 3) // 4 if bits == 3 else 0
    magnitudes = bytearray(128 * num_words)
    signs = bytearray(128 * num_sign_words)

    def put(plane: bytearray, word: int, lane: int, bit: int, field: int) -> None:
        start = plane_offset(word, lane, len(plane) // 128) + bit // 8
        assert plane[start] & (field << bit % 8) == 0
        plane[start] |= field << bit % 8

    lanes = itertools.product(range(8), range(4), (0, 1), (0, 1), (0, 1))
    for (g, t, r, e, b), dim_tile, token_tile in itertools.product(lanes, range(dim_tiles), (0, 1)):
        if is_values:
            token, dim = 16 * token_tile + 4 * t + 2 * e + b, 16 * dim_tile + 8 * r + g
            tile = 2 * dim_tile + token_tile
        else:
            token, dim = 16 * token_tile + 4 * (g // 2) + 2 * r + g % 2, 16 * dim_tile + 4 * t + 2 * e + b
            tile = dim_tiles * token_tile + dim_tile
        lane, j, code = 4 * g + t, 2 * e + b, codes[token][dim]
        half = 2 ** (bits - 1)
        magnitude, sign = (code - half, 0) if code >= half else (half - 1 - code, 1)
        nibble = j + 4 * r
        if bits == 8:
            put(magnitudes, 2 * tile + r, lane, 8 * j, code)
        elif bits == 4:
            put(magnitudes, tile, lane, 16 * r + 4 * j, magnitude)
            put(magnitudes, tile, lane, 8 * j + (3 if r else 7), sign)
        elif bits == 3:
            put(magnitudes, tile // 2, lane, 4 * nibble + 2 * (tile % 2), magnitude)
            put(signs, tile // 4, lane, 4 * nibble + tile % 4, sign)
        else:
            put(magnitudes, tile // 2, lane, 4 * nibble + 2 * (tile % 2), sign << 1 | magnitude)
    return bytes(magnitudes + signs)


def record_bytes(keys: EncodedBlocks, values: EncodedBlocks, key_bits: int, value_bits: int) -> bytes:
    """Lay out one block."""
    halves = []
    for half in range(2):
        tokens = slice(32 * half, 32 * half + 32)
        codes = b""
        for blocks, bits, is_values in ((keys, key_bits, False), (values, value_bits, True)):
            padding = [0] * (-blocks.codes.shape[-1] % 16)
            codes += code_bytes([row + padding for row in blocks.codes[tokens].tolist()], bits, is_values)
        norms = [0.0] * 64
        for token_tile, g, r in itertools.product((0, 1), range(8), (0, 1)):
            token = 32 * half + 16 * token_tile + 4 * (g // 2) + 2 * r + g % 2
            norms[(2 * g + token_tile) * 4 + r] = keys.norms[token].item()
            norms[(2 * g + token_tile) * 4 + 2 + r] = values.norms[token].item()
        halves.append(codes + struct.pack("<64e", *norms))
    means = b""
    for blocks, is_values in ((keys, False), (values, True)):
        mean = [*blocks.means.tolist(), *[0] * (-blocks.means.shape[-1] % 16)]
        num_tiles = len(mean) // 16
        if is_values:
            places = itertools.product(range(num_tiles), range(2), range(8))
            order = sorted(range(len(mean)), key=[(g, tile, r) for tile, r, g in places].__getitem__)
        else:
            places = itertools.product(range(num_tiles), range(4), range(4))
            order = sorted(range(len(mean)), key=[(t, tile, j) for tile, t, j in places].__getitem__)
        means += struct.pack(f"{len(mean)}b", *(mean[dim] for dim in order))
    means += struct.pack("<2e", keys.mean_steps.item(), values.mean_steps.item())
    means += bytes(-len(means) % 16)
    return halves[0] + means + halves[1]


def levels_of(bits: int) -> Tensor:
    """Return what codes of this width stand for: any numbers, but for 8 bits."""
    if bits == 8:
        return torch.arange(256, dtype=torch.uint8).view(torch.int8).float()
    return torch.randn(2**bits, generator=torch.Generator().manual_seed(bits))


def read(layout: RecordLayout, records: Tensor, kind: int, bits: int) -> BlockParts:
    return layout.read(records, kind, None if bits == 8 else quad_table(levels_of(bits), bits))


def assert_parts_are(parts: BlockParts, blocks: EncodedBlocks, bits: int) -> None:
    assert torch.equal(parts.levels, levels_of(bits)[blocks.codes.long()])
    assert torch.equal(parts.norms, blocks.norms.float())
    assert torch.equal(parts.means, blocks.means.float())
    assert torch.equal(parts.steps, blocks.mean_steps.float())


@pytest.mark.parametrize(("key_dim", "key_bits", "value_dim", "value_bits"), LAYOUTS)
def test_every_bit_lies_where_the_layout_says(
    key_dim: int, key_bits: int, value_dim: int, value_bits: int
) -> None:
    keys = random_blocks((), key_dim, key_bits, seed=1)
    values = random_blocks((), value_dim, value_bits, seed=2)
    layout = RecordLayout(key_dim, key_bits, value_dim, value_bits)
    record = layout.write(keys, values)
    assert (record.dtype, record.shape) == (torch.uint8, (layout.record_bytes,))
    assert bytes(record.tolist()) == record_bytes(keys, values, key_bits, value_bits)


@pytest.mark.parametrize(("key_dim", "key_bits", "value_dim", "value_bits"), LAYOUTS)
@pytest.mark.parametrize("leading", [(2, 3), (0, 2), (2, 0)])
def test_what_was_written_is_read(
    key_dim: int, key_bits: int, value_dim: int, value_bits: int, leading: tuple[int, ...]
) -> None:
    keys = random_blocks(leading, key_dim, key_bits, seed=1)
    values = random_blocks(leading, value_dim, value_bits, seed=2)
    layout = RecordLayout(key_dim, key_bits, value_dim, value_bits)
    records = layout.write(keys, values)
    assert records.shape == (*leading, layout.record_bytes)
    assert_parts_are(read(layout, records, KEYS, key_bits), keys, key_bits)
    assert_parts_are(read(layout, records, VALUES, value_bits), values, value_bits)


@pytest.mark.parametrize(("bits", "codes"), [(2, 2048), (3, 3072), (4, 4096), (8, 8192)])
def test_sizes_at_head_dim_128(bits: int, codes: int) -> None:
    """Norms add 128 bytes to each half; means and steps take 260, 12 bytes less than a multiple of 16."""
    assert RecordLayout(128, bits, 128, bits).record_bytes == 2 * (codes + 128) + 272


@pytest.mark.parametrize("key_bits", BITS)
@pytest.mark.parametrize("value_bits", BITS)
def test_each_half_and_the_means_are_one_piece_at_a_multiple_of_16_bytes(
    key_bits: int, value_bits: int
) -> None:
    for key_dim, value_dim in itertools.product((*range(16, 257, 16), 17, 100), repeat=2):
        layout = RecordLayout(key_dim, key_bits, value_dim, value_bits)
        means, end_of_piece = layout.starts[3], layout.starts[-1]
        assert means % 16 == end_of_piece % 16 == 0
        assert layout.record_bytes == means + end_of_piece


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [17, 24, 100])
def test_what_lies_beyond_a_head_dim_is_not_read(bits: int, dim: int) -> None:
    """A record of the next multiple of 16 has room for other codes and means there."""
    wider = -(-dim // 16) * 16
    keys, values = (random_blocks((2, 3), wider, bits, seed) for seed in (1, 2))
    layout = RecordLayout(dim, bits, dim, bits)
    records = RecordLayout(wider, bits, wider, bits).write(keys, values)
    assert records.shape[-1] == layout.record_bytes
    start, end = layout.starts[-2:]
    assert end - start == 12 and not records[..., start:end].any()
    records[..., start:end] = 255
    for kind, blocks in ((KEYS, keys), (VALUES, values)):
        codes, norms, means, steps = blocks
        cut = EncodedBlocks(codes[..., :dim], norms, means[..., :dim], steps)
        assert_parts_are(read(layout, records, kind, bits), cut, bits)


@pytest.mark.parametrize("bits", BITS)
def test_strided_records_are_read_as_they_look(bits: int) -> None:
    keys, values = (random_blocks((2, 3), 48, bits, seed) for seed in (1, 2))
    layout = RecordLayout(48, bits, 48, bits)
    records = layout.write(keys, values)
    for strided in (
        records.transpose(0, 1).contiguous().transpose(0, 1),
        records.repeat_interleave(2, -1)[..., ::2],
    ):
        before = strided.clone()
        assert_parts_are(read(layout, strided, KEYS, bits), keys, bits)
        assert_parts_are(read(layout, strided, VALUES, bits), values, bits)
        assert torch.equal(strided, before)


def test_records_of_another_size_are_refused() -> None:
    layout = RecordLayout(64, 4, 64, 4)
    with pytest.raises(ValueError, match=r"records must have 4496 bytes, got 4495"):
        read(layout, torch.zeros(2, 4495, dtype=torch.uint8), KEYS, 4)
