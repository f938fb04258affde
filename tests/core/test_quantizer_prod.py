"""TurboQuantProd: inner products that are right on average, with the variance of the theory."""

from __future__ import annotations

import math

import pytest
import torch

from turboquant_core.packing import unpack
from turboquant_core.quantizer import TurboQuantMSE, TurboQuantProd


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class TestInnerProducts:
    @staticmethod
    def errors(dim: int, bits: int, num_seeds: int = 10, num_vectors: int = 4000) -> torch.Tensor:
        """Return errors of estimated inner products of independent unit vectors, over several ``S``."""
        parts = []
        for seed in range(num_seeds):
            x = unit(gaussian(num_vectors, dim, seed=100 + seed))
            y = unit(gaussian(num_vectors, dim, seed=200 + seed))
            prod = TurboQuantProd(dim, bits, seed=seed)
            estimate = prod.inner_product(y, prod.quantize(x))
            parts.append(estimate.double() - (x.double() * y.double()).sum(-1))
        return torch.cat(parts)

    @pytest.mark.parametrize(("bits", "expected"), [(1, 1.56), (2, 0.564), (3, 0.181), (4, 0.053)])
    def test_unbiased_with_the_variance_of_the_theory(self, bits: int, expected: float) -> None:
        errors = self.errors(128, bits)
        standard_error = errors.std().item() / math.sqrt(len(errors))
        assert abs(errors.mean().item()) < 3 * standard_error
        distortion = {1: 1, 2: 0.3609, 3: 0.1160, 4: 0.0340}[bits]
        assert 128 * errors.var().item() == pytest.approx((math.pi / 2 - 1 / 128) * distortion, rel=0.05)
        assert 128 * errors.var().item() == pytest.approx(expected, rel=0.05)

    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_nothing_shrinks_along_the_vector_itself(self, bits: int) -> None:
        ratios = []
        for seed in range(20):
            x = unit(gaussian(500, 128, seed=seed))
            prod = TurboQuantProd(128, bits, seed=seed)
            ratios.append(prod.inner_product(x, prod.quantize(x)).double())
        ratio = torch.cat(ratios)
        assert abs(ratio.mean().item() - 1) < 3 * ratio.std().item() / math.sqrt(len(ratio))

    def test_the_mse_quantizer_alone_does_shrink(self) -> None:
        x = unit(gaussian(2000, 128))
        mse = TurboQuantMSE(128, 2)
        projection = (mse.dequantize(*mse.quantize(x)) * x).sum(-1).mean().item()
        assert projection == pytest.approx(1 - 0.1152, abs=0.002)

    @pytest.mark.parametrize("dim", [16, 17, 80, 100, 256])
    def test_other_dimensions(self, dim: int) -> None:
        errors = self.errors(dim, 3, num_seeds=4, num_vectors=2000)
        assert abs(errors.mean().item()) < 3 * errors.std().item() / math.sqrt(len(errors))
        assert dim * errors.var().item() < 0.2

    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_bytes_of_a_vector(self, bits: int) -> None:
        q = TurboQuantProd(128, bits).quantize(gaussian(10, 128))
        assert q.codes.shape == (10, 16 * (bits - 1))
        assert q.signs.shape == (10, 16)
        assert q.norms.dtype == q.residual_norms.dtype == torch.float16

    def test_signs_are_those_of_the_projected_residual(self) -> None:
        x = gaussian(20, 64)
        prod = TurboQuantProd(64, 3)
        assert prod.mse is not None
        q = prod.quantize(x)
        residual = (x - prod.mse.dequantize(q.codes, q.norms)).double()
        signs = (residual @ prod.projection.double().T).sign()
        assert torch.equal(unpack(q.signs, 64, 1).double() * 2 - 1, signs)
        torch.testing.assert_close(q.residual_norms.double(), residual.norm(dim=-1), rtol=6e-4, atol=0)
        correction = math.sqrt(math.pi / 2) / 64 * q.residual_norms.double().unsqueeze(-1)
        expected = x.double() - residual + correction * (signs @ prod.projection.double())
        torch.testing.assert_close(prod.dequantize(q).double(), expected, rtol=1e-5, atol=1e-5)

    def test_queries_and_vectors_broadcast(self) -> None:
        x, queries = gaussian(7, 64), gaussian(3, 1, 64, seed=1)
        prod = TurboQuantProd(64, 4)
        q = prod.quantize(x)
        products = prod.inner_product(queries, q)
        torch.testing.assert_close(products, queries.squeeze(1) @ prod.dequantize(q).T)
        torch.testing.assert_close(
            prod.inner_product(queries[0, 0].bfloat16(), q), products[0], rtol=0.1, atol=0.5
        )

    @pytest.mark.parametrize("bits", [1, 3])
    def test_zero_and_not_finite_vectors(self, bits: int) -> None:
        x = gaussian(4, 64)
        x[1] = 0
        x[2, 3] = math.inf
        prod = TurboQuantProd(64, bits)
        estimate = prod.dequantize(prod.quantize(x))
        assert not estimate[1].any()
        assert estimate[2].isnan().all()
        assert estimate[[0, 3]].isfinite().all()
