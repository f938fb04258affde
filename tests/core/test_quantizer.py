"""TurboQuantMSE keeps the error bounds that it promises, for any input.

More than 300 lines, because every promise of one class is tested here.
."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import quantizer as quantizer_module
from turboquant_core.codebook import Codebook, lloyd_max_codebook
from turboquant_core.level_coder import level_coder
from turboquant_core.packing import packed_size, unpack
from turboquant_core.quantizer import ScaleRule, TurboQuantMSE, TurboQuantProd

DIMS = [16, 17, 64, 80, 96, 100, 128, 192, 256, 512, 1536]
BITS = range(1, 9)
SCALES: list[ScaleRule] = ["least_squares", "norm_corrected", "unbiased"]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def relative_error(x: torch.Tensor, estimate: torch.Tensor) -> float:
    """Return the squared error over the squared length, summed over all vectors, in float64."""
    x, estimate = x.double(), estimate.double()
    return ((x - estimate).square().sum() / x.square().sum()).item()


def round_trip(quantizer: TurboQuantMSE, x: torch.Tensor) -> torch.Tensor:
    return quantizer.dequantize(*quantizer.quantize(x))


class TestMeanSquaredError:
    @pytest.mark.parametrize(("bits", "expected"), [(2, 0.1152), (3, 0.0335), (4, 0.00915)])
    def test_gaussian_vectors_of_dim_128(self, bits: int, expected: float) -> None:
        x = gaussian(30_000, 128)
        assert relative_error(x, round_trip(TurboQuantMSE(128, bits), x)) == pytest.approx(expected, rel=0.01)

    @pytest.mark.parametrize("dim", DIMS)
    def test_every_bit_lowers_it_by_four_to_six_decibels(self, dim: int) -> None:
        x = gaussian(200_000 // dim, dim, seed=1)
        errors = [relative_error(x, round_trip(TurboQuantMSE(dim, bits), x)) for bits in BITS]
        assert errors[0] < 0.37
        drops = [10 * math.log10(high / low) for high, low in itertools.pairwise(errors)]
        assert all(4 < drop < 6.2 for drop in drops)

    def test_it_does_not_depend_on_the_distribution(self) -> None:
        outliers = gaussian(4000, 128)
        outliers[:, 5] += 100 * gaussian(4000, seed=1)
        sparse = gaussian(4000, 128) * (gaussian(4000, 128, seed=1) > 1.5)
        offset = gaussian(4000, 128) + 30
        for x in (outliers, sparse, offset):
            assert relative_error(x, round_trip(TurboQuantMSE(128, 4), x)) < 1.3 * 0.00915

    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_least_squares_has_the_smallest(self, bits: int) -> None:
        x = gaussian(2000, 128)
        errors = {s: relative_error(x, round_trip(TurboQuantMSE(128, bits, scale=s), x)) for s in SCALES}
        assert min(errors, key=errors.__getitem__) == "least_squares"


class TestScaleRules:
    @pytest.mark.parametrize("bits", [1, 3, 8])
    def test_norm_corrected_keeps_lengths(self, bits: int) -> None:
        x = gaussian(100, 128)
        estimate = round_trip(TurboQuantMSE(128, bits, scale="norm_corrected"), x)
        torch.testing.assert_close(estimate.norm(dim=-1), x.norm(dim=-1), rtol=6e-4, atol=0)

    @pytest.mark.parametrize("bits", [1, 3, 8])
    def test_unbiased_keeps_the_projection_on_the_vector(self, bits: int) -> None:
        x = gaussian(100, 128)
        estimate = round_trip(TurboQuantMSE(128, bits, scale="unbiased"), x)
        torch.testing.assert_close((estimate * x).sum(-1), x.square().sum(-1), rtol=6e-4, atol=0)

    @pytest.mark.parametrize("bits", [1, 3, 8])
    def test_least_squares_leaves_an_error_orthogonal_to_the_estimate(self, bits: int) -> None:
        x = gaussian(100, 128)
        estimate = round_trip(TurboQuantMSE(128, bits), x)
        cosine = ((x - estimate) * estimate).sum(-1) / estimate.square().sum(-1)
        assert cosine.abs().max() < 6e-4


class TestFormat:
    @pytest.mark.parametrize(("bits", "num_bytes"), [(2, 34), (3, 50), (4, 66)])
    def test_bytes_of_a_vector_of_dim_128_with_its_norm(self, bits: int, num_bytes: int) -> None:
        codes, norms = TurboQuantMSE(128, bits).quantize(gaussian(10, 128))
        assert codes.untyped_storage().nbytes() + norms.untyped_storage().nbytes() == 10 * num_bytes

    @given(
        leading=st.lists(st.integers(0, 3), max_size=3),
        dim=st.sampled_from([16, 17, 33, 64, 100]),
        bits=st.integers(1, 8),
        scale=st.sampled_from(SCALES),
    )
    @settings(deadline=None, max_examples=60)
    def test_any_leading_shape(self, leading: list[int], dim: int, bits: int, scale: ScaleRule) -> None:
        quantizer = TurboQuantMSE(dim, bits, scale=scale)
        x = gaussian(*leading, dim)
        codes, norms = quantizer.quantize(x)
        assert (codes.dtype, norms.dtype) == (torch.uint8, torch.float16)
        assert codes.shape == (*leading, packed_size(dim, bits))
        assert norms.shape == tuple(leading)
        estimate = quantizer.dequantize(codes, norms)
        assert (estimate.shape, estimate.dtype) == (x.shape, torch.float32)

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("dim", [64, 96])
    @pytest.mark.parametrize("bits", BITS)
    def test_agrees_with_the_definition_in_float64(self, dim: int, bits: int, scale: ScaleRule) -> None:
        x = gaussian(200, dim)
        quantizer = TurboQuantMSE(dim, bits, scale=scale, seed=3)
        centroids = torch.tensor(lloyd_max_codebook(dim, bits).centroids, dtype=torch.float64)
        lengths = x.double().norm(dim=-1)
        rotated = (x.double() / lengths.unsqueeze(-1)) @ quantizer.rotation.double().T
        distances = (rotated.unsqueeze(-1) - centroids).abs()
        expected_codes = distances.argmin(-1)

        codes, norms = quantizer.quantize(x)
        indices = unpack(codes, dim, bits).long()
        # A coordinate on a boundary may go either way: then both levels are equally near.
        assert (distances.gather(-1, indices.unsqueeze(-1)).squeeze(-1) - distances.amin(-1)).max() < 1e-6
        assert (indices != expected_codes).float().mean() < 1e-3

        levels = centroids[indices]
        projection = (rotated * levels).sum(-1)
        factor = {
            "least_squares": projection / levels.square().sum(-1),
            "norm_corrected": 1 / levels.norm(dim=-1),
            "unbiased": 1 / projection,
        }[scale]
        torch.testing.assert_close(norms.double(), lengths * factor, rtol=6e-4, atol=0)
        expected = norms.double().unsqueeze(-1) * (levels @ quantizer.rotation.double())
        torch.testing.assert_close(
            quantizer.dequantize(codes, norms).double(), expected, rtol=1e-5, atol=1e-5
        )

    def test_the_seed_decides_the_codes(self) -> None:
        x = gaussian(10, 64)
        first, again, other = (TurboQuantMSE(64, 4, seed=seed).quantize(x)[0] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_a_codebook_of_ones_own(self) -> None:
        signs = Codebook(centroids=(-1.0, 1.0), boundaries=(0.0,))
        x = gaussian(100, 64)
        quantizer = TurboQuantMSE(64, 1, codebook=signs)
        expected = round_trip(TurboQuantMSE(64, 1), x)  # the least-squares scale absorbs any factor
        torch.testing.assert_close(round_trip(quantizer, x), expected, rtol=2e-3, atol=1e-5)

    def test_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = gaussian(3, 70, 64)
        whole = round_trip(TurboQuantMSE(64, 4), x)
        monkeypatch.setattr(quantizer_module, "_CPU_CHUNK_VALUES", 9 * 64)
        torch.testing.assert_close(round_trip(TurboQuantMSE(64, 4), x), whole, rtol=1e-3, atol=1e-3)


class TestInputs:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_every_float_type_is_read_at_its_own_precision(self, dtype: torch.dtype) -> None:
        x = gaussian(50, 128).to(dtype)
        quantizer = TurboQuantMSE(128, 4)
        codes, norms = quantizer.quantize(x)
        expected_codes, expected_norms = quantizer.quantize(x.float())
        assert (codes != expected_codes).float().mean() < 1e-3
        torch.testing.assert_close(norms, expected_norms, rtol=1e-3, atol=0)
        assert quantizer.dequantize(codes, norms, dtype).dtype == dtype

    def test_strided_input_and_codes(self) -> None:
        x = gaussian(128, 6, 5).permute(2, 1, 0)
        quantizer = TurboQuantMSE(128, 3)
        codes, norms = quantizer.quantize(x)
        expected = quantizer.quantize(x.contiguous())
        assert torch.equal(codes, expected[0])
        assert torch.equal(norms, expected[1])
        strided = quantizer.dequantize(codes.transpose(0, 1), norms.transpose(0, 1))
        torch.testing.assert_close(strided, quantizer.dequantize(codes, norms).transpose(0, 1))

    @pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (0, 0, 128)])
    def test_empty_batches(self, shape: tuple[int, ...]) -> None:
        quantizer = TurboQuantMSE(128, 3)
        codes, norms = quantizer.quantize(torch.empty(shape))
        assert codes.shape == (*shape[:-1], 48)
        assert quantizer.dequantize(codes, norms).shape == shape
        prod = TurboQuantProd(128, 3)
        assert prod.dequantize(prod.quantize(torch.empty(shape))).shape == shape

    def test_input_is_left_alone_and_no_gradient_is_recorded(self) -> None:
        x = gaussian(4, 64).requires_grad_()
        before = x.detach().clone()
        estimate = round_trip(TurboQuantMSE(64, 4), x)
        assert not estimate.requires_grad
        assert torch.equal(x.detach(), before)

    def test_a_quantizer_made_in_inference_mode_works_outside(self) -> None:
        level_coder.cache_clear()
        with torch.inference_mode():
            quantizer = TurboQuantMSE(64, 4)
            quantizer.quantize(gaussian(4, 64))
        x = gaussian(4, 64).requires_grad_()
        assert relative_error(x.detach(), round_trip(quantizer, x)) < 0.02

    def test_autocast_costs_no_accuracy_that_counts(self) -> None:
        x = gaussian(2000, 128)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            estimate = round_trip(TurboQuantMSE(128, 4), x)
        assert relative_error(x, estimate) == pytest.approx(0.00915, rel=0.02)

    @pytest.mark.parametrize("quantizer", [TurboQuantMSE(64, 4), TurboQuantProd(64, 4)])
    def test_what_is_no_batch_of_vectors_is_refused(self, quantizer: TurboQuantMSE | TurboQuantProd) -> None:
        for wrong in (torch.zeros(3, 63), torch.zeros(64, 3), torch.tensor(1.0)):
            with pytest.raises(ValueError, match=r"vectors must have shape \[\.\.\., 64\]"):
                quantizer.quantize(wrong)
        for dtype in (torch.int32, torch.bool, torch.complex64):
            with pytest.raises(TypeError, match="vectors must be floating-point"):
                quantizer.quantize(torch.zeros(3, 64, dtype=dtype))
        with pytest.raises(ValueError, match="vectors must be on cpu, got meta"):
            quantizer.quantize(torch.zeros(3, 64, device="meta"))

    def test_codes_that_do_not_fit_are_refused(self) -> None:
        quantizer = TurboQuantMSE(64, 4)
        codes, norms = quantizer.quantize(gaussian(3, 64))
        with pytest.raises(ValueError, match="do not match"):
            quantizer.dequantize(codes, norms[:2])
        with pytest.raises(ValueError, match="32 bytes per vector, got 31"):
            quantizer.dequantize(codes[:, :31], norms)

    @pytest.mark.parametrize("make", [TurboQuantMSE, TurboQuantProd])
    def test_arguments_out_of_range_are_refused(
        self, make: type[TurboQuantMSE] | type[TurboQuantProd]
    ) -> None:
        with pytest.raises(ValueError, match="dim must be at least 16, got 8"):
            make(8, 4)
        for bits in (0, 9):
            with pytest.raises(ValueError, match=f"bits must be from 1 to 8, got {bits}"):
                make(64, bits)

    def test_scale_and_codebook_are_checked(self) -> None:
        with pytest.raises(ValueError, match="scale must be least_squares, norm_corrected or unbiased"):
            TurboQuantMSE(64, 4, scale="biased")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a codebook for 4 bits must have 16 centroids, got 8"):
            TurboQuantMSE(64, 4, codebook=lloyd_max_codebook(64, 3))


@pytest.mark.parametrize("scale", SCALES)
class TestExtremeVectors:
    def test_zero_vectors_stay_zero_beside_others(self, scale: ScaleRule) -> None:
        x = gaussian(5, 64)
        x[2] = 0
        codes, norms = TurboQuantMSE(64, 4, scale=scale).quantize(x)
        estimate = TurboQuantMSE(64, 4, scale=scale).dequantize(codes, norms)
        assert norms[2] == 0
        assert not estimate[2].any()
        assert relative_error(x, estimate) < 0.02

    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    def test_a_vector_that_is_not_finite_becomes_nan_alone(self, scale: ScaleRule, bad: float) -> None:
        x = gaussian(5, 64)
        expected = round_trip(TurboQuantMSE(64, 4, scale=scale), x)
        x[2, 7] = bad
        codes, norms = TurboQuantMSE(64, 4, scale=scale).quantize(x)
        estimate = TurboQuantMSE(64, 4, scale=scale).dequantize(codes, norms)
        assert norms[2].isnan()
        assert estimate[2].isnan().all()
        others = [0, 1, 3, 4]
        torch.testing.assert_close(estimate[others], expected[others])

    @pytest.mark.parametrize("magnitude", [1e-45, 1e-39, 1e-30, 1e-9])
    def test_vectors_below_the_range_of_float16_become_zero(self, scale: ScaleRule, magnitude: float) -> None:
        estimate = round_trip(TurboQuantMSE(64, 4, scale=scale), torch.full((3, 64), magnitude))
        assert not estimate.any()

    @pytest.mark.parametrize("magnitude", [1e6, 1e30, 3e38])
    def test_vectors_above_the_range_of_float16_keep_their_direction(
        self, scale: ScaleRule, magnitude: float
    ) -> None:
        x = gaussian(20, 64).clamp(-1, 1)
        estimate = round_trip(TurboQuantMSE(64, 4, scale=scale), x * magnitude)
        assert relative_error(unit(x), unit(estimate)) < 0.02
        lengths = estimate.norm(dim=-1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, 65504.0), rtol=0.05, atol=0)

    @pytest.mark.parametrize("magnitude", [1e-4, 1.0, 4e3])
    def test_the_error_is_relative_within_the_range(self, scale: ScaleRule, magnitude: float) -> None:
        x = gaussian(1000, 128) * magnitude
        estimate = round_trip(TurboQuantMSE(128, 4, scale=scale), x)
        assert relative_error(x, estimate) == pytest.approx(0.0092, rel=0.02)

    def test_float64_beyond_float32(self, scale: ScaleRule) -> None:
        x = torch.stack([gaussian(64).double() * 1e300, gaussian(64).double() * 1e-300])
        estimate = round_trip(TurboQuantMSE(64, 4, scale=scale), x)
        assert estimate.isfinite().all()
        assert relative_error(unit(x[0] / 1e300), unit(estimate[0])) < 0.02
        assert not estimate[1].any()
