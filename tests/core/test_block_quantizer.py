"""A block of 64 tokens is stored around its mean, at the cost that the configuration states.

Transforms and tokens that are not finite: test_block_transforms.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from turboquant_core.block_quantizer import BlockQuantizer, QuantizedBlocks
from turboquant_core.codebook import e4m3_codebook
from turboquant_core.config import SUPPORTED_BITS, KVCacheConfig
from turboquant_core.packing import packed_size, unpack
from turboquant_core.quantizer import ScaleRule, TurboQuantMSE
from turboquant_core.rotation import rotation_matrix
from turboquant_core.transform import rotation

HEAD_DIMS = [16, 64, 80, 96, 100, 128, 192, 256]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def means_of(x: Tensor) -> Tensor:
    """Return the exact means of blocks, ``[..., 1, dim]``."""
    return x.mean(-2, keepdim=True)


def relative_error(x: Tensor, estimate: Tensor, mean: Tensor) -> float:
    """Return the squared error over the squared distance from the mean, in float64."""
    return ((x - estimate).double().square().sum() / (x - mean).double().square().sum()).item()


def round_trip(quantizer: BlockQuantizer, x: Tensor) -> Tensor:
    return quantizer.dequantize(quantizer.quantize(x))


def stored_means(blocks: QuantizedBlocks) -> Tensor:
    """Return the stored means of transformed blocks, float64 ``[..., 1, dim]``."""
    return (blocks.means.double() * blocks.mean_steps.double().unsqueeze(-1)).unsqueeze(-2)


@pytest.mark.parametrize(
    ("bits", "scale", "bound"),
    [
        (2, "norm_corrected", 0.1181),
        (2, "unbiased", 0.1297),
        (3, "norm_corrected", 0.0322),
        (3, "unbiased", 0.0330),
        (4, "norm_corrected", 0.00811),
        (4, "unbiased", 0.00816),
        (8, "norm_corrected", 0.000043),
        (8, "unbiased", 0.000043),
    ],
)
def test_error_at_head_dim_128(bits: int, scale: ScaleRule, bound: float) -> None:
    x = gaussian(100, 64, 128)
    assert relative_error(x, round_trip(BlockQuantizer(128, bits, scale=scale), x), means_of(x)) < bound


@pytest.mark.parametrize("scale", ["norm_corrected", "unbiased"])
@pytest.mark.parametrize(("bits", "bound"), [(2, 0.993), (3, 0.95), (4, 0.88)])
def test_the_search_for_codes_lowers_the_error_of_nearest_levels(
    bits: int, bound: float, scale: ScaleRule
) -> None:
    x = gaussian(100, 64, 128)
    x -= means_of(x)
    plain = TurboQuantMSE(128, bits, scale=scale, codebook=e4m3_codebook(128, bits))
    nearest = relative_error(x, plain.dequantize(*plain.quantize(x)), torch.zeros(()))
    searched = relative_error(x, round_trip(BlockQuantizer(128, bits, scale=scale), x), torch.zeros(()))
    assert searched < bound * nearest


@pytest.mark.parametrize("scale", ["norm_corrected", "unbiased"])
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_agrees_with_the_definition_in_float64(bits: int, dim: int, scale: ScaleRule) -> None:
    """An int8 mean of the rotated tokens, and codes that of five trial lengths point best."""
    x = gaussian(5, 64, dim) + 3 * gaussian(5, 1, dim, seed=1)
    quantizer = BlockQuantizer(dim, bits, scale=scale, transform=rotation(dim, 7))
    blocks = quantizer.quantize(x)
    matrix = rotation_matrix(dim, 7).double()
    y = x.double() @ matrix.T

    exact = y.mean(-2)
    steps = blocks.mean_steps.double().unsqueeze(-1)
    torch.testing.assert_close(steps.squeeze(-1), exact.abs().amax(-1) / 127, rtol=6e-4, atol=0)
    # The step itself is rounded to float16, so that the largest number may be a little beyond 127 steps.
    assert ((blocks.means.double() * steps - exact).abs() / steps).max() < 0.5 + 127 / 2048

    centred = y - stored_means(blocks)
    unit = centred / centred.norm(dim=-1, keepdim=True)
    centroids = torch.tensor(e4m3_codebook(dim, bits).centroids, dtype=torch.float64)

    def cosine(levels: Tensor) -> Tensor:
        return (unit * levels).sum(-1) / levels.norm(dim=-1)

    trials = [
        cosine(centroids[(length * unit.unsqueeze(-1) - centroids).abs().argmin(-1)])
        for length in (0.84, 0.92, 1.0, 1.08, 1.16)
    ]
    levels = centroids[unpack(blocks.codes, dim, bits).long()]
    # The best trial is found by levels near to float16 numbers, and missed where two trials are equally good.
    missed = torch.stack(trials).amax(0) - cosine(levels)
    assert missed.max() < 1e-3 and missed.mean() < 1e-5

    projection = (unit * levels).sum(-1)
    factor = 1 / levels.norm(dim=-1) if scale == "norm_corrected" else 1 / projection
    lengths = centred.norm(dim=-1)
    torch.testing.assert_close(blocks.norms.double(), lengths * factor, rtol=6e-4, atol=0)
    expected = (levels * blocks.norms.double().unsqueeze(-1) + stored_means(blocks)) @ matrix
    torch.testing.assert_close(quantizer.dequantize(blocks).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_shapes_and_bytes_are_those_of_the_configuration(dim: int, bits: int) -> None:
    x = gaussian(2, 3, 64, dim)
    blocks = BlockQuantizer(dim, bits, scale="unbiased").quantize(x)
    assert (blocks.codes.shape, blocks.codes.dtype) == ((2, 3, 64, packed_size(dim, bits)), torch.uint8)
    assert (blocks.norms.shape, blocks.norms.dtype) == ((2, 3, 64), torch.float16)
    assert (blocks.means.shape, blocks.means.dtype) == ((2, 3, dim), torch.int8)
    assert (blocks.mean_steps.shape, blocks.mean_steps.dtype) == ((2, 3), torch.float16)
    num_bytes = sum(part.untyped_storage().nbytes() for part in blocks)
    config = KVCacheConfig(key_bits=bits, value_bits=bits)
    assert num_bytes == 2 * 3 * 64 * config.bytes_per_token(dim, dim) / 2


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("size", [10, 40, 100, 600])
def test_an_offset_common_to_the_tokens_costs_what_rounding_its_mean_loses(size: int, bits: int) -> None:
    """Without the mean it would cost ``size ** 2``, in units of the error without an offset."""
    x = gaussian(50, 64, 128)
    shifted = x + size * gaussian(50, 1, 128, seed=1)
    quantizer = BlockQuantizer(128, bits, scale="norm_corrected")
    error = relative_error(x, round_trip(quantizer, x), means_of(x))
    shifted_error = relative_error(shifted, round_trip(quantizer, shifted), means_of(shifted))
    assert shifted_error < 1.003 * (1 + 4.6e-5 * size**2) * error


@pytest.mark.parametrize("scale", ["norm_corrected", "unbiased"])
def test_eight_bits_err_by_half_a_step_in_the_rotated_space(scale: ScaleRule) -> None:
    x = gaussian(5, 64, 96)
    quantizer = BlockQuantizer(96, 8, scale=scale)
    blocks = quantizer.quantize(x)
    matrix = rotation_matrix(96, 0).double()
    steps = blocks.norms.double().unsqueeze(-1)
    error = (quantizer.dequantize(blocks) - x).double() @ matrix.T
    assert (error.abs() / steps).max() < 0.5 + 127 / 2048  # the step itself is rounded to float16
    centred = x.double() @ matrix.T - stored_means(blocks)
    torch.testing.assert_close(blocks.norms.double(), centred.abs().amax(-1) / 127, rtol=6e-4, atol=0)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -640.0])
def test_a_constant_block_comes_back(bits: int, value: float) -> None:
    """Exactly if it is zero; what rounding the mean loses is 4e-5 of the energy and quantized in its turn."""
    x = torch.full((2, 64, 64), value)
    restored = round_trip(BlockQuantizer(64, bits, scale="unbiased"), x)
    error_of_the_rest = {2: 0.15, 3: 0.04, 4: 0.01, 8: 0.0001}[bits]
    assert (restored - x).square().sum() <= 4e-5 * error_of_the_rest * x.square().sum()


@pytest.mark.parametrize("magnitude", [1e-42, 5e-6, 1e-5, 1.3e-5, 1e-4, 1.0, 1e30])
def test_a_mean_beyond_127_steps_is_clamped(magnitude: float) -> None:
    """The float16 of a step may be smaller than the step, or as large as float16 gets."""
    x = magnitude * gaussian(20, 1, 64).expand(20, 64, 64)
    quantizer = BlockQuantizer(64, 4, scale="norm_corrected")
    means = quantizer.quantize(x).means.float()
    exact = quantizer.transform.apply(x).mean(-2)
    assert (means * exact >= 0).all()
    assert means.min() >= -127


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e30])
def test_extreme_magnitudes_stay_finite(bits: int, magnitude: float) -> None:
    x = gaussian(2, 64, 64) * magnitude
    assert round_trip(BlockQuantizer(64, bits, scale="unbiased"), x).isfinite().all()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("magnitude", [1e-2, 4e3])
def test_the_error_is_relative_within_the_range_of_float16(bits: int, magnitude: float) -> None:
    x = gaussian(20, 64, 128)
    quantizer = BlockQuantizer(128, bits, scale="unbiased")
    error = relative_error(x, round_trip(quantizer, x), means_of(x))
    scaled = x * magnitude
    assert relative_error(scaled, round_trip(quantizer, scaled), means_of(scaled)) < 1.05 * error


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
    before = x.clone()
    for part, expected in zip(quantizer.quantize(x), quantizer.quantize(x.contiguous()), strict=True):
        assert torch.equal(part, expected)
    assert torch.equal(x, before)
    empty = quantizer.quantize(torch.empty(2, 0, 64, 64))
    assert quantizer.dequantize(empty).shape == (2, 0, 64, 64)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_blocks_do_not_depend_on_each_other(bits: int) -> None:
    x = gaussian(6, 64, 64)
    quantizer = BlockQuantizer(64, bits, scale="norm_corrected")
    blocks = quantizer.quantize(x)
    alone = QuantizedBlocks(*(part[4:5] for part in blocks))
    torch.testing.assert_close(quantizer.dequantize(alone)[0], quantizer.dequantize(blocks)[4])
    other = quantizer.quantize(torch.cat([1e4 * x[:4], x[4:5], 1e4 * x[5:]]))
    assert all(torch.equal(part[4], expected[4]) for part, expected in zip(other, blocks, strict=True))


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
    with pytest.raises(ValueError, match="the transform is for dim 32, not 64"):
        BlockQuantizer(64, bits, scale="unbiased", transform=rotation(32, 0))
