"""Records hold what the quantizers keep, and attention's products with them are those with what they hold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from turboquant_core.block_codec import BlockCodec
from turboquant_core.block_quantizer import KEY_SCALE, VALUE_SCALE, BlockQuantizer, EncodedBlocks
from turboquant_core.exact_codec import ExactCodec
from turboquant_core.record import RecordLayout
from turboquant_core.transform import Transform, balanced

BITS = (2, 3, 4, 8)
DIMS = (16, 24, 64, 80, 96, 128, 256)
# Every pair of widths, and every dimension for keys and for values.
SETTINGS = [
    (DIMS[i % 7], key_bits, DIMS[(i + 3) % 7], value_bits)
    for i, (key_bits, value_bits) in enumerate(itertools.product(BITS, BITS))
]
EXACT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codec_and_quantizers(
    key_dim: int, key_bits: int, value_dim: int, value_bits: int, num_heads: int = 0
) -> tuple[BlockCodec, BlockQuantizer, BlockQuantizer]:
    """Return a codec and what it is made of; with transforms per head if there are heads."""
    key_transform, value_transform = (
        heads_apart(num_heads, dim) if num_heads else None for dim in (key_dim, value_dim)
    )
    keys = BlockQuantizer(key_dim, key_bits, scale=KEY_SCALE, transform=key_transform)
    values = BlockQuantizer(value_dim, value_bits, scale=VALUE_SCALE, transform=value_transform)
    return BlockCodec(keys, values), keys, values


def heads_apart(num_heads: int, dim: int) -> Transform:
    """Return a transform that is no rotation, and another one for each head."""
    keys, queries = (
        gaussian(num_heads, 4 * dim, dim, seed=seed) @ gaussian(num_heads, dim, dim, seed=seed + 1)
        for seed in (1, 3)
    )
    return balanced(*((x.mT @ x).double() / x.shape[-2] for x in (keys, queries)), 0)


def offset_blocks(num_heads: int, num_blocks: int, dim: int, seed: int) -> Tensor:
    """Return blocks that have means, ``[num_heads, num_blocks, 64, dim]``."""
    x = gaussian(num_heads, num_blocks, 64, dim, seed=seed)
    return x + 2 * gaussian(num_heads, num_blocks, 1, dim, seed=seed + 1)


def round_trip(quantizer: BlockQuantizer, x: Tensor) -> Tensor:
    return quantizer.dequantize(quantizer.quantize(x))


@pytest.mark.parametrize(("key_dim", "key_bits", "value_dim", "value_bits"), SETTINGS)
@pytest.mark.parametrize("num_heads", [0, 3])
def test_decodes_to_what_the_quantizers_return_bit_by_bit(
    key_dim: int, key_bits: int, value_dim: int, value_bits: int, num_heads: int
) -> None:
    codec, key_quantizer, value_quantizer = codec_and_quantizers(
        key_dim, key_bits, value_dim, value_bits, num_heads
    )
    keys, values = offset_blocks(3, 2, key_dim, seed=5), offset_blocks(3, 2, value_dim, seed=7)
    records = codec.encode(keys, values)
    assert (records.dtype, records.shape) == (torch.uint8, (3, 2, codec.record_bytes))
    decoded_keys, decoded_values = codec.decode(records)
    assert torch.equal(decoded_keys, round_trip(key_quantizer, keys))
    assert torch.equal(decoded_values, round_trip(value_quantizer, values))


@pytest.mark.parametrize(("key_dim", "key_bits", "value_dim", "value_bits"), SETTINGS)
@pytest.mark.parametrize("num_queries", [1, 3, 300])
def test_attention_over_records_is_attention_over_decoded_blocks(
    key_dim: int, key_bits: int, value_dim: int, value_bits: int, num_queries: int
) -> None:
    """In float64, per head, whether more or fewer queries than dimensions."""
    codec, _, _ = codec_and_quantizers(key_dim, key_bits, value_dim, value_bits, num_heads=2)
    encoded = codec.encode(offset_blocks(2, 3, key_dim, seed=5), offset_blocks(2, 3, value_dim, seed=7))
    keys, values = (x.double() for x in codec.decode(encoded))
    records = encoded.transpose(0, 1)
    queries = gaussian(2, 3, num_queries, key_dim, seed=9)
    weights = gaussian(3, 2, num_queries, 64, seed=10).exp()

    transformed = codec.transform_queries(queries.flatten(1, 2)).view(queries.shape)
    scores = codec.scores(transformed.transpose(0, 1), records)
    expected = queries.double() @ keys.mT
    assert (scores.dtype, scores.shape) == (torch.float32, (3, 2, num_queries, 64))
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(scores.transpose(0, 1).double(), expected, rtol=0, atol=tolerance)

    sums = codec.weighted_values(weights, records)
    assert (sums.dtype, sums.shape) == (torch.float32, (3, 2, num_queries, value_dim))
    restored = codec.restore_values(sums.transpose(0, 1).flatten(1, 2)).view(2, 3, num_queries, value_dim)
    expected = weights.transpose(0, 1).double() @ values
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(restored.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("bits", BITS)
def test_stored_blocks_are_the_transformed_ones(bits: int) -> None:
    codec, *quantizers = codec_and_quantizers(48, bits, 24, bits, num_heads=2)
    records = codec.encode(gaussian(2, 3, 64, 48), gaussian(2, 3, 64, 24))
    for stored, decoded, quantizer in zip(
        codec.stored(records), codec.decode(records), quantizers, strict=True
    ):
        transformed = quantizer.transform.apply(decoded.flatten(1, 2)).view(decoded.shape)
        torch.testing.assert_close(stored, transformed, rtol=1e-4, atol=1e-4)


def results(codec: BlockCodec, records: Tensor) -> tuple[Tensor, ...]:
    """Return all that can be read from records ``[num_blocks, num_kv_heads, record_bytes]``."""
    keys, values = codec.decode(records.transpose(0, 1))
    queries = gaussian(*records.shape[:2], 3, keys.shape[-1], seed=11)
    weights = gaussian(*records.shape[:2], 3, 64, seed=12)
    return keys, values, codec.scores(queries, records), codec.weighted_values(weights, records)


@pytest.mark.parametrize("bits", BITS)
def test_what_lies_beyond_the_parts_of_a_record_counts_for_nothing(bits: int) -> None:
    """Head dims of 24 and 17 end within a tile, of which the rest may hold anything."""
    codec, *quantizers = codec_and_quantizers(24, bits, 17, bits)
    inputs = gaussian(2, 3, 64, 24), gaussian(2, 3, 64, 17)
    generator = torch.Generator().manual_seed(0)
    wider = []
    for quantizer, x in zip(quantizers, inputs, strict=True):
        codes, norms, means, steps = quantizer.encode(x)
        size = 32 - x.shape[-1]
        more_codes = torch.randint(0, 2**bits, (2, 3, 64, size), generator=generator, dtype=torch.uint8)
        more_means = torch.full((2, 3, size), -1, dtype=torch.int8)
        wider.append(
            EncodedBlocks(
                torch.cat([codes, more_codes], -1), norms, torch.cat([means, more_means], -1), steps
            )
        )
    layout = RecordLayout(32, bits, 32, bits)
    poisoned = layout.write(*wider)
    start, end = layout.starts[-2:]
    poisoned[..., start:end] = 255
    clean = codec.encode(*inputs)
    assert not torch.equal(poisoned, clean)
    poisoned, clean = poisoned.transpose(0, 1), clean.transpose(0, 1)
    assert all(map(torch.equal, results(codec, poisoned), results(codec, clean)))


@pytest.mark.parametrize("bits", BITS)
def test_a_token_that_is_not_finite_becomes_nan_and_leaves_the_others_as_they_are(bits: int) -> None:
    codec, _, _ = codec_and_quantizers(24, bits, 48, bits)
    keys, values = gaussian(2, 3, 64, 24), gaussian(2, 3, 64, 48)
    stored = []
    for number in (math.nan, math.inf, -math.inf):
        keys[1, 2, 20, 3] = values[1, 2, 20, 4] = number
        stored.append(codec.encode(keys, values))
    decoded = codec.decode(stored[0])
    for x in decoded:
        assert x[1, 2, 20].isnan().all()
        x[1, 2, 20] = 0
        assert x.isfinite().all()
    scores = codec.scores(gaussian(3, 2, 4, 24), stored[0].transpose(0, 1))
    assert scores[2, 1, :, 20].isnan().all()
    assert scores.isnan().sum() == 4
    for records in stored[1:]:
        for x, expected in zip(codec.decode(records), decoded, strict=True):
            x[1, 2, 20] = 0
            assert torch.equal(x, expected)


@pytest.mark.parametrize("bits", BITS)
def test_strided_and_empty_blocks(bits: int) -> None:
    codec, _, _ = codec_and_quantizers(24, bits, 48, bits)
    # [num_tokens, num_kv_heads, head_dim], as projections give them
    keys, values = (gaussian(192, 2, dim).transpose(0, 1).unflatten(1, (3, 64)) for dim in (24, 48))
    records = codec.encode(keys, values)
    assert torch.equal(records, codec.encode(keys.contiguous(), values.contiguous()))
    by_block = records.transpose(0, 1)
    assert all(map(torch.equal, results(codec, by_block), results(codec, by_block.contiguous())))
    empty = codec.encode(keys[:, :0], values[:, :0])
    assert empty.shape == (2, 0, codec.record_bytes)
    shapes = [tuple(x.shape) for x in results(codec, empty.transpose(0, 1))]
    assert shapes == [(2, 0, 64, 24), (2, 0, 64, 48), (0, 2, 3, 64), (0, 2, 3, 48)]


@pytest.mark.parametrize("bits", BITS)
def test_blocks_do_not_depend_on_each_other(bits: int) -> None:
    codec, _, _ = codec_and_quantizers(64, bits, 64, bits)
    keys, values = gaussian(2, 5, 64, 64), gaussian(2, 5, 64, 64, seed=1)
    records = codec.encode(keys, values)
    others = codec.encode(keys * torch.tensor([9, 9, 1, 9, 9])[:, None, None], values.flip(1))
    assert torch.equal(others[:, 2], records[:, 2])


@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_the_exact_codec_returns_what_it_is_given(dtype: torch.dtype) -> None:
    codec = ExactCodec(24, 40, dtype)
    keys, values = (gaussian(192, 2, dim).to(dtype).transpose(0, 1).unflatten(1, (3, 64)) for dim in (24, 40))
    records = codec.encode(keys, values)
    assert (records.dtype, records.shape) == (torch.uint8, (2, 3, codec.record_bytes))
    assert codec.record_bytes == 64 * (32 + 48) * dtype.itemsize  # multiples of 16
    for decoded in (codec.decode(records), codec.stored(records)):
        assert all(x.dtype == torch.float32 for x in decoded)
        assert torch.equal(decoded[0], keys.float())
        assert torch.equal(decoded[1], values.float())
    by_block = records.transpose(0, 1)
    queries, weights = gaussian(3, 2, 5, 24).to(dtype), gaussian(3, 2, 5, 64)
    scores = codec.scores(codec.transform_queries(queries), by_block)
    torch.testing.assert_close(scores, queries.float() @ keys.float().transpose(0, 1).mT)
    sums = codec.restore_values(codec.weighted_values(weights, by_block))
    torch.testing.assert_close(sums, weights @ values.float().transpose(0, 1))
    empty = codec.encode(keys[:, :0], values[:, :0])
    assert empty.shape == (2, 0, codec.record_bytes)
    assert codec.decode(empty)[1].shape == (2, 0, 64, 40)
