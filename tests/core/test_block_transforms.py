"""Blocks under transforms of their own, under autocast, and beside tokens that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from turboquant_core.block_quantizer import BlockQuantizer, QuantizedBlocks
from turboquant_core.config import SUPPORTED_BITS
from turboquant_core.transform import Transform, balanced

BAD_TOKENS = {
    "one NaN": [math.nan] + [1.0] * 63,
    "one infinity": [math.inf] + [1.0] * 63,
    "one negative infinity": [1.0] * 63 + [-math.inf],
    "infinities of both signs": [math.inf, -math.inf] * 32,
    "all NaN": [math.nan] * 64,
    "what the rotation overflows at": [3e38] * 64,
}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(x: Tensor, estimate: Tensor) -> float:
    return ((x - estimate).double().square().sum() / x.double().square().sum()).item()


def round_trip(quantizer: BlockQuantizer, x: Tensor) -> Tensor:
    return quantizer.dequantize(quantizer.quantize(x))


def moment(vectors: Tensor) -> Tensor:
    """Return the second moment of vectors ``[num_heads, num_vectors, dim]``."""
    return (vectors.mT @ vectors).double() / vectors.shape[-2]


def heads_apart(num_heads: int, dim: int) -> tuple[Tensor, list[Transform]]:
    """Return a balanced transform's moments of correlated keys and queries, and each head's transform."""
    keys = gaussian(num_heads, 4 * dim, dim) @ gaussian(num_heads, dim, dim, seed=1)
    queries = gaussian(num_heads, 4 * dim, dim, seed=2) @ gaussian(num_heads, dim, dim, seed=3)
    moments = torch.stack([moment(keys), moment(queries)])
    alone = [balanced(*moments[:, head : head + 1], 0) for head in range(num_heads)]
    return moments, alone


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_a_transform_per_head_gives_what_each_head_gives_alone(bits: int, dim: int) -> None:
    moments, alone = heads_apart(3, dim)
    together = BlockQuantizer(dim, bits, scale="unbiased", transform=balanced(*moments, 0))
    tokens = gaussian(2, 128, 3, dim, seed=4)  # strided, as projections give them
    x = tokens.transpose(1, 2).unflatten(2, (2, 64))
    blocks = together.quantize(x)
    restored = together.dequantize(blocks)
    for head in range(3):
        quantizer = BlockQuantizer(dim, bits, scale="unbiased", transform=alone[head])
        expected = round_trip(quantizer, x[:, head : head + 1])
        # A number on a boundary may go either way; another head's transform would change all.
        assert relative_error(expected, restored[:, head : head + 1]) < 1e-4
    assert restored.shape == x.shape
    for part, expected in zip(blocks, together.quantize(x.contiguous()), strict=True):
        assert torch.equal(part, expected)
    empty = together.quantize(torch.empty(2, 3, 0, 64, dim))
    assert together.dequantize(empty).shape == (2, 3, 0, 64, dim)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_a_balanced_transform_halves_the_error_of_products_with_outlier_channels(bits: int) -> None:
    """Channels that are 8 times as large in keys, and 8 times as small in queries, as the others."""
    outliers = torch.ones(128)
    outliers[[3, 40, 77, 100]] = 8
    keys = gaussian(40, 64, 128) * outliers
    queries = gaussian(2000, 128, seed=1) / outliers

    def error(transform: Transform | None) -> float:
        quantizer = BlockQuantizer(128, bits, scale="norm_corrected", transform=transform)
        return ((round_trip(quantizer, keys) - keys) @ queries.T).square().mean().item()

    transform = balanced(moment(keys.view(1, -1, 128)), moment(queries[None]), 0)
    assert error(transform) < error(None) / 2.2
    # As if there were no outliers: only the floor tells them apart.
    even = BlockQuantizer(128, bits, scale="norm_corrected")
    x = keys / outliers
    expected = ((round_trip(even, x) - x) @ (queries * outliers).T).square().mean().item()
    assert error(transform) < 1.1 * expected


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_a_balanced_transform_lowers_the_squared_error_of_values_of_unequal_channels(bits: int) -> None:
    """By what theory says: the mean of the standard deviations squared, over the mean of the variances."""
    sizes = torch.linspace(0.1, 3, 128)
    x = gaussian(40, 64, 128) * sizes
    transform = balanced(moment(x.view(1, -1, 128)), None, 0)
    plain = round_trip(BlockQuantizer(128, bits, scale="unbiased"), x)
    error = relative_error(x, round_trip(BlockQuantizer(128, bits, scale="unbiased", transform=transform), x))
    expected = (sizes.mean().square() / sizes.square().mean()).item()
    assert error == pytest.approx(expected * relative_error(x, plain), rel=0.05)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_autocast_costs_nothing_even_beside_a_large_offset(bits: int) -> None:
    x = gaussian(10, 64, 128) + 100 * gaussian(10, 1, 128, seed=1)
    quantizer = BlockQuantizer(128, bits, scale="norm_corrected")
    expected = round_trip(quantizer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(round_trip(quantizer, x), expected)


def others(blocks: QuantizedBlocks) -> list[Tensor]:
    """Return all that is stored but the codes and the norm of token 20 of block 1 of head 1."""
    keep = torch.ones(blocks.norms.shape, dtype=torch.bool)
    keep[1, 1, 20] = False
    return [blocks.codes[keep], blocks.norms[keep], blocks.means, blocks.mean_steps]


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("per_head", [True, False])
def test_a_token_that_is_not_finite_becomes_nan_and_tells_the_others_nothing(
    bits: int, per_head: bool
) -> None:
    """All else that is stored is the same bit by bit whatever the token holds."""
    transform = balanced(*heads_apart(2, 64)[0], 0) if per_head else None
    quantizer = BlockQuantizer(64, bits, scale="norm_corrected", transform=transform)
    x = gaussian(2, 3, 64, 64)
    good = round_trip(quantizer, x)
    stored = []
    for token in BAD_TOKENS.values():
        x[1, 1, 20] = torch.tensor(token)
        if per_head and 3e38 in token:
            x[1, 1, 20] = 3e38 * quantizer.transform.undo(torch.ones(2, 1, 64))[1, 0].sign()
        blocks = quantizer.quantize(x)
        stored.append(others(blocks))
        restored = quantizer.dequantize(blocks)
        assert restored[1, 1, 20].isnan().all()
        restored[1, 1, 20] = 0
        assert restored.isfinite().all()
        good[1, 1, 20] = 0
        untouched = torch.ones(2, 3, 64, dtype=torch.bool)
        untouched[1, 1] = False
        assert torch.equal(restored[untouched], good[untouched])
        x[1, 1, 20] = 0
        assert relative_error(x[1, 1], restored[1, 1]) < 1.2 * relative_error(x[1, 1], good[1, 1])
    for parts in stored[1:]:
        assert all(torch.equal(part, first) for part, first in zip(parts, stored[0], strict=True))


def test_the_mean_beside_tokens_that_are_not_finite_is_that_of_the_finite_ones() -> None:
    x = gaussian(2, 64, 64) + 5
    quantizer = BlockQuantizer(64, 4, scale="norm_corrected")
    y = quantizer.transform.apply(x)
    x[0, [3, 60]] = math.nan
    x[0, 20:50] = x[1] = math.inf
    blocks = quantizer.quantize(x)
    finite = [i for i in range(64) if i not in (3, 60, *range(20, 50))]
    steps = blocks.mean_steps.float().unsqueeze(-1)
    means = blocks.means * steps
    assert ((means[0] - y[0, finite].mean(0)).abs() / steps[0]).max() < 0.5 + 127 / 2048
    assert not means[1].any()  # no token to take one of
    restored = quantizer.dequantize(blocks)
    assert restored[0, [3, 60, *range(20, 50)]].isnan().all() and restored[1].isnan().all()
    assert relative_error(x[0, finite], restored[0, finite]) < 0.001
