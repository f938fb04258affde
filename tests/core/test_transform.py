"""A transform can be undone, and a balanced one loses least of the products with the queries."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant_core.block_quantizer import BlockQuantizer
from turboquant_core.rotation import rotation_matrix
from turboquant_core.transform import LayerTransforms, Transform, balanced, rotation

DIMS = [16, 17, 64, 80, 96, 128, 256]
SEEDS = st.integers(0, 2**32 - 1)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moments(num_heads: int, dim: int, seed: int, spread: float = 1.0) -> Tensor:
    """Return second moments whose eigenvalues span about ``exp(4 * spread)``, float64."""
    directions = torch.linalg.qr(gaussian(num_heads, dim, dim, seed=seed, dtype=torch.float64)).Q
    eigenvalues = (spread * gaussian(num_heads, dim, seed=seed + 1, dtype=torch.float64)).exp()
    return directions @ torch.diag_embed(eigenvalues) @ directions.mT


def with_floor(moment: Tensor) -> Tensor:
    """Return moments as `balanced` reads them: of mean eigenvalue 1, plus 0.01 in every direction."""
    means = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return moment / means + 0.01 * torch.eye(moment.shape[-1], dtype=torch.float64)


def trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def matrices(transform: Transform) -> Tensor:
    """Return the matrix of every head, float64."""
    identity = torch.eye(transform.dim).expand(transform.num_heads, -1, -1)
    return transform.apply(identity).mT.double()


def product_error(matrix: Tensor, moment: Tensor, query_moment: Tensor) -> Tensor:
    """Return what the squared error of products is proportional to, for every head."""
    inverse = torch.linalg.inv(matrix)
    return trace(matrix @ moment @ matrix.mT) * trace(inverse.mT @ query_moment @ inverse)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("with_queries", [True, False])
def test_undo_returns_the_vectors(dim: int, num_heads: int, with_queries: bool) -> None:
    """One matrix serves any number of heads."""
    queries = moments(num_heads, dim, 5) if with_queries else None
    transform = balanced(moments(num_heads, dim, 7), queries, 0)
    assert (transform.num_heads, transform.dim) == (num_heads, dim)
    x = gaussian(2, 3, 9, dim)
    y = transform.apply(x)
    assert (y.shape, y.dtype) == (x.shape, torch.float32)
    torch.testing.assert_close(transform.undo(y), x, rtol=0, atol=1e-4)
    assert (y - x).norm() > x.norm() / 2


@pytest.mark.parametrize("dim", DIMS)
def test_the_rotation_of_a_dimension_and_a_seed_is_that_of_the_quantizer_for_all_heads(dim: int) -> None:
    transform = rotation(dim, 3)
    assert rotation(dim, 3) is transform
    assert (transform.num_heads, transform.dim) == (1, dim)
    x = gaussian(2, 3, 9, dim)
    torch.testing.assert_close(transform.apply(x), x @ rotation_matrix(dim, 3).T)
    torch.testing.assert_close(transform.undo(x), x @ rotation_matrix(dim, 3))
    assert not torch.equal(rotation(dim, 4).apply(x), transform.apply(x))


def test_each_head_has_its_own_matrix() -> None:
    key_moments, query_moments = moments(3, 64, 1), moments(3, 64, 2)
    transform = balanced(key_moments, query_moments, 0)
    x = gaussian(2, 3, 9, 64)
    for head in range(3):
        one = slice(head, head + 1)
        alone = balanced(key_moments[one], query_moments[one], 0)
        torch.testing.assert_close(transform.apply(x)[:, one], alone.apply(x[:, one]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [16, 80, 128])
@pytest.mark.parametrize("with_queries", [True, False])
def test_a_balanced_matrix_solves_its_equation(dim: int, with_queries: bool) -> None:
    """``P = A^T A`` is the only positive definite matrix with ``P M P = Q``, up to the factor of A."""
    moment = moments(2, dim, 11) * 1e-3
    query_moment = moments(2, dim, 13) * 1e5 if with_queries else None
    expected = torch.eye(dim, dtype=torch.float64).expand(2, -1, -1)
    if query_moment is not None:
        expected = with_floor(query_moment)
    matrix = matrices(balanced(moment, query_moment, 3))
    product = matrix.mT @ matrix
    solved = product @ with_floor(moment) @ product
    solved = solved * (trace(expected) / trace(solved))[:, None, None]
    assert (solved - expected).norm() < 1e-4 * expected.norm()
    # What is left of A beside the root of P is the rotation.
    root = rotation_matrix(dim, 3).double().T @ matrix
    assert (root - root.mT).norm() < 1e-5 * root.norm()
    assert torch.linalg.eigvalsh(root).min() > 0


def test_without_queries_every_direction_becomes_as_long_as_the_root_of_its_length() -> None:
    """``P = M^(-1/2)``, so the second moment becomes ``M^(1/2)``."""
    eigenvalues = torch.tensor([100.0] * 8 + [1.0] * 56, dtype=torch.float64)
    matrix = matrices(balanced(torch.diag(eigenvalues)[None], None, 0))
    after = torch.linalg.eigvalsh(matrix @ torch.diag(eigenvalues) @ matrix.mT)[0]
    floored = with_floor(torch.diag(eigenvalues)[None])[0].diagonal()
    expected = (eigenvalues / floored.sqrt()).sort().values
    torch.testing.assert_close(after / after.sum(), expected / expected.sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_vectors_are_as_long_after_the_transform_as_before(scale: float) -> None:
    moment = moments(3, 96, 17) * scale
    for query_moment in (None, moments(3, 96, 19) / scale):
        matrix = matrices(balanced(moment, query_moment, 0))
        floored = trace(matrix @ with_floor(moment) @ matrix.mT)
        torch.testing.assert_close(floored, torch.full_like(floored, 96), rtol=1e-5, atol=0)
        ratio = trace(matrix @ moment @ matrix.mT) / trace(moment)
        assert ((ratio - 1).abs() < 0.03).all()


@settings(deadline=None, derandomize=True, max_examples=30)
@given(SEEDS, st.sampled_from([16, 33, 64]), st.floats(0, 2), st.floats(0, 2), st.floats(1e-3, 1))
def test_no_other_matrix_has_a_smaller_error_of_products(
    seed: int, dim: int, key_spread: float, query_spread: float, size: float
) -> None:
    moment = with_floor(moments(2, dim, seed, key_spread))
    query_moment = with_floor(moments(2, dim, seed + 2, query_spread))
    # `balanced` adds its floor to what it is given, so it gets the moments without it.
    bare = [x - 0.01 * torch.eye(dim, dtype=torch.float64) for x in (moment, query_moment)]
    matrix = matrices(balanced(bare[0], bare[1], 0))
    best = product_error(matrix, moment, query_moment)
    perturbation = size * gaussian(2, dim, dim, seed=seed + 4, dtype=torch.float64)
    others = [
        rotation_matrix(dim, 0).double().expand(2, -1, -1),
        matrix @ (torch.eye(dim, dtype=torch.float64) + perturbation),
        matrix + perturbation / dim,
        matrices(balanced(bare[0], None, 0)),
    ]
    for other in others:
        assert (best <= product_error(other, moment, query_moment) * (1 + 1e-5)).all()
    # The minimum in closed form: the squared sum of the square roots of the eigenvalues of M Q.
    roots = torch.linalg.eigvals(moment @ query_moment).real.sqrt().sum(-1)
    torch.testing.assert_close(best, roots.square(), rtol=1e-4, atol=0)


def measured_error(keys: Tensor, queries: Tensor, bits: int) -> Tensor:
    """Return the mean squared error of products of queries and compressed keys ``[blocks, 64, dim]``."""
    vectors = (keys.flatten(0, 1).double(), queries.double())
    key_moment, query_moment = (x.T @ x / len(x) for x in vectors)
    transform = balanced(key_moment[None], query_moment[None], 0)
    quantizer = BlockQuantizer(keys.shape[-1], bits, scale="norm_corrected", transform=transform)
    error = (quantizer.dequantize(quantizer.quantize(keys)) - keys).flatten(0, 1)
    return (error @ queries.T).square().mean()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 4])
def test_a_matrix_between_queries_and_keys_does_not_change_the_error_of_their_products(
    seed: int, bits: int
) -> None:
    keys = gaussian(30, 64, 64, seed=seed) @ gaussian(64, 64, seed=seed + 10)
    queries = gaussian(500, 64, seed=seed + 20)
    between = torch.linalg.qr(gaussian(64, 64, seed=seed + 30)).Q * torch.linspace(0.5, 2, 64)
    error = measured_error(keys, queries, bits)
    same_products = measured_error(keys @ between, queries @ torch.linalg.inv(between).T, bits)
    torch.testing.assert_close(same_products, error, rtol=0.03, atol=0)


@pytest.mark.parametrize("name", ["nothing", "one key", "one query", "one of each", "the same"])
def test_moments_without_most_directions_give_transforms_that_can_be_undone(name: str) -> None:
    zero = torch.zeros(1, 128, 128, dtype=torch.float64)
    first, second = (gaussian(1, 128, 1, seed=seed, dtype=torch.float64) for seed in (1, 2))
    one, other = first @ first.mT, second @ second.mT
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "nothing": (zero, zero),
        "one key": (one, zero),
        "one query": (zero, one),
        "one of each": (one, other),
        "the same": (one, one),
    }
    x = gaussian(1, 1, 50, 128)
    for transform in (balanced(*pairs[name], 0), balanced(pairs[name][0], None, 0)):
        assert matrices(transform).isfinite().all()
        torch.testing.assert_close(transform.undo(transform.apply(x)), x, rtol=0, atol=1e-4)


def test_moments_of_nothing_give_the_rotation_up_to_the_floor() -> None:
    zero = torch.zeros(2, 64, 64, dtype=torch.float64)
    expected = rotation_matrix(64, 5).double().expand(2, -1, -1) / 1.01**0.5
    torch.testing.assert_close(matrices(balanced(zero, zero, 5)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(matrices(balanced(zero, None, 5)), expected, rtol=0, atol=1e-5)


def test_a_copy_is_the_object_itself() -> None:
    layer = LayerTransforms(balanced(moments(2, 16, 1), None, 0), rotation(16, 0))
    assert layer.keys is not None
    assert copy.copy(layer.keys) is layer.keys
    assert copy.deepcopy({0: layer})[0].keys is layer.keys
    assert copy.deepcopy([layer.values])[0] is layer.values


def test_autocast_does_not_lower_the_precision() -> None:
    for transform in (rotation(64, 0), balanced(moments(3, 64, 1), moments(3, 64, 2), 0)):
        x = gaussian(2, 3, 9, 64) + 100
        expected = transform.apply(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = transform.apply(x)
            restored = transform.undo(y)
        assert torch.equal(y, expected)
        torch.testing.assert_close(restored, x, rtol=0, atol=1e-3)


def test_transforms_made_in_inference_mode_work_outside() -> None:
    rotation.cache_clear()
    with torch.inference_mode():
        transforms = rotation(64, 9), balanced(moments(2, 64, 1), moments(2, 64, 2), 0)
    for transform in transforms:
        x = gaussian(2, 5, 64).requires_grad_()
        transform.undo(transform.apply(x)).sum().backward()  # raises for a matrix made in inference mode
        torch.testing.assert_close(x.grad, torch.ones(2, 5, 64), rtol=0, atol=1e-4)
