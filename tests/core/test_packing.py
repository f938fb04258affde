"""Codes take exactly their bits and come back unchanged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core.packing import lookup, lookup_table, pack, packed_size, planes, unpack

BITS = range(1, 9)
leading_shapes = st.lists(st.integers(0, 3), max_size=3)


def random_codes(shape: list[int], bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
def test_multiples_of_eight_take_exactly_their_bits(bits: int) -> None:
    for dim in (16, 64, 80, 96, 128, 192, 256, 512, 1536):
        assert packed_size(dim, bits) == dim * bits // 8


def test_other_dimensions_pad_each_plane_to_a_byte() -> None:
    assert packed_size(17, 1) == 3
    assert packed_size(17, 3) == 5 + 3
    assert packed_size(100, 7) == 50 + 25 + 13


def test_layout_of_three_bits() -> None:
    codes = torch.tensor([0b101, 0b010, 0b111, 0b001, 0b110, 0b000, 0b011, 0b100, 0b111], dtype=torch.uint8)
    high_plane = [0b00_11_01_10, 0b10_01_00_11, 0b00_00_00_11]
    low_plane = [0b0100_1101, 0b0000_0001]
    assert pack(codes, 3).tolist() == high_plane + low_plane


@given(leading=leading_shapes, dim=st.integers(1, 70), bits=st.sampled_from(BITS))
@settings(deadline=None, max_examples=80)
def test_pack_then_unpack_is_the_identity(leading: list[int], dim: int, bits: int) -> None:
    codes = random_codes([*leading, dim], bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, packed_size(dim, bits))
    assert torch.equal(unpack(packed, dim, bits), codes)


@given(leading=leading_shapes, dim=st.integers(1, 70), bits=st.sampled_from(BITS))
@settings(deadline=None, max_examples=80)
def test_lookup_is_unpack_and_index(leading: list[int], dim: int, bits: int) -> None:
    levels = torch.randn(2**bits, generator=torch.Generator().manual_seed(0))
    codes = random_codes([*leading, dim], bits)
    values = lookup(pack(codes, bits), lookup_table(levels, bits), dim, bits)
    assert torch.equal(values, levels[codes.long()])


@pytest.mark.parametrize("bits", BITS)
def test_strided_tensors_are_read_as_they_look(bits: int) -> None:
    codes = random_codes([40, 6], bits).T
    packed = pack(codes, bits)
    assert torch.equal(packed, pack(codes.contiguous(), bits))
    strided = packed.repeat_interleave(2, dim=-1)[..., ::2]
    assert torch.equal(unpack(strided, 40, bits), codes)
    levels = torch.arange(2.0**bits)
    assert torch.equal(lookup(strided, lookup_table(levels, bits), 40, bits), codes.float())


@pytest.mark.parametrize("bits", BITS)
def test_planes_are_powers_of_two_that_add_up(bits: int) -> None:
    assert sum(planes(bits)) == bits
    assert all(8 % width == 0 for width in planes(bits))
    assert list(planes(bits)) == sorted(planes(bits), reverse=True)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be from 1 to 8"):
        packed_size(128, bits)


def test_a_wrong_number_of_bytes_is_refused() -> None:
    packed = torch.zeros(2, 47, dtype=torch.uint8)
    with pytest.raises(ValueError, match="48 bytes per vector, got 47"):
        unpack(packed, 128, 3)
    with pytest.raises(ValueError, match="48 bytes per vector, got 47"):
        lookup(packed, lookup_table(torch.arange(8.0), 3), 128, 3)
