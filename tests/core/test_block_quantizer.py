"""A block of 64 tokens is stored around its mean, at the cost that the configuration states."""

from __future__ import annotations

import math

import pytest
import torch

from turboquant_core.block_quantizer import BlockQuantizer, QuantizedBlocks
from turboquant_core.codebook import e4m3_codebook
from turboquant_core.config import SUPPORTED_BITS, KVCacheConfig
from turboquant_core.packing import packed_size
from turboquant_core.quantizer import ScaleRule, TurboQuantMSE

HEAD_DIMS = [16, 64, 80, 96, 100, 128, 192, 256]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(x: torch.Tensor, estimate: torch.Tensor, mean: torch.Tensor) -> float:
    """Return the squared error over the squared distance from the mean, in float64."""
    return ((x - estimate).double().square().sum() / (x - mean).double().square().sum()).item()


def round_trip(quantizer: BlockQuantizer, x: torch.Tensor) -> torch.Tensor:
    return quantizer.dequantize(quantizer.quantize(x))


@pytest.mark.parametrize("scale", ["norm_corrected", "unbiased"])
@pytest.mark.parametrize(("bits", "bound"), [(2, 0.131), (3, 0.0349), (4, 0.00935), (8, 0.00005)])
def test_error_at_head_dim_128(bits: int, bound: float, scale: ScaleRule) -> None:
    x = gaussian(100, 64, 128)
    quantizer = BlockQuantizer(128, bits, scale=scale)
    assert relative_error(x, round_trip(quantizer, x), x.mean(-2, keepdim=True)) < bound


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_shapes_and_bytes_are_those_of_the_configuration(dim: int, bits: int) -> None:
    x = gaussian(2, 3, 64, dim)
    blocks = BlockQuantizer(dim, bits, scale="unbiased").quantize(x)
    assert blocks.codes.shape == (2, 3, 64, packed_size(dim, bits))
    assert (blocks.norms.shape, blocks.norms.dtype) == ((2, 3, 64), torch.float16)
    assert (blocks.means.shape, blocks.means.dtype) == ((2, 3, dim), torch.bfloat16)
    num_bytes = sum(part.untyped_storage().nbytes() for part in blocks)
    config = KVCacheConfig(key_bits=bits, value_bits=bits)
    assert num_bytes == 2 * 3 * 64 * config.bytes_per_token(dim, dim) / 2


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_an_offset_common_to_the_block_does_no_harm(bits: int) -> None:
    x = gaussian(50, 64, 128)
    offset = 600 * gaussian(50, 1, 128, seed=1)
    quantizer = BlockQuantizer(128, bits, scale="norm_corrected")
    error = relative_error(x, round_trip(quantizer, x), x.mean(-2, keepdim=True))
    shifted = relative_error(
        x + offset, round_trip(quantizer, x + offset), (x + offset).mean(-2, keepdim=True)
    )
    assert shifted < 3 * error  # without the mean it would be 360,000 times the error
    exact_mean = torch.zeros(50, 1, 128)
    assert relative_error(x + offset, round_trip(quantizer, x + offset), exact_mean) < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_block_is_its_stored_mean_and_the_quantized_differences_from_it(bits: int) -> None:
    x = gaussian(5, 64, 80) + 3
    blocks = BlockQuantizer(80, bits, scale="unbiased", seed=7).quantize(x)
    torch.testing.assert_close(blocks.means, x.mean(-2).bfloat16(), rtol=1e-2, atol=1e-2)
    means = blocks.means.float().unsqueeze(-2)
    plain = TurboQuantMSE(80, bits, scale="unbiased", seed=7, codebook=e4m3_codebook(80, bits))
    codes, norms = plain.quantize(x - means)
    assert torch.equal(blocks.codes, codes)
    assert torch.equal(blocks.norms, norms)
    restored = BlockQuantizer(80, bits, scale="norm_corrected", seed=7).dequantize(blocks)
    torch.testing.assert_close(restored, plain.dequantize(codes, norms) + means)


def test_eight_bits_err_by_half_a_step_in_the_rotated_space() -> None:
    x = gaussian(5, 64, 96)
    blocks = BlockQuantizer(96, 8, scale="unbiased").quantize(x)
    restored = BlockQuantizer(96, 8, scale="unbiased").dequantize(blocks)
    rotation = TurboQuantMSE(96, 1).rotation.double()
    steps = blocks.norms.double().unsqueeze(-1)
    error = (restored - x).double() @ rotation.T
    assert (error.abs() / steps).max() < 0.5 + 127 / 2048  # the step itself is rounded to float16
    centred = (x - blocks.means.float().unsqueeze(-2)).double() @ rotation.T
    torch.testing.assert_close(blocks.norms.double(), centred.abs().amax(-1) / 127, rtol=6e-4, atol=0)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -640.0])
def test_a_constant_block_comes_back(bits: int, value: float) -> None:
    x = torch.full((2, 64, 64), value)  # exact in bfloat16, so every difference is zero
    assert torch.equal(round_trip(BlockQuantizer(64, bits, scale="unbiased"), x), x)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_token_that_is_not_finite_becomes_nan_alone(bits: int, bad: float) -> None:
    x = gaussian(3, 64, 64)
    x[1, 20, 5] = bad
    restored = round_trip(BlockQuantizer(64, bits, scale="norm_corrected"), x)
    assert restored[1, 20].isnan().all()
    restored[1, 20] = x[1, 20] = 0
    assert restored.isfinite().all()
    assert relative_error(x, restored, torch.zeros(())) < 0.15


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e30])
def test_extreme_magnitudes_stay_finite(bits: int, magnitude: float) -> None:
    x = gaussian(2, 64, 64) * magnitude
    assert round_trip(BlockQuantizer(64, bits, scale="unbiased"), x).isfinite().all()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type(bits: int, dtype: torch.dtype) -> None:
    x = gaussian(4, 64, 128).to(dtype)
    quantizer = BlockQuantizer(128, bits, scale="norm_corrected")
    blocks = quantizer.quantize(x)
    restored = quantizer.dequantize(blocks, dtype)
    assert restored.dtype == dtype
    reference = round_trip(quantizer, x.float())
    assert relative_error(reference, restored.float(), torch.zeros(())) < 1e-3


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_strided_and_empty_input(bits: int) -> None:
    quantizer = BlockQuantizer(64, bits, scale="unbiased")
    tokens = gaussian(2, 128, 3, 64)  # [batch, num_tokens, num_kv_heads, head_dim], as projections give them
    x = tokens.transpose(1, 2).unflatten(2, (2, 64))
    for part, expected in zip(quantizer.quantize(x), quantizer.quantize(x.contiguous()), strict=True):
        assert torch.equal(part, expected)
    empty = quantizer.quantize(torch.empty(2, 0, 64, 64))
    assert quantizer.dequantize(empty).shape == (2, 0, 64, 64)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_blocks_do_not_depend_on_each_other(bits: int) -> None:
    x = gaussian(6, 64, 64)
    quantizer = BlockQuantizer(64, bits, scale="norm_corrected")
    blocks = quantizer.quantize(x)
    alone = QuantizedBlocks(*(part[4:5] for part in blocks))
    torch.testing.assert_close(quantizer.dequantize(alone)[0], quantizer.dequantize(blocks)[4])


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_wrong_arguments_are_refused(bits: int) -> None:
    quantizer = BlockQuantizer(64, bits, scale="unbiased")
    for shape in ((63, 64), (64, 32), (64,)):
        with pytest.raises(ValueError, match=r"blocks must have shape \[\.\.\., 64, 64\]"):
            quantizer.quantize(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"blocks must be floating-point, got torch\.int64"):
        quantizer.quantize(torch.zeros(64, 64, dtype=torch.long))
    blocks = quantizer.quantize(torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match="codes must have shape"):
        quantizer.dequantize(blocks._replace(codes=blocks.codes[..., 1:]))
    with pytest.raises(ValueError, match="dim must be at least 16, got 8"):
        BlockQuantizer(8, bits, scale="unbiased")
    with pytest.raises(ValueError, match="bits must be 2, 3, 4 or 8, got 5"):
        BlockQuantizer(64, 5, scale="unbiased")
